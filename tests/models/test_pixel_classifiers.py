"""FCNs and SegFormers: parameters by table, the networks against NumPy, what is dropped in training, bad input."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from drep_jax import find_sites
from drep_jax.core.layers import find_layers
from drep_jax.errors import ConfigError
from drep_jax.models import MODELS, create_model, resize_bilinear, segformer
from drep_jax.models.fcn import FCNHead
from drep_jax.models.resnet import makers
from drep_jax.models.segformer import SegFormerHead
from tests.models.test_models import np_dense, np_gelu, np_norm, quick_key, random_variables
from tests.pixel_classifiers import PIXEL_CLASSIFIERS, abstract, pictures, tiny

SIZE = (37, 50)  # maps of 10 × 13, 5 × 7, 3 × 4 and 2 × 2: rows and columns are left over wherever keys are reduced
CASES = [
    pytest.param(name, row, marks=[pytest.mark.slow] if row[1] > 23e6 else [], id=f"{name}-{row[0]}")
    for name, rows in PIXEL_CLASSIFIERS.items()
    for row in rows
]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_parameters_are_those_of_the_public_networks(name, row):
    options, parameters, statistics = row
    module = create_model(name, **{"num_classes": 150, "image_size": (64, 64), **options})
    images = jax.ShapeDtypeStruct((2, 97, 131, 3), jnp.float32)
    logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    if statistics is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == statistics
    rows, columns = (25, 33) if name.startswith("segformer") else (13, 17)
    assert (logits.shape, logits.dtype) == ((2, rows, columns, module.num_classes), jnp.float32)


def test_the_table_has_every_entry():
    assert set(PIXEL_CLASSIFIERS) == {name for name in MODELS if name.startswith(("fcn", "segformer"))}


# --- NumPy oracles ---------------------------------------------------------------------------------------------------


def np_conv(x, p, stride=1, dilation=1, pad=None):
    """Any square window, grouped if the kernel has one input channel; padded by half the window unless said otherwise."""
    kernel = p["kernel"]
    size = (kernel.shape[0] - 1) * dilation + 1
    pad = size // 2 if pad is None else pad
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride, :, ::dilation, ::dilation]
    depthwise = kernel.shape[2] == 1 and x.shape[-1] > 1
    y = np.einsum(
        "nhwcij,ijc->nhwc" if depthwise else "nhwcij,ijco->nhwo", windows, kernel[:, :, 0] if depthwise else kernel
    )
    return y + p.get("bias", 0)


def np_resize(x, size):
    for axis, wanted in zip((1, 2), size, strict=True):
        length = x.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = x.take(low, axis) * (1 - weight) + x.take(np.minimum(low + 1, length - 1), axis) * weight
    return x


def np_layer_norm(x, p, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def np_fcn(x, p, s, module):
    """(logits, logits of the auxiliary head)."""

    def step(x, where, conv, norm, act=True, **options):
        q, r = (functools.reduce(dict.__getitem__, where, tree) for tree in (p, s))
        y = np_norm(np_conv(x, q[conv], **options), q[norm], r[norm])
        return np.maximum(y, 0) if act else y

    mmseg = module.implementation == "mmseg"
    if mmseg:
        for i in (1, 2, 3):
            x = step(x, (), f"stem_conv{i}", f"stem_bn{i}", stride=2 if i == 1 else 1)
    else:
        x = step(x, (), "conv1", "bn1", stride=2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-1, -2))
    features = []
    for i, size in enumerate(module.stage_sizes):
        for j in range(size):
            at, stride = (f"layer{i + 1}_{j}",), 2 if (i, j) == (1, 0) else 1
            dilation = {(2, False): 2, (3, True): 2, (3, False): 4}.get((i, j == 0), 1)
            y = step(x, at, "conv1", "bn1")
            y = step(y, at, "conv2", "bn2", stride=stride, dilation=dilation)
            y = step(y, at, "conv3", "bn3", act=False)
            x = step(x, at, "downsample_conv", "downsample_bn", act=False, stride=stride) if j == 0 else x
            x = np.maximum(x + y, 0)
        features.append(x)
    y = step(x, ("decode_head",), "conv1", "bn1")
    if mmseg:
        y = step(y, ("decode_head",), "conv2", "bn2")
        y = step(np.concatenate([x, y], axis=-1), ("decode_head",), "conv_cat", "bn_cat")
    other = step(features[2], ("auxiliary_head",), "conv1", "bn1")
    return np_dense(y, p["decode_head"]["classifier"]), np_dense(other, p["auxiliary_head"]["classifier"])


def np_attention(x, p, heads, reduction, eps):
    batch, _, _, width = x.shape
    kv = x
    if reduction > 1:
        kv = np_layer_norm(np_conv(x, p["sr"], stride=reduction, pad=0), p["sr_norm"], eps)
    kv = kv.reshape(batch, -1, width)
    q, k, v = np_dense(x.reshape(batch, -1, width), p["query"]), np_dense(kv, p["key"]), np_dense(kv, p["value"])
    mixed = []
    for h in range(heads):
        part = np.s_[:, :, h * width // heads : (h + 1) * width // heads]
        weights = np.exp(q[part] @ k[part].swapaxes(1, 2) / np.sqrt(width / heads))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v[part])
    return np_dense(np.concatenate(mixed, -1), p["out"]).reshape(x.shape)


EPS = {"mmseg": (1e-6, 1e-6), "nvlabs": (1e-6, 1e-5), "transformers": (1e-5, 1e-5)}


def np_segformer(x, p, s, module):
    block_eps, embedding_eps = EPS[module.implementation]
    features = []
    for i in range(4):
        x = np_conv(x, p[f"patch_embed{i + 1}"], stride=2 if i else 4)
        x = np_layer_norm(x, p[f"patch_norm{i + 1}"], embedding_eps)
        for j in range(module.depths[i]):
            q = p[f"block{i + 1}_{j}"]
            y = np_layer_norm(x, q["norm1"], block_eps)
            x = x + np_attention(y, q["attn"], module.num_heads[i], module.reductions[i], embedding_eps)
            y = np_dense(np_layer_norm(x, q["norm2"], block_eps), q["mlp"]["fc1"])
            x = x + np_dense(np_gelu(np_conv(y, q["mlp"]["dwconv"]["dwconv"])), q["mlp"]["fc2"])
        x = np_layer_norm(x, p[f"norm{i + 1}"], block_eps)
        features.append(x)
    h = p["decode_head"]
    maps = []
    for i, y in enumerate(features, 1):
        y = np_dense(y, h[f"linear{i}"])
        if module.implementation == "mmseg":
            y = np.maximum(np_norm(y, h[f"linear{i}_bn"], s["decode_head"][f"linear{i}_bn"]), 0)
        maps.append(np_resize(y, features[0].shape[1:3]))
    fused = np.concatenate(maps, -1) @ np.concatenate([h[f"fuse{i}"]["kernel"] for i in (1, 2, 3, 4)])
    return np_dense(np.maximum(np_norm(fused, h["fuse_bn"], s["decode_head"]["fuse_bn"]), 0), h["classifier"])


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("implementation", ["mmseg", "torchvision"])
def test_fcn_equals_numpy(implementation):
    module, x = tiny("fcn", implementation=implementation, dropout=0.0), pictures(SIZE)
    variables = random_variables(module, x)
    expected, other = np_fcn(x.astype(np.float64), wide(variables["params"]), wide(variables["batch_stats"]), module)
    logits = jax.jit(module.apply)(variables, x)
    assert logits.shape == (2, 5, 7, 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert other.shape == expected.shape and np.ptp(other) > 0


@pytest.mark.parametrize("implementation", ["mmseg", "nvlabs"])
def test_segformer_equals_numpy(implementation):
    module, x = tiny("segformer", implementation=implementation), pictures(SIZE)
    variables = random_variables(module, x)
    expected = np_segformer(x.astype(np.float64), wide(variables["params"]), wide(variables["batch_stats"]), module)
    logits = jax.jit(module.apply)(variables, x)
    assert logits.shape == (2, 10, 13, 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", EPS)
def test_eps_of_the_norms(implementation):
    module, seen = tiny("segformer", implementation=implementation), {}

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            seen[context.module.path[-1]] = seen.get(context.module.path[-1], set()) | {context.module.epsilon}
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        abstract(module)
    block_eps, embedding_eps = EPS[implementation]
    names = [*(f"{kind}{i}" for kind in ("norm", "patch_norm") for i in (1, 2, 3, 4)), "sr_norm"]
    assert seen == {name: {embedding_eps if "_" in name else block_eps} for name in names}


def test_resizing_equals_numpy_larger_and_smaller():
    x = pictures((6, 9))
    sizes = [(6, 9), (12, 18), (24, 36), (11, 17), (13, 10), (3, 4), (1, 1), (5, 30)]
    all_sizes = jax.jit(lambda x: [resize_bilinear(x, size) for size in sizes])(x)
    for size, resized in zip(sizes, all_sizes, strict=True):
        np.testing.assert_allclose(resized, np_resize(x.astype(np.float64), size), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_queries_in_blocks_give_the_same_and_the_same_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 8)), jnp.float32) for n in (23, 6, 6))

    def both():
        attend = functools.partial(segformer._attend, num_heads=2)
        return jax.jit(attend)(q, k, v), *jax.jit(jax.grad(lambda *a: (attend(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

    whole = both()
    monkeypatch.setattr(segformer, "LARGEST_SCORES", 60)
    blocks = str(jax.make_jaxpr(functools.partial(segformer._attend, num_heads=2))(q, k, v))
    assert "scan" in blocks and "[2,2,5,6]" in blocks.replace("f32", "")  # five queries of each head at once
    for one, other in zip(whole, both(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_channels", [True, False])
@pytest.mark.parametrize("kind", [FCNHead, SegFormerHead])
def test_dropout_leaves_out_channels_or_numbers(kind, whole_channels):
    """Seen at what the classifier reads, with a shift of the last norm that keeps it above zero."""
    x = pictures((3, 4), batch=4)
    if kind is FCNHead:
        conv, norm = makers(False, None, None, jnp.float32)
        x, last = np.tile(x, (1, 1, 1, 16)), "bn1"
        head = FCNHead(0, 1, False, 0.5, whole_channels, conv, norm)
    else:
        x, last = [x, x[:, :2, :2]], "fuse_bn"
        head = SegFormerHead(0, 12, True, whole_channels, 0.5)
    variables = head.init({"params": quick_key(0)}, x, False)
    variables["params"][last]["bias"] += 20.0
    apply = functools.partial(head.apply, variables, x, rngs={"dropout": quick_key(0)}, mutable=["batch_stats"])
    maps = np.asarray(apply(True)[0])
    zero = (maps == 0).reshape(4, 12, 12)
    assert 0.3 < zero.mean() < 0.7 and (zero == zero[:, :1]).all() == whole_channels
    assert (np.asarray(apply(False)[0]) > 0).all()


@pytest.mark.parametrize(
    ("name", "implementation", "whole_channels"),
    [
        ("fcn", "mmseg", True),
        ("fcn", "torchvision", False),
        ("segformer", "mmseg", True),
        ("segformer", "nvlabs", True),
        ("segformer", "transformers", False),
    ],
)
def test_what_dropout_leaves_out_depends_on_the_implementation(name, implementation, whole_channels):
    heads = []

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, FCNHead | SegFormerHead):
            heads.append((context.module.whole_channels, context.module.dropout))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        abstract.__wrapped__(tiny(name, implementation=implementation))  # traced anew
    assert heads == [(whole_channels, 0.1)] * (2 if name == "fcn" else 1)


@pytest.mark.parametrize("name", ["fcn", pytest.param("segformer", marks=pytest.mark.slow)])
def test_training_reaches_every_parameter_and_evaluation_returns_one_map(name):
    module, x = tiny(name), pictures((32, 64))  # with a single key there would be no choice among keys
    variables = random_variables(module, x)

    def loss(params):
        rngs = {"dropout": quick_key(1)}
        outputs, state = module.apply(
            {**variables, "params": params}, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        assert isinstance(outputs, tuple) == (name == "fcn")
        return sum(jnp.sum(logits**2) for logits in jax.tree.leaves(outputs)), state

    gradients, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert np.isfinite(gradient).all(), path
        # A bias of the keys adds the same to all scores of a query, which the softmax ignores.
        assert np.abs(gradient).max() > 0 or path.endswith("key/bias"), path
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, state["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    plain = jax.eval_shape(functools.partial(tiny(name, dropout=0.0).apply, train=False), variables, x)
    assert isinstance(plain, jax.ShapeDtypeStruct)


def test_drop_path_leaves_out_branches_of_single_images():
    """With a rate next to 1 the last block adds nothing, and is the identity for almost every image."""
    module = tiny("segformer", 0, depths=(1, 1, 1, 1), drop_path=0.999, dropout=0.0)
    x = pictures((32, 32), batch=8)
    variables = random_variables(module, x)
    apply = functools.partial(module.apply, train=True, mutable=["batch_stats"], rngs={"dropout": quick_key(0)})
    changed = jax.tree.map(lambda a: a, variables)
    changed["params"]["block4_0"] = jax.tree.map(lambda a: 2 * a, variables["params"]["block4_0"])
    run = jax.jit(lambda v: apply(v, x)[0])
    np.testing.assert_array_equal(run(variables), run(changed))
    changed["params"]["block1_0"] = jax.tree.map(lambda a: 2 * a, variables["params"]["block1_0"])
    assert np.abs(run(variables) - run(changed)).max() > 1e-3  # the first block has the rate 0


# --- sites -----------------------------------------------------------------------------------------------------------


def test_the_auxiliary_head_is_in_the_tree_and_no_site():
    module = tiny("fcn")
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    assert "auxiliary_head" in abstract(module)["params"]
    layers = [layer.name for layer in find_layers(module, images)]
    assert "decode_head/classifier" in layers and not [name for name in layers if "auxiliary" in name]
    assert "auxiliary_head" not in abstract(tiny("fcn", auxiliary=False))["params"]


def test_default_sites_are_the_linears_of_the_mlps_and_attention_has_two_inputs():
    module = tiny("segformer")
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    names = [layer.name for site in find_sites(module, images) for layer in site.layers]
    assert names == [f"block{i}_{j}/mlp/fc{k}" for i, j in ((1, 0), (2, 0), (3, 0), (4, 0)) for k in (1, 2)]
    sites = [{layer.name.split("/")[-1] for layer in s.layers} for s in find_sites(module, images, pattern=".*attn.*")]
    assert [site for site in sites if "key" in site] == [{"key", "value"}] * 3 + [{"query", "key", "value"}]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fcn_r50", {"implementation": "mmsg"}, 'Unknown implementation "mmsg". Did you mean "mmseg"?'),
        ("fcn_r50", {"stage_sizes": (3, 4, 6)}, "stage_sizes must be the number of blocks of each of 4 stages"),
        ("fcn_r50", {"width": 7}, "width must be an even number of channels"),
        ("fcn_r50", {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ("fcn_r50", {"num_classes": -2}, "num_classes must be 0"),
        ("segformer_b0", {"implementation": "nvidia"}, 'Unknown implementation "nvidia"'),
        ("segformer_b0", {"widths": (32, 64, 160)}, "widths must be 4 whole numbers"),
        ("segformer_b0", {"num_heads": (3, 2, 5, 8)}, "Stage 1 is 32 wide, which 3 heads do not divide"),
        ("segformer_b0", {"mlp_ratio": 0}, "mlp_ratio must be a whole number"),
        ("segformer_b0", {"head_width": (256, 256, 1)}, "head_width must be a number of channels, or two"),
        ("segformer_b0", {"drop_path": True}, "drop_path must be in [0, 1), got True"),
        ("segformer_b0", {"depths": 2}, "depths must be 4 whole numbers"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model(name, **{"num_classes": 5, "image_size": (64, 64), **options})


def test_images_that_are_too_small_or_none_are_refused():
    with pytest.raises(
        ConfigError, match=re.escape("28 × 64 pixels are too small for this SegFormer: in stage 1 they are 7 × 16")
    ):
        abstract(tiny("segformer"), (28, 64))
    assert abstract(tiny("segformer"), (29, 29))
    for name in ("fcn", "segformer"):
        with pytest.raises(
            ConfigError, match=re.escape("takes images of shape (batch, height, width, channels), got (8, 12, 3)")
        ):
            jax.eval_shape(tiny(name).init, jax.random.key(0), jax.ShapeDtypeStruct((8, 12, 3), jnp.float32))
