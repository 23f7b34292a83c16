"""Checkpoints: whatever happens to a file of the newest one, it is refused by name or read unharmed, never misread."""

import gc
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import CheckpointError, NonFiniteError
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.state import create_state, partitioned
from tests.command import same_bits

FROZEN = {"backbone": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "zero": np.float32([-0.0])}}


def state_at(step, optimizer="adam", value=0.5):
    tx = partitioned(make_optimizer(optimizer, learning_rate=0.1, steps=10), ("denoise",))
    params = {"denoise": {"kernel": jnp.full((3, 3), value, jnp.float32) / (step + 1), "bias": jnp.arange(3.0)}}
    others = {"batch_stats": {"mean": jnp.arange(4.0) + step, "half": jnp.ones(2, jnp.bfloat16) / 3}}
    state = create_state(params, others, tx, FROZEN, jax.random.key(7))
    return state.replace(step=jnp.int32(step))


def restore(directory, state):
    checkpointer = Checkpointer(str(directory))
    try:
        return checkpointer.restore(state, FROZEN)
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 3; that of step 1 was dropped."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpointer = Checkpointer(str(directory))
    for step in (1, 2, 3):
        checkpointer.save(state_at(step), FROZEN, {"stage": "denoise", "seconds": step / 3})
    checkpointer.save(state_at(3, value=9.0), FROZEN, {})  # the same step again changes nothing
    checkpointer.close()
    return directory


def test_round_trip_is_bit_for_bit(saved):
    assert sorted(os.listdir(saved)) == ["2", "3"]
    state, frozen, meta = restore(saved, state_at(0))
    assert same_bits(state, state_at(3)) and same_bits(frozen, FROZEN)
    assert np.signbit(frozen["backbone"]["zero"])
    assert (meta["stage"], meta["seconds"], meta["step"]) == ("denoise", 1.0, 3)


def test_parameters_that_are_not_finite_are_not_saved(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "denoise")
    checkpointer = Checkpointer(str(folder))
    with pytest.raises(
        NonFiniteError, match=r"step 4 .*step 3\) in .*denoise is kept.*denoise/kernel contains NaN or Inf"
    ):
        checkpointer.save(state_at(4, value=np.nan), FROZEN, {})
    checkpointer.close()
    assert same_bits(restore(folder, state_at(0))[0], state_at(3))


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons coroutines on damage
@pytest.mark.parametrize("damage", [delete, pytest.param(truncate, marks=pytest.mark.slow), flip])
def test_damage_is_noticed_and_the_way_out_leads_to_the_earlier_checkpoint(damage, saved, tmp_path):
    files = [path.relative_to(saved) for path in sorted((saved / "3").rglob("*")) if path.is_file()]
    refused = set()
    for number, file in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / f"{number}")
        if (folder / file).stat().st_size == 0 and damage is not delete:
            continue
        damage(folder / file)
        try:
            state, frozen, _ = restore(folder, state_at(0))
        except CheckpointError as error:
            refused.add(str(file.parent / "*") if file.parent.name == "d" else str(file))
            assert "step 3" in str(error) and f"Delete {folder / '3'} " in str(error), (file, error)
            shutil.rmtree(folder / "3")
            state, frozen, _ = restore(folder, state_at(0))
            assert int(state.step) == 2
        assert same_bits(state, state_at(int(state.step))) and same_bits(frozen, FROZEN), file
    gc.collect()
    assert refused >= {"3/meta/metadata", "3/state/_METADATA", "3/state/manifest.ocdbt", "3/state/d/*"}


def test_foreign_checkpoints_are_refused(saved):
    adam = state_at(0)
    other_sites = adam.replace(params={"denoise": {"fc1": {"kernel": jnp.zeros((3, 3))}}})
    with pytest.raises(
        CheckpointError, match=r"(?s)only in the checkpoint: .*denoise/bias.*only in this run: .*denoise/fc1"
    ):
        restore(saved, other_sites)
    wider = adam.replace(params={"denoise": {"kernel": jnp.zeros((5, 5)), "bias": jnp.zeros(5)}})
    with pytest.raises(CheckpointError, match=r"(?s)denoise/kernel \(3, 3\).*denoise/kernel \(5, 5\)"):
        restore(saved, wider)
    fewer = adam.replace(params={"denoise": {"kernel": adam.params["denoise"]["kernel"]}})
    with pytest.raises(CheckpointError, match="denoise/bias"):
        restore(saved, fewer)
    with pytest.raises(CheckpointError, match="step 3"):
        restore(saved, state_at(0, "sgd"))
    no_statistics = adam.replace(others={})
    with pytest.raises(CheckpointError, match="step 3"):
        restore(saved, no_statistics)


def test_a_place_that_cannot_hold_checkpoints_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(CheckpointError, match=f"Cannot keep checkpoints in {file}/denoise"):
        Checkpointer(str(file / "denoise"))
    assert pathlib.Path(file).read_text() == "in the way"
