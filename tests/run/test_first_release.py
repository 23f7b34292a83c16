"""A work directory of the first release, made by the first commit that trained (d64c23f): today's code goes on with it.

`fixtures/first_release.tar.gz` holds a run of ten, four and twelve steps of its stages on eight devices. Its stage of
denoisers was called `denoise`, its checkpoints carried neither shapes nor checksum, and its configuration is of that day.
"""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from drep_jax.core.denoisers import init_denoise
from drep_jax.errors import CheckpointError
from drep_jax.jobs import fuse, train
from drep_jax.run import workdir
from drep_jax.run.config import defaults
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.run.stages import prepare
from drep_jax.training.checkpoint import Checkpointer, folder_of
from drep_jax.training.logging import lines_of, read_metrics
from drep_jax.weights.native import names_of
from tests.archives import unpack
from tests.command import call

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "first_release.tar.gz"


@pytest.fixture
def run(tmp_path):
    """A copy of the work directory."""
    unpack(FIXTURE, tmp_path)
    return tmp_path / "run"


def test_every_checkpoint_restores_bit_for_bit(run):
    config = workdir.read_config(str(run))
    setup = build(config)
    zeros = jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(setup.abstract))
    for stage, step in (("backbone", 10), ("control", 4), ("algorithm1", 12)):
        params = {"backbone": zeros["params"]}
        if stage == "algorithm1":
            params["denoise"] = init_denoise(setup.sites)
        state, frozen, _ = prepare(Run(config, setup, str(run)), stage, params, {})
        checkpointer = Checkpointer(folder_of(str(run), stage), read_only=True)
        state, frozen, meta = checkpointer.restore(state, frozen)
        checkpointer.close()
        assert int(state.step) == step == meta["step"] and meta["seconds"] > 0
        with ocp.PyTreeCheckpointer() as reader:  # as it lies there, in no structure of ours
            raw = reader.restore(os.path.join(folder_of(str(run), stage), str(step), "state"))
        ours, theirs = names_of({**frozen, **state.params}), names_of(raw["params"])
        assert ours.keys() == theirs.keys()
        assert all(np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes() for name in ours)
        moments = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(state.opt_state)]
        kept = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(raw["opt_state"])]
        assert sorted(leaf.tobytes() for leaf in moments) == sorted(leaf.tobytes() for leaf in kept)


def test_fuse_gives_the_weights_that_the_first_release_wrote(run):
    ended = call("fuse.py", f"--workdir={run}", f"--out={run / 'again'}")
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    old, new = (safetensors.numpy.load_file(run / place / "fused.safetensors") for place in ("fused", "again"))
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    assert sorted(os.listdir(run / "checkpoints")) == ["backbone", "control", "denoise"]


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "denoise" / "12")
    with open(run / "config.json", encoding="utf-8") as file:
        old = json.load(file)
    today = defaults()  # what the same command gives today: its own settings, and the defaults of all others
    for name, value in old.items():
        today[name] = {**today[name], **value} if isinstance(value, dict) else value
    before = lines_of(str(run), "algorithm1")
    monkeypatch.setattr(train, "finish", lambda *arguments: None)
    train.run(today, str(run))
    lines = lines_of(str(run), "algorithm1")
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 12]
    assert lines[:5] == [{**line, "stage": "algorithm1"} for line in before[:5]]
    assert "gap" in lines[-1] and "gap" not in lines[4]  # which that day did not know
    assert sorted(os.listdir(run / "checkpoints" / "denoise")) == ["12", "8"]
    assert not os.path.exists(run / "checkpoints" / "algorithm1")
    assert [line["step"] for line in read_metrics(str(run / "metrics.jsonl")) if line["stage"] == "control"] == [
        1,
        3,
        4,
    ]
    fuse.load_run(str(run))
    with pytest.raises(CheckpointError, match=r"denoise.steps: 2 there, 1 now"):
        train.run({**today, "denoise": {**today["denoise"], "steps": 1}}, str(run))
