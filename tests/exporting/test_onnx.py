"""An ONNX file computes in onnxruntime what the live module computes; `pytest -m onnx tests/exporting` (docs/export.md)."""

import importlib.util
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import CheckpointError, ExportError
from drep_jax.exporting import onnx_file
from drep_jax.exporting.onnx_file import export_onnx, load_onnx
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from tests.exporting.tiny import FAMILIES, SIZE, TINY_VIT, network
from tests.trees import normal

CONVERTED = [name for name in FAMILIES if "bfloat16" not in name]


@pytest.mark.onnx
@pytest.mark.parametrize("family", CONVERTED)
def test_file_equals_live_module_at_sizes_not_tried_when_writing(family, tmp_path):
    module, variables = network(*FAMILIES[family])
    path = str(tmp_path / "fused.onnx")
    found = export_onnx(module, variables, SIZE, path)
    assert found.passed
    images = normal(5, (2, *SIZE, 3))
    expected = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(load_onnx(path)(images), expected, atol=10 * found.bound)
    assert os.listdir(tmp_path) == ["fused.onnx"]


@pytest.mark.onnx
@pytest.mark.parametrize("text", ["image:0.3", "batch:0.25"])
def test_mixed_statistics_are_in_the_file(text, tmp_path):
    family = next(name for name in CONVERTED if "resnet" in name)
    module, variables = network(*FAMILIES[family])
    mixed = MixedStatistics(module, Statistics.parse(text))
    path = str(tmp_path / "mixed.onnx")
    assert export_onnx(mixed, variables, SIZE, path).passed
    images = normal(5, (2, *SIZE, 3))
    answers = np.asarray(load_onnx(path)(images))
    np.testing.assert_allclose(answers, mixed.apply(variables, images), rtol=1e-3, atol=1e-4)
    assert np.abs(answers - module.apply(variables, images)).max() > 1e-3


@pytest.mark.onnx
def test_names_and_unknown_batch_size_are_in_the_file(tmp_path):
    import onnxruntime

    path = str(tmp_path / "fused.onnx")
    export_onnx(*network("vit", TINY_VIT), SIZE, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [images], [outputs] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", *SIZE, 3], "tensor(float)")
    assert (outputs.name, outputs.shape) == ("outputs", ["batch", 5])


class Pools(nn.Module):
    """Several outputs; windows with strides, dilation, uneven padding; sides cut off; a loop that runs backwards."""

    @nn.compact
    def __call__(self, x):
        pooled = nn.max_pool(x, (3, 2), (2, 1), padding=((1, 2), (0, 1)))
        dilated = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 3, 1), "VALID", window_dilation=(1, 2, 1, 1)
        )
        cut = jax.lax.pad(x, 0.5, [(0, 0, 0), (-1, 2, 0), (1, -1, 0), (0, 0, 0)])
        sums = jax.lax.scan(lambda c, row: (0.5 * c + row, c), x[:, 0], x.swapaxes(0, 1), reverse=True)
        return nn.Conv(2, (3, 3))(pooled), {"cut": cut, "dilated": dilated, "sums": sums}


@pytest.mark.onnx
def test_windows_padding_and_several_outputs(tmp_path):
    module, x = Pools(), normal(0, (2, 9, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    path = str(tmp_path / "pools.onnx")
    export_onnx(module, variables, (9, 8), path, channels=1)
    expected = jax.tree_util.tree_leaves(module.apply(variables, x))
    assert len(expected) == 5
    for got, leaf in zip(load_onnx(path)(x), expected, strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-5)


class Callback(nn.Module):
    """Calls back into Python, which no file can hold."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2)(x.reshape(x.shape[0], -1))
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


@pytest.mark.onnx
def test_what_cannot_be_converted_or_run_is_refused_and_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "fused.onnx"
    path.write_bytes(b"the good one")
    module, x = Callback(), jnp.zeros((2, *SIZE, 3))
    with pytest.raises(ExportError, match="jax2onnx cannot convert Callback"):
        export_onnx(module, module.init(jax.random.key(0), x), SIZE, str(path))
    with pytest.raises(ExportError, match="computes in bfloat16"):
        export_onnx(*network(*FAMILIES["vit, bfloat16"]), SIZE, str(path))
    module, variables = network("vit", TINY_VIT)
    monkeypatch.setattr(onnx_file, "load_onnx", lambda p: lambda images: 1.01 * module.apply(variables, images))
    with pytest.raises(ExportError, match="the exported network differs from the live one"):
        export_onnx(module, variables, SIZE, str(path))
    assert path.read_bytes() == b"the good one"
    assert os.listdir(tmp_path) == ["fused.onnx"]


@pytest.mark.onnx
def test_absent_and_damaged_files(tmp_path):
    path = tmp_path / "half.onnx"
    with pytest.raises(CheckpointError, match="onnxruntime cannot read"):
        load_onnx(str(path))
    path.write_bytes(b"some text")
    with pytest.raises(CheckpointError, match="onnxruntime cannot read"):
        load_onnx(str(path))


@pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is not None, reason="the optional packages are installed")
def test_without_the_optional_packages_the_error_says_what_to_install(tmp_path):
    with pytest.raises(ExportError, match=r"pip install --no-deps -r requirements-onnx\.txt"):
        export_onnx(*network("vit", TINY_VIT), SIZE, str(tmp_path / "no.onnx"))
