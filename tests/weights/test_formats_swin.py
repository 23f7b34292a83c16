"""Formats of SwinV2: timm's outputs, both orders of downsampling, round trips to the bit, and what is refused."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from drep_jax import weights
from drep_jax.errors import CheckpointError
from drep_jax.weights import files
from drep_jax.weights.formats.swin import SWIN
from drep_jax.weights.formats.timm_swinv2 import TIMM_SWINV2
from tests.command import same_bits
from tests.swin_cases import CASES, GOLDEN, abstract, foreign_shapes, images, swin_weights, tiny

BUFFERS = {
    "layers.0.blocks.1.attn_mask": np.zeros((6, 24, 24), np.float32),
    "layers.0.blocks.0.attn.relative_coords_table": np.ones((1, 7, 11, 2), np.float32),
    "layers.0.blocks.0.attn.relative_position_index": np.ones((24, 24), np.int64),
}


def load(path, module, **options):
    return weights.load_foreign(str(path), module, abstract(module), **options)


def save(path, tensors):
    safetensors.numpy.save_file({name: np.asarray(a, order="C") for name, a in tensors.items()}, str(path))
    return path


def as_the_authors(tensors):
    """timm's tensors under the authors' names, with the buffers that their files hold."""

    def renamed(name):
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        return re.sub(r"^head\.fc\.", "head.", name)

    return {**{renamed(name): array for name, array in tensors.items()}, **BUFFERS}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_timm_from_both_formats(name, tmp_path):
    module = tiny(**CASES[name][0])
    tensors = swin_weights(foreign_shapes(TIMM_SWINV2, module))
    found = load(save(tmp_path / "timm.safetensors", tensors), module)
    original = load(save(tmp_path / "swin.safetensors", as_the_authors(tensors)), module)
    assert (found.format.name, original.format.name) == ("timm", "swin")
    assert same_bits(found.variables, original.variables)
    np.testing.assert_allclose(
        jax.jit(module.apply)(found.variables, images()), GOLDEN[name], atol=1e-4
    )  # scores up to 100 magnify rounding


@pytest.mark.parametrize("fmt", [TIMM_SWINV2, SWIN], ids=["timm", "swin"])
@pytest.mark.parametrize("options", [{}, {"depths": (1, 1, 1), "num_heads": (2, 4, 4), "window_size": (2, 3)}])
def test_import_then_export_is_the_same_to_the_bit(fmt, options, tmp_path):
    module = tiny(**options)
    tensors = swin_weights(foreign_shapes(fmt, module))
    found = load(save(tmp_path / "net.safetensors", tensors), module)
    path = weights.write_new(module, found.variables, fmt.name, str(tmp_path / "new"), {})
    again = files.read(path).tensors
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, strict=True, err_msg=name)


def test_a_fused_export_replaces_the_packed_tensor_alone_and_keeps_the_buffers(tmp_path):
    module = tiny()
    tensors = as_the_authors(swin_weights(foreign_shapes(TIMM_SWINV2, module)))
    found = load(save(tmp_path / "net.safetensors", tensors), module)
    after = jax.tree_util.tree_map(np.copy, found.variables)
    attention = after["params"]["stage1_block0"]["attn"]
    attention["key"]["kernel"] *= 2
    attention["value"]["bias"] += 1
    changed = weights.write_back(found, str(tmp_path / "fused.safetensors"), found.variables, after, {})
    assert changed == tuple(f"layers.1.blocks.0.attn.{name}" for name in ("qkv.weight", "v_bias"))
    again = files.read(str(tmp_path / "fused.safetensors")).tensors
    assert again.keys() == tensors.keys()
    query, key, value = np.split(again[changed[0]], 3)
    before = np.split(tensors[changed[0]], 3)
    for got, expected in ((query, before[0]), (key, 2 * before[1]), (value, before[2])):
        np.testing.assert_array_equal(got, expected)
    for name in BUFFERS:
        np.testing.assert_array_equal(again[name], tensors[name], strict=True)


def test_another_size_is_listed_side_by_side(tmp_path):
    wide = tiny(width=16, depths=(2, 3))
    path = save(tmp_path / "net.safetensors", swin_weights(foreign_shapes(TIMM_SWINV2, wide)))
    with pytest.raises(CheckpointError) as error:
        load(path, tiny())
    for text in (
        "layers.0.blocks.0.attn.qkv.weight is (48, 16) in the file, (24, 8) in the model",
        "unexpected: \n    layers.1.blocks.2.attn.cpb_mlp.0.bias",
    ):
        assert text in str(error.value)
