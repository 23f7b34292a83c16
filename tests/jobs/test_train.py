"""The whole job on real images: what a run leaves behind, that it can be killed and resumed, and on how many devices."""

import copy
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from drep_jax import report, weights
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.data.loader import normalize
from drep_jax.errors import CheckpointError, ConfigError, DataError, EvaluationError
from drep_jax.jobs import checks, fuse, train
from drep_jax.run import moments, stages
from drep_jax.run.run import Run
from drep_jax.training.logging import CLOCK, read_metrics
from tests.command import ROOT, TINY, call, largest_difference, same_bits, start
from tests.tiny_config import RESNET, get_config

DIE = """
import os, signal
from drep_jax.training.logging import MetricWriter
write = MetricWriter.write
def fatal(self, stage, step, values):
    write(self, stage, step, values)
    if (stage, step) == ({stage!r}, {step}):
        os.kill(os.getpid(), signal.{signal})
MetricWriter.write = fatal
"""


def losses(directory):
    """The log, all but the clock."""
    lines = read_metrics(os.path.join(directory, "metrics.jsonl"))
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def file_bytes(*parts):
    with open(os.path.join(*parts), "rb") as file:
        return file.read()


def restored(directory, stage):
    """The parameters in the last checkpoint of a stage."""
    steps = os.listdir(os.path.join(directory, "checkpoints", stage))
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        path = os.path.join(directory, "checkpoints", stage, max(steps, key=int), "state")
        return checkpointer.restore(path)["params"]


def same_result(directory, finished):
    """Whether a run ended with the same bits as the one that was never stopped."""
    _, variables, denoise = fuse.load_run(directory)
    return (
        same_bits(denoise, finished.denoise)
        and same_bits(variables, finished.variables)
        and losses(directory) == losses(finished.directory)
        and file_bytes(directory, "fused", "fused.safetensors")
        == file_bytes(finished.directory, "fused", "fused.safetensors")
    )


# ---- what a run leaves behind ------------------------------------------------------------------------------------------


def test_report_is_complete_and_readable(finished):
    with open(os.path.join(finished.directory, "report.json"), encoding="utf-8") as file:
        content = json.load(file)
    report.validate(content)
    assert content["metrics"] == report.plain(finished.report["metrics"])
    assert content["certificate"]["passed"] and content["certificate"]["steps"] == 3
    assert [site["path"] for site in content["sites"]] == [site.name for site in finished.setup.sites]
    assert [site["t"] for site in content["sites"]] == [[12], [9], [6], [3]]
    assert all(0 < change < 1 for site in content["sites"] for change in site["relative_change"])
    for entry in content["metrics"].values():
        assert entry["n"] == 600 and set(entry["control"]) == {"placebo", "continued"}
        assert set(entry["denoised"]) == {content["exported"]} == {"algorithm1"}
    assert content["cost"]["flop_ratio"]["fused"] == 1.0 < content["cost"]["flop_ratio"]["explicit"]
    table = report.console_table(content)
    for word in ("baseline", "placebo", "continued", "algorithm1", "gaussian:60", "PASSED"):
        assert word in table
    for name in ("report.md", "report.html", "plots/accuracy.png", "plots/loss.png", "plots/sites.png"):
        assert os.path.getsize(os.path.join(finished.directory, name)) > 500


def test_learning_lowers_every_loss_towards_its_optimum(finished):
    learning = finished.report["learning"]["algorithm1"]
    assert learning["steps"] == 30 and [step for step, _ in learning["loss"]] == [1, 7, 14, 21, 28, 30]
    for name, (before, after) in learning["per_site"].items():
        assert before == pytest.approx(1.0)
        assert learning["optimum"][name] <= after
    before, after = np.sum(list(learning["per_site"].values()), axis=0)
    assert after < before - 0.05 * (before - sum(learning["optimum"].values()))
    gaps = [line["gap"] for line in losses(finished.directory) if line["stage"] == "algorithm1"]
    assert gaps[-1] < gaps[0]


