"""Weights as files: the same bits back, or a message that says what does not fit."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError, NonFiniteError
from tests.command import files_of_at_most, same_bits

VARIABLES = {
    "params": {
        "stem": {
            "kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
            "bias": np.float32([-0.0, 1e-40]),
        },
        "block": {"0": {"kernel": (np.arange(6).reshape(2, 3) / 7).astype(ml_dtypes.bfloat16)}},
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "scalar": np.float32(3.5),
    },
    "batch_stats": {"bn": {"mean": np.float16([0.1, 0.2]), "count": np.int32([7])}},
}
FORMS = {
    "safetensors": (weights.save_safetensors, "weights.safetensors"),
    "orbax": (weights.save_orbax, "orbax"),
}
forms = pytest.mark.parametrize("form", FORMS)


def save(form, folder, variables=VARIABLES, fusion=None):
    write, name = FORMS[form]
    path = os.path.join(folder, name)
    write(path, variables, fusion)
    return path


def changed(**params):
    return {**VARIABLES, "params": {**VARIABLES["params"], **params}}


@forms
def test_round_trip_is_bit_for_bit(form, tmp_path):
    path = save(form, tmp_path)
    for like in (VARIABLES, jax.eval_shape(lambda: jax.tree_util.tree_map(jnp.asarray, VARIABLES))):
        found = weights.load(path, like)
        assert same_bits(found, VARIABLES)
    assert weights.digest(found) == weights.digest(VARIABLES)
    assert weights.digest(changed(scalar=np.float32(3.25))) != weights.digest(VARIABLES)


@forms
def test_arrays_on_devices_are_written_like_those_of_the_host(form, tmp_path):
    path = save(form, tmp_path, jax.tree_util.tree_map(jnp.asarray, VARIABLES))
    assert same_bits(weights.load(path, VARIABLES), VARIABLES)


@forms
def test_every_difference_is_listed(form, tmp_path):
    path = save(form, tmp_path)
    like = changed(stem={"kernel": np.zeros((2, 3, 5), np.float32), "gamma": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError) as error:
        weights.load(path, like)
    message = str(error.value)
    assert re.search("missing: *params/stem/gamma\n", message)
    assert re.search("unexpected: *params/stem/bias\n", message)
    assert "params/stem/kernel: (2, 3, 4) in the file, (2, 3, 5) in the model" in message


@forms
def test_fused_weights_are_not_taken_for_a_backbone(form, tmp_path):
    path = save(form, tmp_path, fusion={"rule": "ddpm", "steps": 2})
    with pytest.raises(CheckpointError, match=r"already fused \(.*ddpm"):
        weights.load(path, VARIABLES)
    assert same_bits(weights.load(path, VARIABLES, allow_fused=True), VARIABLES)


@forms
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(form, bad, tmp_path, monkeypatch):
    poisoned = changed(scalar=np.float32(bad))
    path = save(form, tmp_path)
    with pytest.raises(NonFiniteError, match=f"Not writing {re.escape(path)}: params/scalar contains NaN or Inf"):
        save(form, tmp_path, poisoned)
    assert same_bits(weights.load(path, VARIABLES), VARIABLES)  # the old file is untouched
    with monkeypatch.context() as patch:
        patch.setattr(weights.native, "check_finite", lambda tree, what: None)
        save(form, tmp_path, poisoned)
    with pytest.raises(NonFiniteError, match=f"{re.escape(path)}: params/scalar"):
        weights.load(path, VARIABLES)


@forms
def test_a_write_that_breaks_off_leaves_the_old_weights(form, tmp_path, monkeypatch):
    path = save(form, tmp_path)

    def power_cut(*args, **kwargs):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(weights.native.os, "replace", power_cut)
        patch.setattr(weights.native.json, "dump", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            save(form, tmp_path, changed(scalar=np.float32(9)))
    assert same_bits(weights.load(path, VARIABLES), VARIABLES)
    save(form, tmp_path, changed(scalar=np.float32(9)))
    assert weights.load(path, VARIABLES)["params"]["scalar"] == 9
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(path)]


def test_truncated_safetensors_are_refused_at_every_length(tmp_path):
    path = save("safetensors", tmp_path)
    with open(path, "rb") as file:
        whole = file.read()
    for length in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        with open(path, "wb") as file:
            file.write(whole[:length])
        with pytest.raises(CheckpointError, match="no complete safetensors file"):
            weights.load(path, VARIABLES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons coroutines on damage
def test_damaged_orbax_folders_are_refused(tmp_path):
    path = save("orbax", tmp_path)
    for number, name in enumerate(("drep_jax.json", "_METADATA", "manifest.ocdbt")):
        copy = shutil.copytree(path, tmp_path / str(number))
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=re.escape(str(copy))):
            weights.load(str(copy), VARIABLES)
    with open(os.path.join(path, "drep_jax.json"), encoding="utf-8") as file:
        assert json.load(file) == {"fused": None}


def test_what_is_not_there_or_not_ours_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no weights at /nowhere; expected a \.safetensors file or an Orbax directory"
    ):
        weights.load("/nowhere", VARIABLES)
    with pytest.raises(CheckpointError, match=r"holds no drep_jax\.json"):
        weights.load(str(tmp_path), VARIABLES)
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        weights.load(str(tmp_path / "text"), VARIABLES)


@forms
def test_weights_that_find_no_space_leave_the_earlier_ones(form, tmp_path):
    earlier, later = (
        {"params": {"w": np.random.default_rng(n).normal(size=20_000).astype(np.float32)}} for n in (1, 2)
    )
    path = save(form, tmp_path, earlier)
    refused = pytest.raises(CheckpointError, match=r"Cannot write weights to .*: File too large\.")
    with files_of_at_most(40_000), refused:
        save(form, tmp_path, later)
    like = {"params": {"w": jax.ShapeDtypeStruct((20_000,), np.float32)}}
    assert same_bits(weights.load(path, like), earlier)
    assert same_bits(weights.load(save(form, tmp_path, later), like), later)
