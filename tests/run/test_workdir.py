"""The work directory: claimed, checked to be writable, and never shared by two different runs."""

import errno
import json
import os
import subprocess

import pytest

from drep_jax.errors import CheckpointError
from drep_jax.files import write_json
from drep_jax.run import environment
from drep_jax.run.config import defaults
from drep_jax.run.workdir import CONFIG, FREE, claimed, flatten, read_config

RUN = {
    "seed": 0,
    "log_every": 50,
    "checkpoint_every": 1,
    "progress": True,
    "data": {"source": "digits", "size": (8, 8)},
}


def claim(directory, config):
    with claimed(directory, config):
        pass


def begun(directory):
    (directory / "checkpoints" / "denoise" / "5").mkdir(parents=True)


def test_a_claimed_directory_can_be_claimed_again(tmp_path):
    place = tmp_path / "deep" / "run"
    claim(str(place), RUN)
    assert sorted(os.listdir(place)) == [CONFIG, "lock", "run.json"]
    with open(place / CONFIG, encoding="utf-8") as file:
        assert json.load(file) == json.loads(json.dumps(RUN))
    begun(place)
    claim(str(place), RUN)


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    claim(str(tmp_path), RUN)
    begun(tmp_path)
    other = {**RUN, "seed": 1, "data": {"source": "folder:x", "size": [8, 8]}, "new": None, "log_every": 7}
    other["extra"] = 3
    with pytest.raises(CheckpointError) as error:
        claim(str(tmp_path), other)
    message = str(error.value)
    for text in (
        "seed: 0 there, 1 now",
        "data.source: 'digits' there, 'folder:x' now",
        "extra: None there, 3 now",
        "--workdir",
    ):
        assert text in message
    assert "data.size" not in message and "log_every" not in message
    assert read_config(str(tmp_path))["seed"] == 0


@pytest.mark.parametrize("name", sorted(set(FREE) & set(RUN)))
def test_what_changes_nothing_learned_may_differ(name, tmp_path):
    claim(str(tmp_path), RUN)
    begun(tmp_path)
    claim(str(tmp_path), {**RUN, name: 99})


def test_the_limit_of_pixels_may_be_raised_and_holds_for_what_reads_the_run_later(tmp_path):
    claim(str(tmp_path), RUN)
    begun(tmp_path)
    claim(str(tmp_path), {**RUN, "data": {**RUN["data"], "max_megapixels": 500.0}})
    saved = read_config(str(tmp_path))
    assert saved["data"]["max_megapixels"] == 500.0 and saved["data"]["source"] == RUN["data"]["source"]


def test_a_run_that_has_made_nothing_yet_may_be_corrected(tmp_path):
    claim(str(tmp_path), RUN)
    (tmp_path / "checkpoints" / "denoise").mkdir(parents=True)
    claim(str(tmp_path), {**RUN, "seed": 4})
    assert read_config(str(tmp_path))["seed"] == 4


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/drep_jax"])
def test_a_place_that_cannot_be_written_is_refused(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Cannot write to the work directory .*Choose another --workdir"):
        claim(str(tmp_path / place), RUN)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        claim(str(tmp_path), RUN)


def test_what_is_no_run_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no finished run: it has no {CONFIG}"):
        read_config(str(tmp_path))
    (tmp_path / "fused.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="may already be fused"):
        read_config(str(tmp_path))
    (tmp_path / CONFIG).write_text('{"seed": ')
    with pytest.raises(CheckpointError, match=f"{CONFIG} cannot be read"):
        read_config(str(tmp_path))


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": (2,)}, "e": None}) == {"a.b.c": 1, "a.d": (2,), "e": None}


def test_every_start_is_recorded_when_it_begins(tmp_path, monkeypatch):
    for arguments in (["train.py"], ["train.py", "--config.log_every=1"]):
        monkeypatch.setattr("sys.argv", arguments)
        with claimed(str(tmp_path), RUN), open(tmp_path / "run.json", encoding="utf-8") as file:
            starts = json.load(file)["starts"]
    assert [start["command"] for start in starts] == ["python train.py", "python train.py --config.log_every=1"]
    for start in starts:
        assert start["packages"].keys() >= {"jaxlib", "numpy", "optax", "orbax-checkpoint"} and start["jax"]
        hardware = start["hardware"]
        assert hardware["cores"] >= hardware["usable_cores"] >= 1 and hardware["memory_gib"] > 0.1
        assert hardware["processor"] and hardware["host"] and hardware["accelerators"] == []
    (tmp_path / "run.json").write_text("damaged by hand")
    claim(str(tmp_path), RUN)
    with open(tmp_path / "run.json", encoding="utf-8") as file:
        assert len(json.load(file)["starts"]) == 1


def test_sources_that_differ_from_their_commit_are_marked(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M train.py"}
    monkeypatch.setattr(environment, "_git", lambda place, command, *options: answers[command])
    assert environment.revision() == "abc-dirty"
    answers["status"] = ""
    assert environment.revision() == "abc"
    answers["rev-parse"] = ""
    assert environment.revision() is None


def test_accelerators_are_listed_with_their_memory(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_limit": 100 * 2**30}

    monkeypatch.setattr(environment.jax, "local_devices", lambda: [Device()])
    assert environment.hardware()["accelerators"] == [{"name": "NVIDIA H200", "usable_memory_gib": 100.0}]


def test_settings_that_were_not_there_yet_count_as_their_defaults(tmp_path):
    old = defaults()
    del old["wandb"], old["denoise"]["time_scale"]
    write_json(str(tmp_path / CONFIG), old)
    begun(tmp_path)
    claim(str(tmp_path), defaults())
    other = {**defaults(), "denoise": {**defaults()["denoise"], "time_scale": 2.0}}
    with pytest.raises(CheckpointError, match=r"denoise\.time_scale: 1\.0 there, 2\.0 now"):
        claim(str(tmp_path), other)


def test_environment_says_what_made_a_run_and_needs_no_git(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--config.sites.pattern=.*fc[12]"])
    found = environment.environment()
    assert found["device_count"] == 8 and found["command"] == "python train.py '--config.sites.pattern=.*fc[12]'"

    def absent(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert environment.environment()["git_revision"] is None
