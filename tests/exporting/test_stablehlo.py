"""A StableHLO file computes what the live module computes, at any batch size, and is there only if it does."""

import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import CheckpointError, ConfigError, ExportError
from drep_jax.exporting import checked_file
from drep_jax.exporting.stablehlo import export_stablehlo, load_stablehlo
from tests.exporting.tiny import FAMILIES, SIZE, TINY_VIT, network
from tests.trees import normal, outputs


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if f in ("vmamba", "swinv2") else []) for f in FAMILIES]
)
def test_file_equals_live_module_at_sizes_not_tried_when_writing(family, tmp_path):
    module, variables = network(*FAMILIES[family])
    path = str(tmp_path / "fused.stablehlo")
    found = export_stablehlo(module, variables, SIZE, path)
    assert found.passed and found.batches == checked_file.BATCHES
    assert ("bfloat16" in family) == (found.dtype == "bfloat16")
    images = normal(5, (2, *SIZE, 3))
    assert 2 not in found.batches
    expected = jax.jit(module.apply)(variables, images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(load_stablehlo(path)(images), expected, atol=10 * found.bound)
    assert os.listdir(tmp_path) == ["fused.stablehlo"]


def test_all_platforms_are_in_the_file_and_others_can_be_asked_for(tmp_path):
    module, variables = network("vit", {**TINY_VIT, "depth": 1})
    for platforms in (("cpu", "cuda", "tpu"), ("cpu",)):
        path = str(tmp_path / "one.stablehlo")
        export_stablehlo(module, variables, SIZE, path, platforms=platforms)
        with open(path, "rb") as file:
            assert jax.export.deserialize(bytearray(file.read())).platforms == platforms


class Pair(nn.Module):
    """Any Linen module of anyone's: two outputs, from images with one channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3))(x)
        return {"maps": x, "mean": nn.BatchNorm(use_running_average=True)(x).mean((1, 2))}


def test_trees_of_outputs_and_other_channels(tmp_path):
    module, x = Pair(), normal(0, (2, 6, 6, 1))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    path = str(tmp_path / "pair.stablehlo")
    export_stablehlo(module, variables, (6, 6), path, channels=1)
    got, expected = load_stablehlo(path)(x), module.apply(variables, x)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


class Counts(nn.Module):
    """Reads the batch size as a number."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(int(x.shape[0]), -1)) / np.float32(int(x.shape[0]))


def test_a_module_that_needs_to_know_the_batch_size_is_refused_with_what_to_do(tmp_path):
    module, x = Counts(), jnp.zeros((2, *SIZE, 3))
    with pytest.raises(ExportError, match=re.escape("Counts runs at a batch size of 2 but not at an unknown one")):
        export_stablehlo(module, module.init(jax.random.key(0), x), SIZE, str(tmp_path / "no.stablehlo"))
    assert not os.listdir(tmp_path)


def test_weights_too_large_for_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checked_file, "LARGEST_FILE", 1000)
    with pytest.raises(ExportError, match="narrower type"):
        export_stablehlo(*network("vit", TINY_VIT), SIZE, str(tmp_path / "no.stablehlo"))


def test_unknown_and_no_platforms(tmp_path):
    net = network("vit", TINY_VIT)
    with pytest.raises(ConfigError, match=re.escape('Unknown platform "cudda". Did you mean "cuda"?')):
        export_stablehlo(*net, SIZE, str(tmp_path / "no"), platforms=("cudda",))
    with pytest.raises(ConfigError, match="at least one platform"):
        export_stablehlo(*net, SIZE, str(tmp_path / "no"), platforms=())


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * np.nan])
def test_a_file_that_computes_something_else_replaces_nothing(tmp_path, monkeypatch, wrong):
    module, variables = network("vit", {**TINY_VIT, "depth": 1})
    path = tmp_path / "fused.stablehlo"
    path.write_bytes(b"the good one")
    monkeypatch.setattr(
        "drep_jax.exporting.stablehlo.load_stablehlo", lambda p: lambda x: wrong(outputs(module, variables, x))
    )
    with pytest.raises(ExportError, match="the exported network differs from the live one"):
        export_stablehlo(module, variables, SIZE, str(path), platforms=("cpu",))
    assert path.read_bytes() == b"the good one"
    assert os.listdir(tmp_path) == ["fused.stablehlo"]


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_stablehlo(str(tmp_path / "none"))
    path = tmp_path / "half"
    export_stablehlo(*network("vit", {**TINY_VIT, "depth": 1}), SIZE, str(path), platforms=("cpu",))
    for contents in (b"", b"some text", path.read_bytes()[: path.stat().st_size // 2]):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match="no complete StableHLO export"):
            load_stablehlo(str(path))
