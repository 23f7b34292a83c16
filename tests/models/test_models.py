"""Backbones: every registry entry by table, the networks against NumPy, remat and scan against the plain ViT."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import erf

from drep_jax.errors import ConfigError
from drep_jax.models import MODELS, Backbone, create_model, list_models
from drep_jax.models.vit import ViT, stack_blocks
from tests.models.detectors.networks import NETWORKS, class_of
from tests.models.detectors.rcnns import RCNNS
from tests.pixel_classifiers import PIXEL_CLASSIFIERS

TINY_VIT = {"patch_size": (2, 4), "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20}
TINY_RESNET = {"stage_sizes": (1, 1), "block": "basic", "width": 4, "stem": "cifar"}
TINY_SWIN = {"width": 4, "depths": (2, 1), "num_heads": (2, 4), "window_size": (2, 3), "patch_size": 2}
TINY_VMAMBA = {"depths": (1, 1), "width": 4, "ssm_ratio": 1.5}
TINY_TRANSREID = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16}
SIZE = (8, 12)


def cifar_parameters(n):
    """A stem, three stages of 2n convolutions, shortcuts without parameters (He et al. 2016, section 4.2)."""
    stem = 27 * 16
    first, second, third = 2 * n * 16 * 144, 16 * 288 + (2 * n - 1) * 32 * 288, 32 * 576 + (2 * n - 1) * 64 * 576
    norms = 2 * (16 * (2 * n + 1) + 32 * 2 * n + 64 * 2 * n)
    return stem + first + second + third + norms + 64 * 1000 + 1000


def swin_block(width, heads):
    """Attention without a bias of the keys, the network of the position bias, an MLP of four times the width, norms."""
    attention = 4 * width * width + 3 * width + heads + 2 * 512 + 512 + 512 * heads
    return attention + 8 * width * width + 5 * width + 4 * width


def swin_block_v1(width, heads):
    """Attention with the table of windows of 2 × 3, an MLP of four times the width, norms."""
    return 4 * width * width + 4 * width + 15 * heads + 8 * width * width + 5 * width + 4 * width


def vmamba_block(width, inner):
    """Norms, in and out, depthwise 3x3, four directions (Δ of rank 1, B, C, Δ's map and bias, A, D), MLP."""
    mix = 2 * width * inner + 9 * inner + 4 * 3 * inner + 4 * 2 * inner + 4 * 2 * inner + 2 * inner
    return mix + 4 * width + 8 * width**2 + 5 * width


# name: (overrides, image size, trainable parameters with 1000 classes, as published by timm and torchvision
# or, for the free entries, counted by hand below)
TABLE = {
    "vit": (TINY_VIT, SIZE, 300 + 12 + 13 * 12 + 2 * (2 * 24 + 4 * 156 + 260 + 252) + 24 + 13_000),
    "vit_ti16": ({}, (224, 224), 5_717_416),
    "vit_s16": ({}, (224, 224), 22_050_664),
    "vit_s8": ({}, (224, 224), 22_055_272),
    # timm counts 22,049,896 with mean pooling, learned positions (196 of 384) and no pre_logits (385 times 384).
    "vit_s16_gap": ({}, (224, 224), 22_049_896 - 196 * 384 + 385 * 384),
    "vit_s32": ({}, (224, 224), 22_878_952),
    "vit_b8": ({}, (224, 224), 86_576_872),
    "vit_b16": ({}, (224, 224), 86_567_656),
    "vit_b32": ({}, (224, 224), 88_224_232),
    "vit_l16": ({}, (224, 224), 304_326_632),
    # timm's networks with registers have no position of the class token; the original ones do.
    "dinov2_s14": ({}, (518, 518), 22_441_192),
    "dinov2_s14_reg": ({"position_class_token": False}, (518, 518), 22_442_344),
    "dinov2_b14": ({}, (518, 518), 87_348_712),
    "dinov2_b14_reg": ({"position_class_token": False}, (518, 518), 87_351_016),
    "dinov2_l14": ({}, (518, 518), 305_392_616),
    "dinov2_l14_reg": ({"position_class_token": False}, (518, 518), 305_395_688),
    "resnet": (
        TINY_RESNET,
        SIZE,
        (27 * 4 + 8) + 2 * (36 * 4 + 8) + (36 * 8 + 16) + (72 * 8 + 16) + (4 * 8 + 16) + 9_000,
    ),
    "resnet18": ({}, (224, 224), 11_689_512),
    "resnet34": ({}, (224, 224), 21_797_672),
    "resnet50": ({}, (224, 224), 25_557_032),
    "resnet101": ({}, (224, 224), 44_549_160),
    "swin": (
        {**TINY_SWIN, "num_heads": (2, 2)},
        SIZE,
        (12 * 4 + 4 + 8) + 2 * swin_block_v1(4, 2) + (32 + 16 * 8) + swin_block_v1(8, 2) + 16 + 9_000,
    ),
    "swin_t": ({}, (224, 224), 28_288_354),
    "swin_s": ({}, (224, 224), 49_606_258),
    "swinv2": (
        TINY_SWIN,
        SIZE,
        (12 * 4 + 4 + 8) + 2 * swin_block(4, 2) + (16 * 8 + 16) + swin_block(8, 4) + 16 + 9_000,
    ),
    **{f"swinv2_t_w{window}": ({}, (256, 256), 28_347_154) for window in (8, 16)},
    **{f"swinv2_s_w{window}": ({}, (256, 256), 49_728_418) for window in (8, 16)},
    **{f"swinv2_b_w{window}": ({}, (256, 256), 87_918_816) for window in (8, 16)},
    # What the authors' networks hold and never read (ImageNet's classifier, the block and the norm that the jigsaw branch
    # copies) and the shifts that are held at 0 do not count; tests/parity/test_transreid_reference.py compares.
    "transreid": (TINY_TRANSREID, SIZE, (48 * 8 + 8) + 8 + 7 * 8 + 2 * (4 * 72 + 144 + 136 + 32) + 16 + 8 + 8_000),
    "transreid_b16": ({}, (256, 128), 96_679_680),
    "transreid_b16_stride12": ({}, (256, 128), 96_742_656),
    **{name: ({}, (256, 128), 86_515_200) for name in ("transreid_b16_baseline", "transreid_ssl_b16")},
    "transreid_ssl_s16": ({}, (256, 128), 22_023_936),
    "transreid_ssl_s16_ics": ({}, (256, 128), 23_385_408),
    "transreid_ssl_b16_ics": ({}, (384, 128), 89_154_624 + 64 * 768),
    "vmamba": (
        TINY_VMAMBA,
        SIZE,
        (27 * 2 + 2 + 4) + (18 * 4 + 4 + 8) + vmamba_block(4, 6) + (36 * 8 + 8 + 16) + vmamba_block(8, 12) + 16 + 9_000,
    ),
    "vmamba_t": ({}, (224, 224), 30_249_064),
    "vmamba_s": ({}, (224, 224), 50_147_752),
    "vmamba_b": ({}, (224, 224), 88_557_800),
    **{f"resnet{6 * n + 2}_cifar": ({}, (32, 32), cifar_parameters(n)) for n in (3, 5, 7, 9)},
}
# They return no logits, or maps of them, or are read from a file: counted in test_clip_reid.py, test_reid_resnet.py,
# test_pixel_classifiers.py, test_mcunet.py and detectors/.
ELSEWHERE = {
    "mcunet",
    "clip_reid",
    "clip_reid_b16",
    "resnet_reid",
    "resnet50_reid",
    "resnet50_vanet",
    *PIXEL_CLASSIFIERS,
    *{"rcnn", *RCNNS, *NETWORKS},
    *{"atss", "centernet", "darknet", "detr"},  # NETWORKS are of these
}


def tiny(name="vit", num_classes=5, **overrides):
    base = TINY_VIT if name == "vit" else TINY_RESNET
    return create_model(name, num_classes=num_classes, image_size=SIZE, **{**base, **overrides})


def images(batch=2, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


def random_variables(module, x, seed=1):
    """Variables of the right shapes with nothing at zero or one: biases, scales, class token and statistics too."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2.0)}.get(name, (-0.3, 0.3))
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def quick_key(seed):
    """A key whose draws compile several times faster than those of the default generator."""
    return jax.random.key(seed, impl="rbg")


def apply(module, variables, x):
    return np.asarray(jax.jit(module.apply)(variables, x))


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_entry_has_a_row_and_is_listed():
    assert set(TABLE) | ELSEWHERE == set(MODELS), "add a row to TABLE for each entry of MODELS"
    assert list_models() == sorted(MODELS)
    assert list_models("vit_s*") == ["vit_s16", "vit_s16_gap", "vit_s32", "vit_s8"]
    assert list_models("nothing*") == []


# Tracing the large ones takes seconds each: they run with `pytest -m slow`.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if row[2] > 23e6 else []) for name, row in TABLE.items()]
)
def test_parameter_count_and_output_with_and_without_classes(name):
    overrides, size, expected = TABLE[name]
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)

    def shapes(num_classes):
        module = create_model(name, num_classes=num_classes, image_size=size, **overrides)
        output, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
        return output, flatten_dict(variables["params"], sep="/")

    logits, params = shapes(1000)
    assert sum(leaf.size for leaf in params.values()) == expected
    retrieval = "neck/classifier/kernel" in params
    assert (logits.shape[1] % 8 == 0 if retrieval else logits.shape == (2, 1000)) and logits.dtype == jnp.float32

    if expected > 30e6:  # tracing the large ones again would show nothing more
        return
    features, headless = shapes(0)
    if retrieval:
        assert set(params) - set(headless) == {"neck/classifier/kernel"} and features.shape == logits.shape
        return
    last = "fc" if name.startswith("resnet") else "head"
    assert set(params) - set(headless) == {f"{last}/kernel", f"{last}/bias"}
    assert (features.shape, features.dtype) == ((2, params[f"{last}/kernel"].shape[0]), jnp.float32)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_initialized_forward_and_gradients_are_finite_and_reach_every_parameter(name):
    module, x = tiny(name, **({"depth": 1} if name == "vit" else {"stage_sizes": (1,)})), images()
    variables = random_variables(module, x)
    logits, _ = jax.jit(module.init_with_output)(quick_key(0), x)
    assert logits.shape == (2, 5) and np.isfinite(logits).all() and np.ptp(logits) > 0

    def loss(params):
        return jnp.sum(module.apply({**variables, "params": params}, x) ** 2)

    for path, gradient in flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/").items():
        assert np.isfinite(gradient).all(), path
        # A bias of the keys adds the same to all scores of a query, which the softmax ignores.
        assert np.abs(gradient).max() > 0 or path.endswith("key/bias"), path


def test_every_model_has_the_types_and_the_remat_of_the_base():
    for name in MODELS:
        kind = class_of(name)
        assert issubclass(kind, Backbone), name
        assert {"dtype", "param_dtype", "remat"} <= kind.__dataclass_fields__.keys(), name


def test_adding_a_model_is_one_line(monkeypatch):
    class Flat(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(self.num_classes)(x.mean((1, 2)))

    monkeypatch.setitem(MODELS, "flat", Flat)
    assert create_model("flat", num_classes=3, image_size=SIZE) == Flat(3)


def test_lists_from_configuration_files_give_hashable_modules():
    vit = create_model("vit", num_classes=5, image_size=list(SIZE), **{**TINY_VIT, "patch_size": [2, 4]})
    net = create_model("resnet", num_classes=5, image_size=SIZE, **{**TINY_RESNET, "stage_sizes": [1, 1]})
    assert vit == tiny("vit") and hash(vit) == hash(tiny("vit"))
    assert net == tiny("resnet") and hash(net) == hash(tiny("resnet"))


# --- NumPy oracles ---------------------------------------------------------------------------------------------------


def np_layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def np_dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def np_gelu(y):
    return y * 0.5 * (1 + erf(y / np.sqrt(2)))


def np_gelu_tanh(y):
    return y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def np_block(x, p, heads, gelu):
    """One image's tokens (N, D), head by head."""
    y = np_layer_norm(x, p["norm1"])
    q, k, v = (np_dense(y, p["attn"][name]) for name in ("query", "key", "value"))
    mixed = []
    for h in range(heads):
        part = slice(h * x.shape[1] // heads, (h + 1) * x.shape[1] // heads)
        weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(x.shape[1] / heads))
        mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    scales = [p[name]["gamma"] if name in p else 1 for name in ("ls1", "ls2")]
    x = x + scales[0] * np_dense(np.concatenate(mixed, 1), p["attn"]["out"])
    y = gelu(np_dense(np_layer_norm(x, p["norm2"]), p["mlp"]["fc1"]))
    return x + scales[1] * np_dense(y, p["mlp"]["fc2"])


def np_sincos(row, column, width):
    """Of one patch, angle by angle."""
    omega = [10_000 ** (-i / (width // 4 - 1)) for i in range(width // 4)]
    return [f(place * w) for place in (column, row) for f in (np.sin, np.cos) for w in omega]


def np_vit(image, p, vit):
    rows, columns = vit.patch_size
    down, right = vit.patch_stride or vit.patch_size
    kernel = p["embedding"]["kernel"].reshape(-1, p["embedding"]["kernel"].shape[-1])
    patches, fixed = [], []
    for i in range(0, image.shape[0] - rows + 1, down):
        for j in range(0, image.shape[1] - columns + 1, right):
            patches.append(image[i : i + rows, j : j + columns].ravel() @ kernel + p["embedding"]["bias"])
            fixed.append(np_sincos(i / down, j / right, vit.width))
    positions = p["pos_embedding"][0] if vit.positions == "learned" else np.array(fixed)
    tokens = [*np.array(patches) + positions[len(positions) - len(patches) :]]
    tokens = [*p["registers"][0], *tokens] if vit.registers else tokens
    if vit.class_token:
        tokens = [p["cls"][0, 0] + (positions[0] if vit.position_class_token else 0), *tokens]
    x = np.array(tokens)
    for i in range(vit.depth):
        x = np_block(x, p[f"encoderblock_{i}"], vit.num_heads, np_gelu if vit.activation == "gelu" else np_gelu_tanh)
    seen = x[-len(patches) :]
    pooled = {
        "cls": np_layer_norm(x[0], p["norm"]),
        "mean": np_layer_norm(seen.mean(0), p["norm"]),
        "gap": np_layer_norm(seen, p["norm"]).mean(0),
    }[vit.pool]
    return np_dense(np.tanh(np_dense(pooled, p["pre_logits"])) if vit.pre_logits else pooled, p["head"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "mean", "qkv_bias": False},
        {"pool": "gap", "class_token": False, "positions": "sincos2d", "pre_logits": True, "activation": "gelu_tanh"},
        {"registers": 3, "layer_scale": True},
        {"pool": "mean", "registers": 2, "position_class_token": False, "patch_stride": (3, 1)},
        {"pool": "gap", "class_token": False, "registers": 1},
    ],
    ids=["timm", "mean", "big_vision", "dinov2", "overlapping", "no class token"],
)
def test_vit_equals_numpy(options):
    module, x = tiny(**options), images()
    variables = random_variables(module, x)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    assert ("bias" in params["encoderblock_0"]["attn"]["key"]) == options.get("qkv_bias", True)
    expected = [np_vit(image, params, module) for image in x]
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-5, atol=1e-5)


def test_number_of_patches_and_positions():
    transreid = create_model("vit_s16", num_classes=0, image_size=(256, 128), patch_stride=12)
    assert (transreid.grid, transreid.prefix_positions) == ((21, 10), 1)
    assert create_model("vit_s16", num_classes=0, image_size=(256, 128)).grid == (16, 8)
    assert create_model("vit_s16_gap", num_classes=0, image_size=(224, 224)).prefix_positions == 0
    shapes = jax.eval_shape(transreid.init, jax.random.key(0), jnp.zeros((1, 256, 128, 3)))["params"]
    assert shapes["pos_embedding"].shape == (1, 1 + 21 * 10, 384)


def np_conv(x, kernel, stride):
    """Correlation of (B, H, W, C) zero-padded by half the kernel on all sides."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def np_norm(x, p, s):
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def np_resnet(x, p, s, stem, stages, strides):
    """`strides`: of the block's convolutions in its first and in later stages, such as [(1, 1), (2, 1)]."""

    def step(x, p, s, number, stride, name="conv", norm="bn"):
        return np_norm(np_conv(x, p[f"{name}{number}"]["kernel"], stride), p[f"{norm}{number}"], s[f"{norm}{number}"])

    x = np.maximum(step(x, p, s, 1, 2 if stem == "imagenet" else 1), 0)
    if stem == "imagenet":
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-1, -2))
    for stage, size in enumerate(stages):
        for i in range(size):
            name = f"layer{stage + 1}_{i}"
            q, r = p[name], s[name]
            inner = strides[min(stage, 1)] if i == 0 else strides[0]
            y = x
            for number, stride in enumerate(inner, 1):
                y = step(y, q, r, number, stride)
                y = np.maximum(y, 0) if number < len(inner) else y
            if "downsample_conv" in q:
                x = step(x, q, r, "", max(inner), "downsample_conv", "downsample_bn")
            x = np.maximum(y + x, 0)
    return np_dense(x.mean((1, 2)), p["fc"])


@pytest.mark.parametrize(
    ("block", "stem", "stages", "strides"),
    [
        ("basic", "cifar", (2, 1), [(1, 1), (2, 1)]),
        ("bottleneck", "imagenet", (1, 2), [(1, 1, 1), (1, 2, 1)]),
        ("basic", "cifar", (1, 1), [(1, 1), (1, 1)]),
    ],
    ids=["cifar", "imagenet", "last_stride=1"],
)
def test_resnet_equals_numpy(block, stem, stages, strides):
    module = tiny("resnet", block=block, stem=stem, stage_sizes=stages, last_stride=max(strides[1]))
    x = images(size=(18, 15))  # symmetric and "SAME" padding differ for the stem in height, for the pool in width
    variables = random_variables(module, x)
    p, s = (jax.tree.map(lambda a: np.asarray(a, np.float64), variables[c]) for c in ("params", "batch_stats"))
    expected = np_resnet(x, p, s, stem, stages, strides)
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-5, atol=1e-5)


