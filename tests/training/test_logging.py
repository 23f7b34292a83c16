"""Where metrics go: JSON lines and TensorBoard, at once and with an error when the disk is full; Weights & Biases if asked."""

import copy
import errno
import json
import os
import sys
import types

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.training.logging import MetricWriter, check_wandb, lines_of, read_metrics
from tests.command import TINY, call
from tests.tiny_config import get_config


def events(directory):
    """The scalars in a TensorBoard file, by its format: length, checksum, message, checksum."""
    found = []
    for name in sorted(os.listdir(directory / "tensorboard")):
        content = (directory / "tensorboard" / name).read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + size :]
    return found


def test_every_line_is_on_disk_when_it_is_written(tmp_path):
    writer = MetricWriter(str(tmp_path))
    writer.write("control", 3, {"loss": 0.5, "images_per_second": 12.0})
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == [
        {"stage": "control", "step": 3, "loss": 0.5, "images_per_second": 12.0}
    ]
    assert events(tmp_path) == [("control/loss", 3, 0.5), ("control/images_per_second", 3, 12.0)]
    writer.close()


def test_lines_of_the_first_release_go_on_under_the_new_name(tmp_path):
    lines = [{"stage": "backbone", "step": 1}, {"stage": "denoise", "step": 1}, {"stage": "denoise", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in lines_of(str(tmp_path), "algorithm1")] == [1, 2]
    writer = MetricWriter(str(tmp_path))
    writer.rewind("algorithm1", 1)
    writer.close()
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == [lines[0], {"stage": "algorithm1", "step": 1}]


def test_a_full_disk_is_named_wherever_it_is_met(tmp_path, monkeypatch):
    writer = MetricWriter(str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "flush", full)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl: No space left on device.*Checkpoints are untouched"):
            writer.write("s", 1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "makedirs", full)
        with pytest.raises(CheckpointError, match="tensorboard: No space left"):
            MetricWriter(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(CheckpointError, match="No space left"):
            writer.write("s", 2, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match="No space left"):
            writer.rewind("s", 0)
    assert [line["step"] for line in read_metrics(str(tmp_path / "metrics.jsonl"))] == [1]
    writer.close()


# ---- Weights & Biases --------------------------------------------------------------------------------------------------


class Wandb(types.ModuleType):
    """What we use of the package."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.started, self.lines, self.ended, self.axes = [], [], 0, {}

    def init(self, **options):
        if options["entity"] == "nobody":
            raise self.Error("no such entity")
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def asking(**options):
    config = copy.deepcopy(get_config().to_dict())
    config["wandb"].update({"project": "p", "mode": "offline", **options})
    return config


def test_one_work_directory_is_one_run_there_and_nothing_is_sent_twice(tmp_path, wandb):
    config = asking(tags=("a",), group="g")
    for steps, start in (((1, 2, 3), 0), ((3, 4), 2)):  # the first one was killed after step 3, and resumes from 2
        writer = MetricWriter(str(tmp_path), wandb=config["wandb"], record=config)
        writer.rewind("control", start)
        for step in steps:
            writer.write("control", step, {"loss": 1 / step})
        writer.close()
    first, second = wandb.started
    assert first["id"] == second["id"] and len(first["id"]) == 16 and first["resume"] == "allow"
    assert (first["project"], first["mode"], first["name"], first["group"]) == ("p", "offline", tmp_path.name, "g")
    assert first["config"]["denoise"]["train_steps"] == 30 and first["dir"] == str(tmp_path)
    assert wandb.lines == [{"control/step": step, "control/loss": 1 / step} for step in (1, 2, 3, 4)]
    assert wandb.ended == 2 and wandb.axes == {"control/*": "control/step"}
    assert [line["step"] for line in read_metrics(str(tmp_path / "metrics.jsonl"))] == [1, 2, 3, 4]


def test_without_a_project_nothing_is_started(tmp_path, wandb):
    config = get_config().to_dict()
    MetricWriter(str(tmp_path), wandb=config["wandb"], record=config).close()
    assert not wandb.started


def test_what_cannot_be_followed_is_refused(tmp_path, wandb):
    with pytest.raises(ConfigError, match=r"no such entity.*wandb.mode=offline"):
        MetricWriter(str(tmp_path), wandb=asking(entity="nobody")["wandb"])
    with pytest.raises(ConfigError, match=r'"ofline".*Did you mean "offline"'):
        check_wandb(asking(mode="ofline")["wandb"])
    with pytest.raises(ConfigError, match=r"wandb.name, wandb.group would have no effect: .*wandb.project"):
        check_wandb(asking(project="", name="x", group="y")["wandb"])


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    ended = call("train.py", TINY, f"--workdir={tmp_path / 'run'}", "--config.wandb.project=p")
    ended.refused("wandb.project", "pip install -r requirements-wandb.txt")
    assert not os.path.exists(tmp_path / "run")
