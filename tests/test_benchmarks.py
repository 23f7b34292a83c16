"""Every script in benchmarks/ does all of its work at the tiny size, in this process, so that none can rot."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import Parser
from benchmarks.keeping import kept
from tests.command import whole_reports

ROOT = Path(__file__).parents[1]
SHARED = {"adaptation", "arms", "common", "keeping", "single_thread"}
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED)
WITH_DATA = {"camvid", "cifar10c", "coco", "coco_c", "real_noise", "reid", "ridge"}
"""They need the files of DREP_DATA."""

LONG = {
    "camvid",
    "cifar10c",
    "coco",
    "coco_c",
    "detection_forward",
    "distilled",
    "front",
    "ldae",
    "learn",
    "mcunet",
    "measured",
    "modes",
    "pretrain",
    "real_noise",
    "reid",
    "ridge",
    "step",
}
"""They run all learners or modes, which takes a quarter of a minute or more to compile at any size."""

FURTHER = {
    "measured": (["--moments", "--rows=resnet20_cifar:8:2"],),
    "step": (["--modes"],),
    "sites": (["resnet20_cifar", ".*"],),
}
"""Further command lines of a script."""


def cases():
    for name in SCRIPTS:
        marks = [pytest.mark.slow] if name in LONG else []
        for arguments in ([], *FURTHER.get(name, ())):
            yield pytest.param(name, arguments, marks=marks, id=" ".join([name, *arguments]))


@pytest.mark.parametrize(("name", "arguments"), list(cases()))
def test_every_benchmark_runs_at_the_tiny_size(name, arguments, capsys, tmp_path, monkeypatch):
    if name in WITH_DATA and not os.environ.get("DREP_DATA"):
        pytest.skip(f"benchmarks/{name}.py needs the images and weights of DREP_DATA")
    module = importlib.import_module(f"benchmarks.{name}")
    command = ["--tiny", *arguments]
    if name == "mcunet":
        command.append(f"--out={tmp_path}")
    if name in ("modes", "reid"):
        command.append(f"--workdir={tmp_path}")
    if name in ("camvid", "coco", "coco_c", "ldae"):
        command.append(f"--cache={tmp_path}")
    if name == "cifar10c":
        command.append(f"--out={tmp_path / 'out.json'}")
    monkeypatch.chdir(ROOT)
    with whole_reports(drawn=False):
        module.main(command)
    printed = capsys.readouterr().out
    assert any(character.isdigit() for character in printed), "no figure was printed"
    assert " nan" not in printed


def test_tiny_changes_defaults_only():
    parser = Parser("text", rounds=1)
    parser.add_argument("--rounds", type=int, default=9)
    assert parser.parse_args([]).rounds == 9
    assert parser.parse_args(["--tiny"]).rounds == 1
    assert parser.parse_args(["--tiny", "--rounds=3"]).rounds == 3
    with pytest.raises(ValueError, match=r"there are not: .*steps"):
        Parser("text", steps=1).parse_args(["--tiny"])


def test_what_is_kept_is_made_once_and_never_in_part(tmp_path):
    path, made = str(tmp_path / "new" / "tree.npz"), []

    def make():
        made.append(1)
        return {"weights": {"conv": np.arange(3)}, "seconds": 1.5, "chosen": "all sites"}

    def fail():
        raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        kept(path, fail)
    assert not (tmp_path / "new").exists()
    for _ in range(2):
        tree = kept(path, make)
        assert tree["weights"]["conv"].tolist() == [0, 1, 2]
        assert tree["seconds"].item() == 1.5 and tree["chosen"].item() == "all sites"
    assert len(made) == 1 and os.listdir(tmp_path / "new") == ["tree.npz"]
    assert kept("", make)["chosen"] == "all sites" and len(made) == 2


@pytest.mark.parametrize("trial", ["distilled:1e-4", "wiener:1e-4:0.5", "distilled:fast:0.5", "distilled:1:2:3:4"])
def test_a_trial_that_cannot_be_read_is_named(trial, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.distilled").main(["--trials", trial])
    assert f"--trials: {trial}: " in capsys.readouterr().err


def test_detectors_without_their_references_are_named(capsys, monkeypatch):
    module = importlib.import_module("benchmarks.detection_forward")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(module.CASES)
    assert all("left out, torch and " in line and "not installed" in line for line in lines)
    with pytest.raises(SystemExit):
        module.main(["--size", "100", "64"])
    assert "--size 100 64: expected multiples of 32" in capsys.readouterr().err