def test_stem_is_right_at_the_borders():
    module, x = tiny("resnet", stem="imagenet"), images()
    variables = random_variables(module, x)
    _, state = jax.jit(functools.partial(module.apply, capture_intermediates=True))(variables, x)
    seen = state["intermediates"]
    p, s = (jax.tree.map(np.asarray, variables[c]) for c in ("params", "batch_stats"))
    conv = np_conv(x, p["conv1"]["kernel"], 2)
    norm = np_norm(conv, p["bn1"], s["bn1"])
    for got, expected in ((seen["conv1"]["__call__"][0], conv), (seen["bn1"]["__call__"][0], norm)):
        assert got.shape == expected.shape
        for border in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
            np.testing.assert_allclose(got[border], expected[border], rtol=1e-5, atol=1e-5)


# --- ResNet: batch statistics ----------------------------------------------------------------------------------------


def test_training_uses_and_updates_batch_statistics():
    module, x = tiny("resnet"), images(4)
    variables = random_variables(module, x)
    train = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
    logits, state = train(variables, x)
    conv = np_conv(x, np.asarray(variables["params"]["conv1"]["kernel"]), 1)
    old, new = variables["batch_stats"]["bn1"], state["batch_stats"]["bn1"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * conv.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * conv.var((0, 1, 2)), rtol=1e-5, atol=1e-6)
    other = {**variables, "batch_stats": jax.tree.map(lambda a: a + 1, variables["batch_stats"])}
    again, _ = train(other, x)
    np.testing.assert_array_equal(logits, again)
    assert np.abs(logits - apply(module, variables, x)).max() > 1e-3