def test_label_free_learning_leaves_every_bit_of_the_backbone(finished):
    trained = restored(finished.directory, "backbone")["backbone"]
    after = restored(finished.directory, "algorithm1")
    assert same_bits(trained, after["backbone"])
    assert same_bits(trained, finished.variables["params"])
    assert largest_difference(after["denoise"], init_denoise(finished.setup.sites)) > 0.1
    assert largest_difference(restored(finished.directory, "control")["backbone"], trained) > 1e-3


@pytest.mark.parametrize("form", ["fused.safetensors", "orbax"])
def test_fused_weights_in_the_plain_backbone_are_the_explicit_path(form, finished):
    setup = finished.setup
    path = os.path.join(finished.directory, "fused", form)
    fused = weights.load(path, setup.abstract, allow_fused=True)
    images = normalize(jnp.stack([setup.test[i]["image"] for i in range(16)]), setup.mean, setup.std)
    plain = setup.backbone.apply(finished.variables, images)
    explicit = explicit_apply(
        setup.backbone, finished.variables, finished.denoise, setup.sites, setup.schedule, images, steps=3
    )
    change = np.linalg.norm(explicit - plain)
    assert change > 1e-3 * np.linalg.norm(plain)
    assert np.linalg.norm(setup.backbone.apply(fused, images) - explicit) < 1e-2 * change


# ---- stopped and resumed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(finished, tmp_path):
    directory = str(tmp_path / "run")
    before = DIE.format(stage="algorithm1", step=21, signal="SIGKILL")
    ended = start("train.py", TINY, f"--workdir={directory}", before=before)
    assert ended.status == -9, ended
    assert "10" in os.listdir(os.path.join(directory, "checkpoints", "algorithm1"))  # that of 20 may be half written
    assert losses(directory)[-1]["step"] == 21  # beyond the checkpoint
    again = train.run(finished.config, directory)
    assert same_result(directory, finished)
    assert again["metrics"] == finished.report["metrics"]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    directory = str(tmp_path / "run")
    before = DIE.format(stage="control", step=1, signal="SIGINT")
    ended = start("train.py", TINY, f"--workdir={directory}", before=before)
    assert ended.status == 130, ended
    assert "Traceback" not in ended.messages
    assert "Ctrl-C in stage control after step 1 of 5; the state is saved" in ended.messages
    command = ended.messages.split("To go on: python ")[1].split()
    assert command[0].endswith("train.py") and f"--workdir={directory}" in command
    assert not os.path.exists(os.path.join(directory, "report.json"))
    assert call("train.py", *command[1:]).status == 0
    assert same_result(directory, finished)


def test_a_finished_run_is_only_evaluated_again(finished, monkeypatch):
    log = file_bytes(finished.directory, "metrics.jsonl")
    made = file_bytes(finished.directory, "fused", "fused.safetensors")

    def never(*args, **kwargs):
        raise AssertionError("a training step was made")

    monkeypatch.setattr("drep_jax.run.moments.collect_moments", never)
    monkeypatch.setattr("drep_jax.run.stages.training_batches", never)
    again = train.run({**finished.config, "latency_rounds": 2}, finished.directory)
    assert again["metrics"] == finished.report["metrics"]
    assert file_bytes(finished.directory, "metrics.jsonl") == log
    assert file_bytes(finished.directory, "fused", "fused.safetensors") == made