def test_shared_batch_statistics_make_two_halves_equal_the_whole():
    x = images(4)
    alone, shared = tiny("resnet"), tiny("resnet", axis_name="devices")
    variables = random_variables(alone, x)

    def halves(module):
        run = functools.partial(module.apply, variables, train=True, mutable=["batch_stats"])
        return jax.jit(jax.vmap(run, axis_name="devices"))(x.reshape(2, 2, *x.shape[1:]))[0].reshape(4, -1)

    whole, _ = jax.jit(functools.partial(alone.apply, train=True, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(halves(shared), whole, rtol=1e-4, atol=1e-4)
    assert np.abs(halves(alone) - whole).max() > 1e-2


# --- ViT: names, remat, scan, dropout --------------------------------------------------------------------------------


def test_vit_parameter_names():
    params = random_variables(tiny(), images())["params"]
    names = {re.sub(r"encoderblock_\d+", "encoderblock_*", path) for path in flatten_dict(params, sep="/")}
    dense = [f"encoderblock_*/attn/{n}" for n in ("query", "key", "value", "out")]
    dense += ["encoderblock_*/mlp/fc1", "encoderblock_*/mlp/fc2", "embedding", "head"]
    norms = ["encoderblock_*/norm1", "encoderblock_*/norm2", "norm"]
    assert names == {
        "cls",
        "pos_embedding",
        *(f"{d}/{leaf}" for d in dense for leaf in ("kernel", "bias")),
        *(f"{n}/{leaf}" for n in norms for leaf in ("scale", "bias")),
    }


def test_query_key_and_value_read_one_and_the_same_array():
    module, x = tiny(), images()
    readers = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            readers.setdefault(id(args[0]), (args[0], []))[1].append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), x)
    groups = [paths for _, paths in readers.values()]
    for i in range(TINY_VIT["depth"]):
        assert [f"encoderblock_{i}/attn/{n}" for n in ("query", "key", "value")] in groups


@pytest.mark.parametrize(("remat", "scan"), [(True, False), (False, True), (True, True)])
def test_remat_and_scan_change_neither_outputs_nor_gradients(remat, scan):
    plain, other, x = tiny(), tiny(remat=remat, scan=scan), images()
    params = random_variables(plain, x)["params"]
    convert = stack_blocks if scan else dict
    shapes = jax.eval_shape(other.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, convert(params)) == jax.tree.map(lambda a: a.shape, shapes)

    expected, plain_grads = outputs_and_grads(plain)(params)
    got, got_grads = outputs_and_grads(other)(convert(params))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got_grads, convert(plain_grads))
    text = str(jax.make_jaxpr(outputs_and_grads(other))(convert(params)))
    assert ("remat" in text or "checkpoint" in text) == remat
    assert (re.search(r"\bscan\[", text) is not None) == scan


@functools.cache
def outputs_and_grads(module):
    def loss(params):
        logits = module.apply({"params": params}, images())
        return jnp.sum(jnp.sin(logits)), logits

    def run(params):
        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, grads

    return jax.jit(run)


def test_scanned_blocks_start_different():
    module = tiny(scan=True)
    initial = jax.jit(lambda key: module.init(key, images())["params"]["encoder"]["mlp"]["fc1"]["kernel"])
    kernel = np.asarray(initial(quick_key(0)))
    assert kernel.shape == (2, 12, 20)
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3
    assert 0.01 < kernel.std() < 0.03