@pytest.mark.parametrize(
    "error",
    [pytest.param(KeyError("label"), marks=pytest.mark.slow), DataError("x.png cannot be read.")],
    ids=["bug", "bad input"],
)
def test_an_evaluation_that_fails_at_the_end_loses_nothing(error, finished, tmp_path, monkeypatch, capsys):
    """Weights, certificate and what was learned are written, and the message says how to go on."""
    directory = str(tmp_path / "run")
    shutil.copytree(finished.directory, directory)
    shutil.rmtree(os.path.join(directory, "fused"))
    os.remove(os.path.join(directory, "report.json"))

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(train, "score_arms", fail)
    with pytest.raises(EvaluationError) as caught:
        train.run(finished.config, directory)
    assert f"--eval_only --workdir={directory}" in str(caught.value) and "The same command again" in str(caught.value)
    assert file_bytes(directory, "fused", "fused.safetensors") == file_bytes(
        finished.directory, "fused", "fused.safetensors"
    )
    with open(os.path.join(directory, "report.json"), encoding="utf-8") as file:
        content = json.load(file)
    assert (
        content["metrics"] == {} and content["certificate"]["passed"] and content["learning"].keys() == {"algorithm1"}
    )
    assert content["evaluation_failed"].startswith(type(error).__name__)
    kept = os.path.join(directory, "evaluation_error.txt")
    assert os.path.exists(kept) == isinstance(error, KeyError)
    assert "train: digits, 1,000 images, 10 classes." in capsys.readouterr().out


@pytest.mark.slow
def test_one_device_learns_what_eight_learn(finished, tmp_path):
    directory = str(tmp_path / "run")
    options = [f"--config.backbone.init_from={finished.backbone}", "--config.control.steps=0"]
    learning_only = "from drep_jax.jobs import train\ntrain.finish = lambda *a: print(len(a)) or sys.exit()"
    ended = start("train.py", TINY, f"--workdir={directory}", *options, devices=1, before=learning_only)
    assert ended.status == 0, ended
    _, variables, denoise = fuse.load_run(directory)
    assert same_bits(variables, finished.variables)
    assert largest_difference(denoise, init_denoise(finished.setup.sites)) > 0.5
    assert largest_difference(denoise, finished.denoise) < 5e-3
    ours, theirs = (
        [line["loss"] for line in losses(d) if line["stage"] == "algorithm1"] for d in (directory, finished.directory)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


DIGEST = """
import sys
import jax
from drep_jax import weights
from drep_jax.jobs.fuse import load_run
_, variables, denoise = load_run(sys.argv[1])
print(jax.device_count(), weights.digest({"params": denoise, **{f"b_{k}": v for k, v in variables.items()}}))
"""


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_eight_devices_saved_is_read_bit_for_bit_on_others(devices, finished):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DIGEST, finished.directory]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    _, variables, denoise = fuse.load_run(finished.directory)
    ours = weights.digest({"params": denoise, **{f"b_{name}": tree for name, tree in variables.items()}})
    assert done.stdout.split() == [str(devices), ours]


# ---- other data and models ---------------------------------------------------------------------------------------------


def write_digits(folder, first, last, labelled):
    """Writes real digits as PNG files, in folders of classes or side by side."""
    images, labels = load_digits(return_X_y=True)
    for number in range(first, last):
        place = folder / str(labels[number]) if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        grey = np.round(images[number].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(place / f"{number}.png")


@pytest.mark.slow
def test_labelled_folder_end_to_end(tmp_path):
    write_digits(tmp_path / "images" / "train", 0, 160, labelled=True)
    write_digits(tmp_path / "images" / "val", 160, 200, labelled=True)
    write_digits(tmp_path / "images" / "test", 200, 300, labelled=True)
    options = [f"--config.data.source=folder:{tmp_path / 'images'}", "--config.denoise.train_steps=5"]
    ended = call("train.py", TINY, f"--workdir={tmp_path / 'run'}", *options)
    assert ended.status == 0, ended
    assert "PASSED" in ended.output and str(tmp_path / "run" / "report.md") in ended.output
    with open(tmp_path / "run" / "report.json", encoding="utf-8") as file:
        content = json.load(file)
    report.validate(content)
    assert content["metrics"]["clean"]["n"] == 100 and content["learning"]["algorithm1"]["images"] == 160


@pytest.mark.slow
def test_unlabelled_folder_needs_a_backbone_and_has_no_accuracy(finished, tmp_path):
    write_digits(tmp_path / "images", 0, 64, labelled=False)
    options = [TINY, f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{tmp_path / 'images'}"]
    call("train.py", *options).refused("unlabeled", "--config.model.num_classes")
    options += ["--config.model.num_classes=10"]
    call("train.py", *options).refused("Stage backbone trains with labels", "images", "--config.backbone.steps=0")
    options += [f"--config.backbone.init_from={finished.backbone}"]
    call("train.py", *options).refused("Stage control trains with labels", "--config.control.steps=0")
    assert not os.path.exists(tmp_path / "run")
    options += ["--config.control.steps=0", "--config.learner=closed_form"]
    ended = call("train.py", *options)
    assert ended.status == 0, ended
    assert "No accuracy" in ended.output and "no labeled test images" in ended.output and "PASSED" in ended.output
    with open(tmp_path / "run" / "report.json", encoding="utf-8") as file:
        content = json.load(file)
    report.validate(content)
    assert content["metrics"] == {} and not os.path.exists(tmp_path / "run" / "plots" / "accuracy.png")
    # The closed form is the optimum itself.
    for name, (_, after) in content["learning"]["closed_form"]["per_site"].items():
        assert after == pytest.approx(content["learning"]["closed_form"]["optimum"][name], rel=1e-5)
    assert call("fuse.py", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}").status == 0


@pytest.mark.slow
def test_resnet_with_batch_statistics_end_to_end(tmp_path):
    config = copy.deepcopy(get_config().to_dict())
    config["model"] = dict(RESNET)
    config["learner"] = "closed_form"
    config["denoise"].update(steps=1, rule="ddim")
    config["control"]["steps"] = 0
    config["backbone"].update(steps=100, learning_rate=1e-2)
    content = train.run(config, str(tmp_path))
    report.validate(report.plain(content))
    assert content["certificate"]["passed"]
    assert content["coverage"]["layers"] == content["coverage"]["candidates"] == 4
    assert {site["kind"] for site in content["sites"]} == {"patch", "dense"}
    assert (
        content["metrics"]["clean"]["baseline"]["acc@1"] > 15
    )  # it has learned something, with its running statistics
    run, variables, _ = fuse.load_run(str(tmp_path))
    fused = weights.load(str(tmp_path / "fused" / "fused.safetensors"), run.setup.abstract, allow_fused=True)
    assert same_bits(fused["batch_stats"], variables["batch_stats"])
    assert largest_difference(fused["params"], variables["params"]) > 1e-6
    assert np.abs(variables["batch_stats"]["bn1"]["mean"]).max() > 0.01


def test_keys_of_the_stages_differ(finished):
    keys = [tuple(jax.random.key_data(stages.key_of(finished.config, purpose)).tolist()) for purpose in stages.KEYS]
    assert len(set(keys)) == len(stages.KEYS)
    assert len(set(stages.KEYS.values())) == len(stages.KEYS)


def test_a_run_keeps_its_share(finished, tmp_path):
    """The share is used, recorded with the moments, and asked for when they are read again."""
    config = copy.deepcopy(finished.config)
    config["denoise"].update(moment_tokens=0.5, batch_size=64)
    setup, variables = finished.setup, finished.variables
    run = Run(config, setup, str(tmp_path))
    assert moments.kept_moments(run, variables) is None
    taken = moments.run_moments(run, variables)
    assert {known.count for known in taken.values()} == {len(setup.train) * 2}  # of four patches and the token
    path = setup.sites[0].path
    for again in (moments.run_moments(run, variables), moments.kept_moments(run, variables)):
        np.testing.assert_array_equal(again[path].covariance, taken[path].covariance)
    for read in (moments.run_moments, moments.kept_moments):
        with pytest.raises(CheckpointError, match=r"share of 0\.5"):
            read(Run(finished.config, setup, str(tmp_path)), variables)
    for share in (0.0, 1.5):
        config["denoise"]["moment_tokens"] = share
        with pytest.raises(ConfigError, match=r"denoise\.moment_tokens="):
            checks.check(config, setup)