@pytest.mark.parametrize("remat", [False, True])
def test_intercepted_layers_can_sow_under_scan(remat):
    plain, scanned, x = tiny(), tiny(scan=True, remat=remat), images()
    params = random_variables(plain, x)["params"]

    def sow(call, args, kwargs, context):
        if context.module.name == "fc2":
            context.module.sow("denoise", "power", jnp.mean(args[0] ** 2))
        return call(*args, **kwargs)

    def run(module, params):
        with nn.intercept_methods(sow):
            return jax.jit(lambda p: module.apply({"params": p}, x, mutable=["denoise"])[1]["denoise"])(params)

    separate, stacked = run(plain, params), run(scanned, stack_blocks(params))
    expected = [separate[f"encoderblock_{i}"]["mlp"]["fc2"]["power"][0] for i in range(2)]
    assert len(set(map(float, expected))) == 2
    np.testing.assert_allclose(stacked["encoder"]["mlp"]["fc2"]["power"][0], expected, rtol=1e-5)


def test_nothing_to_stack_is_an_error():
    with pytest.raises(ConfigError, match="encoderblock_0"):
        stack_blocks({"encoder": {}, "head": {}})


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_only_in_training(scan):
    module, x = tiny(dropout=0.3, scan=scan), images()
    variables = random_variables(module, x)
    same = apply(tiny(scan=scan), variables, x)
    np.testing.assert_array_equal(apply(module, variables, x), same)
    train = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={"dropout": key}))
    one, two, one_again = (np.asarray(train(quick_key(seed))) for seed in (0, 1, 0))
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - same).max() > 1e-3
    np.testing.assert_array_equal(one, one_again)


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_leaves_out_whole_branches_of_single_images(scan):
    module, x = tiny(drop_path=0.75, scan=scan), images(1)
    params = random_variables(tiny(), x)["params"]
    given = stack_blocks(params) if scan else params
    many = jnp.broadcast_to(x, (64, *x.shape[1:]))
    train = jax.jit(lambda key: module.apply({"params": given}, many, train=True, rngs={"dropout": key}))
    outputs = np.asarray(train(quick_key(0)))

    def with_second_block(attention, mlp):
        """The network whose second block's branches are multiplied: 0 leaves one out, 4 is one that was kept."""
        block = params["encoderblock_1"]
        block = {
            **block,
            "attn": {**block["attn"], "out": jax.tree.map(lambda a: attention * a, block["attn"]["out"])},
            "mlp": {**block["mlp"], "fc2": jax.tree.map(lambda a: mlp * a, block["mlp"]["fc2"])},
        }
        return apply(tiny(), {"params": {**params, "encoderblock_1": block}}, x)[0]

    expected = np.array([with_second_block(a, m) for a in (0, 4) for m in (0, 4)])
    distances = np.abs(outputs[:, None] - expected[None]).max(-1)
    assert distances.min(1).max() < 1e-4 < 1e-2 < np.sort(distances, 1)[:, 1].min()
    counts = np.bincount(distances.argmin(1), minlength=4)  # 9, 3, 3 and 1 in 16 on average
    assert counts.min() > 0 and counts[0] == counts.max() and 4 <= counts[2:].sum() <= 32
    np.testing.assert_array_equal(apply(module, {"params": given}, x), apply(tiny(scan=scan), {"params": given}, x))


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("vit", "bfloat16"), ("resnet", jnp.bfloat16)])
def test_bfloat16_computes_narrow_and_keeps_float32_parameters_and_logits(name, dtype):
    module, x = tiny(name, dtype=dtype), images()
    variables = random_variables(tiny(name), x)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    wide, narrow = apply(tiny(name), variables, x), apply(module, variables, x)
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()


@pytest.mark.parametrize(("name", "dtype"), [("vit", None), ("resnet", "float64")])
def test_float64_is_not_narrowed(name, dtype):
    x = images()
    variables = random_variables(tiny(name), x)
    single = apply(tiny(name), variables, x)
    with jax.enable_x64(True):
        double = apply(
            tiny(name, dtype=dtype),
            jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), variables),
            x.astype(np.float64),
        )
    assert double.dtype == np.float64
    assert 0 < np.abs(double - single).max() < 1e-4


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_size", "overrides", "message"),
    [
        ("vit_s17", (224, 224), {}, 'Unknown model "vit_s17". Did you mean "vit_s16"?'),
        ("vit_s16", (224, 224), {"dephth": 3}, 'no option "dephth". Did you mean "depth"?'),
        ("resnet18", (224, 224), {"pool": "mean"}, 'no option "pool"'),
        ("resnet18", (224, 224), {"parent": None}, 'no option "parent"'),
        ("vit", (224, 224), {"width": 8}, "needs patch_size, depth, num_heads, mlp_dim"),
        ("resnet", (224, 224), {}, "needs stage_sizes, block"),
        (
            "vit_s16",
            (224, 230),
            {},
            "width 230 is not divisible by the patch width 16; the nearest that are: 224 and 240",
        ),
        ("vit_s16", (8, 224), {}, "height 8 is not divisible by the patch height 16; the nearest that are: 16 and 16"),
        ("vit_s16", (224, 224), {"num_heads": 5}, "width 384 is not divisible by num_heads 5"),
        ("vit_s16", 224, {}, "image_size must be (height, width)"),
        ("vit_s16", (224, 0), {}, "image_size must be (height, width)"),
        ("vit_s16", (224, 224), {"patch_size": "16"}, "patch_size must be (height, width)"),
        ("vit_s16", (224, 224), {"depth": 0}, "depth must be a whole number, at least 1, got 0"),
        ("vit_s16", (224, 224), {"width": 38.4}, "width must be a whole number, at least 1, got 38.4"),
        ("vit_s16", (224, 224), {"pool": "means"}, 'Unknown pool "means". Did you mean "mean"?'),
        ("vit_s16", (224, 224), {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ("vit_s16", (224, 224), {"drop_path": -0.1}, "drop_path must be in [0, 1), got -0.1"),
        ("vit_s16", (224, 224), {"registers": -1}, "registers must be a number of tokens, 0 or more, got -1"),
        ("vit_s16", (224, 224), {"class_token": False}, 'choose "mean" or "gap"'),
        ("vit_s16", (224, 224), {"positions": "learnt"}, 'Unknown positions "learnt". Did you mean "learned"?'),
        ("vit_s16", (224, 224), {"positions": "sincos2d", "width": 30}, "a multiple of 4, at least 8; got 30"),
        ("vit_s16", (224, 224), {"patch_stride": 0}, "patch_stride must be (height, width)"),
        ("vit_s16", (8, 224), {"patch_stride": 12}, "height 8 is smaller than the patch height 16"),
        ("resnet50", (224, 224), {"last_stride": 3}, "last_stride must be 1 or 2, got 3"),
        ("vit_s16", (224, 224), {"dtype": "float33"}, 'dtype must be a floating dtype such as "float32"'),
        ("vit_s16", (224, 224), {"param_dtype": "int32"}, "param_dtype must be a floating dtype"),
        ("resnet18", (224, 224), {"block": "bottle"}, 'Unknown block "bottle". Did you mean "bottleneck"?'),
        ("resnet18", (224, 224), {"stem": "imagnet"}, 'Unknown stem "imagnet". Did you mean "imagenet"?'),
        ("resnet18", (224, 224), {"stage_sizes": (2, 0)}, "stage_sizes must be the number of blocks"),
        ("resnet18", (224, 224), {"stage_sizes": 2}, "stage_sizes must be the number of blocks"),
        ("resnet18", (224, 224), {"width": 0}, "width must be a number of channels, at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_traced(name, image_size, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model(name, num_classes=5, image_size=image_size, **overrides)


@pytest.mark.parametrize("name", ["vit_s16", "resnet18"])
def test_negative_number_of_classes(name):
    with pytest.raises(ConfigError, match="num_classes must be 0"):
        create_model(name, num_classes=-1, image_size=(224, 224))


@pytest.mark.parametrize("shape", [(2, 12, 8, 3), (8, 12, 3), (2, 8, 16, 3)])
def test_vit_refuses_images_of_another_size(shape):
    module = tiny()
    assert isinstance(module, ViT)
    with pytest.raises(ConfigError, match=re.escape(f"(batch, 8, 12, channels), got {shape}")):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_resnet_refuses_a_single_image():
    with pytest.raises(ConfigError, match=re.escape("got (8, 12, 3)")):
        jax.eval_shape(tiny("resnet").init, jax.random.key(0), jax.ShapeDtypeStruct((8, 12, 3), jnp.float32))
