"""VMamba: its scan and its depthwise convolution against NumPy, the network against its authors' numbers."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from drep_jax.core.layers import find_layers
from drep_jax.core.sites import select_sites
from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.selective_scan import selective_scan
from drep_jax.models.vmamba import SS2D
from drep_jax.weights.formats.vmamba import VMAMBA
from drep_jax.weights.translation import account, find_pieces, put_back
from tests.named_weights import named_weights

TINY = {"depths": (1, 1), "width": 8, "ssm_ratio": 1.5}
SIZE = (12, 20)


def tiny(num_classes=5, **overrides):
    return create_model("vmamba", num_classes=num_classes, image_size=SIZE, **{**TINY, **overrides})


def images(batch=2, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


@functools.cache
def variables_of(module):
    """Its weights by their paths, none at zero or one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *SIZE, 3), np.float32))
    paths = {path.replace("scale", "norm_weight"): leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    arrays = {path.replace("norm_weight", "scale"): array for path, array in named_weights(paths).items()}
    return unflatten_dict(arrays, sep="/")


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def apply(module, variables, x):
    return np.asarray(compiled(module)(variables, x))


# --- the scan --------------------------------------------------------------------------------------------------------


def scan_inputs(batch, rows, columns, states, channels, seed=0):
    rng = np.random.default_rng(seed)
    maps = (batch, rows, columns)
    return (
        rng.normal(size=(*maps, channels)),
        np.exp(rng.normal(size=(*maps, channels)) - 1),
        -np.exp(rng.normal(size=(states, channels))),
        rng.normal(size=(*maps, states)),
        rng.normal(size=(*maps, states)),
    )


def order(rows, columns, by_columns, reverse):
    """The pixels in the order in which they are read."""
    pixels = [(i, j) for i in range(rows) for j in range(columns)]
    if by_columns:
        pixels = [(i, j) for j in range(columns) for i in range(rows)]
    return pixels[::-1] if reverse else pixels


def np_scan(x, delta, a, b, c, by_columns=False, reverse=False):
    y = np.zeros_like(x)
    for n in range(len(x)):
        h = np.zeros_like(a)
        for i, j in order(*x.shape[1:3], by_columns, reverse):
            h = np.exp(delta[n, i, j] * a) * h + delta[n, i, j] * b[n, i, j][:, None] * x[n, i, j]
            y[n, i, j] = c[n, i, j] @ h
    return y


def sequential_scan(x, delta, a, b, c, by_columns=False, reverse=False):
    """The definition as a loop over all pixels, to be differentiated."""
    i, j = np.array(order(*x.shape[1:3], by_columns, reverse)).T

    def step(h, pixel):
        x, delta, b, c = pixel
        h = jnp.exp(delta[:, None] * a[None]) * h + (delta * x)[:, None] * b[..., None]
        return h, jnp.sum(c[..., None] * h, axis=1)

    inputs = tuple(jnp.moveaxis(t[:, i, j], 1, 0) for t in (x, delta, b, c))
    _, y = lax.scan(step, jnp.zeros((x.shape[0], *a.shape)), inputs)
    return jnp.zeros_like(x).at[:, i, j].set(jnp.moveaxis(y, 0, 1))


directions = st.fixed_dictionaries({"by_columns": st.booleans(), "reverse": st.booleans()})
sizes = st.tuples(*(st.integers(1, n) for n in (2, 5, 7, 2, 3)))


@settings(max_examples=3, deadline=None)
@given(shape=sizes, direction=directions)
@example(shape=(2, 1, 1, 1, 2), direction={"by_columns": False, "reverse": False})
@example(shape=(1, 1, 7, 2, 1), direction={"by_columns": True, "reverse": True})
def test_scan_and_its_gradients_equal_the_definition(shape, direction):
    inputs = scan_inputs(*shape)
    weights = np.cos(np.arange(inputs[0].size)).reshape(inputs[0].shape)

    def both(scan, inputs):
        def loss(inputs):
            y = scan(*inputs, **direction)
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
        return y, gradients

    with jax.enable_x64(True):
        run = jax.jit(lambda inputs: (both(selective_scan, inputs), both(sequential_scan, inputs)))
        (y, gradients), (_, expected) = run(inputs)
    np.testing.assert_allclose(y, np_scan(*inputs, **direction), rtol=1e-11, atol=1e-12)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_scan_gradients_equal_finite_differences():
    inputs = scan_inputs(1, 3, 2, 2, 2)
    rng = np.random.default_rng(1)
    along = [rng.normal(size=t.shape) for t in inputs]
    with jax.enable_x64(True):
        loss = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(selective_scan(*t, reverse=True)))))
        gradients = [np.asarray(g) for g in loss(tuple(inputs))]

    def at(step):
        moved = [t + step * d for t, d in zip(inputs, along, strict=True)]
        return np.sin(np_scan(*moved, reverse=True)).sum()

    slope = sum(float(np.sum(g * d)) for g, d in zip(gradients, along, strict=True))
    assert slope == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-7)


def test_long_scans_with_decays_that_underflow_stay_finite_and_right():
    x, delta, a, b, c = (t.astype(np.float32) for t in scan_inputs(1, 40, 50, 1, 3))
    delta[..., 0], delta[..., 1] = 60.0, 1e-6  # forgets everything at each step; forgets almost nothing in 2,000

    def loss(inputs):
        y = selective_scan(*inputs)
        return jnp.sum(y**2), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((x, delta, a, b, c))
    np.testing.assert_allclose(y, np_scan(*(t.astype(np.float64) for t in (x, delta, a, b, c))), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(g).all() for g in gradients)


def test_state_is_float32_when_the_inputs_are_bfloat16():
    inputs = [jnp.asarray(t, jnp.bfloat16) for t in scan_inputs(1, 8, 9, 1, 4)]
    y = jax.jit(selective_scan)(*inputs)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np_scan(*(np.asarray(t, np.float64) for t in inputs)), rtol=1e-5, atol=1e-5)


def test_memory_of_forward_and_backward_is_linear_in_the_number_of_pixels():
    def temporaries(side):
        shapes = [jax.ShapeDtypeStruct(t.shape, jnp.float32) for t in scan_inputs(1, side, side, 1, 16)]
        gradient = jax.grad(lambda *t: jnp.sum(selective_scan(*t) ** 2), argnums=range(5))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (side**2 * 16 * 4)

    small, large = temporaries(32), temporaries(128)  # 1,024 and 16,384 pixels
    assert large < 1.1 * small and large < 20


def test_scan_takes_as_many_steps_as_a_row_and_a_column_have_pixels():
    text = str(jax.make_jaxpr(selective_scan)(*(t.astype(np.float32) for t in scan_inputs(1, 30, 40, 1, 2))))
    assert sum(map(int, re.findall(r"length=(\d+)", text))) == 70
    assert "while" not in text


# --- depthwise convolution -------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(
    maps=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
)
def test_depthwise_convolution_and_its_gradients_equal_the_operator_of_xla(maps, kernel, padding):
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, *maps, 3)), rng.normal(size=(*kernel, 1, 3))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}

    def both(conv):
        run = jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k, (1, 1), padding, **options))), (0, 1))
        return conv(x, k, (1, 1), padding, **options), *run(x, k)

    with jax.enable_x64(True):
        got, expected = (jax.jit(both, static_argnums=0)(conv) for conv in (depthwise_conv, lax.conv_general_dilated))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"padding": "SAME"},
        {"kernel_dilation": 2},
        {"input_dilation": 2},
        {"feature_group_count": 2},
        {"features": 8},
        {},
    ],
)
def test_other_convolutions_are_those_of_xla(options):
    options = {"features": 4, "feature_group_count": 4, "padding": ((1, 1), (1, 1)), **options}
    module = nn.Conv(kernel_size=(3, 3), **options)
    x = images()[..., :1].repeat(4, -1) * np.arange(1, 5, dtype=np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    got = apply(module.clone(conv_general_dilated=depthwise_conv), variables, x)
    np.testing.assert_allclose(got, apply(module, variables, x), rtol=1e-5, atol=1e-5)


def test_depthwise_convolution_adds_up_in_float32():
    x = jnp.full((1, 3, 3, 1), 1.0, jnp.bfloat16)
    kernel = jnp.full((3, 3, 1, 1), 2.0**-8, jnp.bfloat16).at[0, 0].set(1.0)  # 1 + 2⁻⁸ is 1 in bfloat16
    y = depthwise_conv(x, kernel, (1, 1), ((0, 0), (0, 0)), feature_group_count=1)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0, 0]) == 1.0 + 8 * 2.0**-8


# --- the network -----------------------------------------------------------------------------------------------------

GOLDEN_CONFIG = {"depths": (1, 2), "width": 16, "ssm_ratio": 1.5, "d_state": 2, "num_classes": 5}


def golden_images():
    """Maps of 8 by 10 and 4 by 5 pixels."""
    return images(2, (29, 38))


# What the authors' code gives (`python -m tests.parity.vmamba_reference`).
GOLDEN_FEATURES = [
    [
        -0.1507447,
        0.3239526,
        0.3947147,
        1.5127575,
        -0.749869,
        0.6248363,
        1.0334059,
        0.5455146,
        0.126497,
        0.3850047,
        0.3647994,
        0.1807518,
        0.5144791,
        -0.274307,
        1.3094134,
        -0.623413,
        0.394918,
        -0.4016388,
        0.3255228,
        0.0381012,
        -0.5606056,
        -1.4059694,
        -0.6716136,
        1.5049422,
        -1.1808245,
        -0.69251,
        -0.1496119,
        -0.1182654,
        -1.2373691,
        -0.3905547,
        0.2756478,
        -0.7381911,
    ],
    [
        -0.2870319,
        0.4505908,
        0.1035139,
        1.7677656,
        -0.8509892,
        0.7154357,
        1.2863456,
        0.6040618,
        0.0999375,
        0.5932999,
        0.3485251,
        -0.0139562,
        0.459297,
        -0.2654604,
        0.8207761,
        -0.5603861,
        -0.0244147,
        -0.2666167,
        0.47398,
        -0.3753157,
        -0.6369287,
        -1.3533933,
        -0.3711274,
        1.7812523,
        -1.0711619,
        -0.7862734,
        -0.1268658,
        0.1282583,
        -1.1640116,
        -0.3636636,
        -0.0619,
        -0.3594685,
    ],
]
GOLDEN_LOGITS = [
    [0.4151484, 0.0199026, -0.4632553, 1.1805933, 0.0187618],
    [0.1486466, 0.0162054, -0.5478018, 1.3436216, -0.1870452],
]


@functools.cache
def golden_model():
    """The module, its variables from the authors' names, the places of these, and the authors' tensors."""
    module = create_model("vmamba", image_size=(29, 38), **GOLDEN_CONFIG)
    shapes = jax.eval_shape(module.init, jax.random.key(0), golden_images())
    shapes = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    pieces = find_pieces(VMAMBA, module, shapes)
    blank = put_back(pieces, {path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
    tensors = named_weights({name: array.shape for name, array in blank.items()})
    found = account(pieces, shapes, tensors, VMAMBA.ignored)
    assert not (found.missing or found.unexpected or found.shaped)
    return module, unflatten_dict(found.arrays, sep="/"), pieces, tensors, found.arrays


def test_authors_outputs_from_the_authors_names():
    module, variables, *_ = golden_model()
    headless = module.clone(num_classes=0)
    without = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "head"}}
    both = jax.jit(lambda with_head, without, x: (headless.apply(without, x), module.apply(with_head, x)))
    features, logits = both(variables, without, golden_images())
    np.testing.assert_allclose(features, np.array(GOLDEN_FEATURES), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, np.array(GOLDEN_LOGITS), rtol=1e-4, atol=1e-5)


def test_export_is_the_inverse_of_import():
    module, _, pieces, tensors, arrays = golden_model()
    assert VMAMBA.recognizes(tensors) and VMAMBA.family is type(module)
    back = put_back(pieces, arrays)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True, err_msg=name)


def test_names_in_the_checkpoint_are_the_authors():
    _, _, _, tensors, _ = golden_model()
    shapes = {name: array.shape for name, array in tensors.items() if not name.startswith("layers.1.")}
    op = "layers.0.blocks.0.op."
    assert shapes == {
        "patch_embed.0.weight": (8, 3, 3, 3),
        "patch_embed.0.bias": (8,),
        "patch_embed.2.weight": (8,),
        "patch_embed.2.bias": (8,),
        "patch_embed.5.weight": (16, 8, 3, 3),
        "patch_embed.5.bias": (16,),
        "patch_embed.7.weight": (16,),
        "patch_embed.7.bias": (16,),
        "layers.0.blocks.0.norm.weight": (16,),
        "layers.0.blocks.0.norm.bias": (16,),
        f"{op}in_proj.weight": (24, 16),
        f"{op}conv2d.weight": (24, 1, 3, 3),
        f"{op}x_proj_weight": (4, 5, 24),
        f"{op}dt_projs_weight": (4, 24, 1),
        f"{op}dt_projs_bias": (4, 24),
        f"{op}A_logs": (96, 2),
        f"{op}Ds": (96,),
        f"{op}out_norm.weight": (24,),
        f"{op}out_norm.bias": (24,),
        f"{op}out_proj.weight": (16, 24),
        "layers.0.blocks.0.norm2.weight": (16,),
        "layers.0.blocks.0.norm2.bias": (16,),
        "layers.0.blocks.0.mlp.fc1.weight": (64, 16),
        "layers.0.blocks.0.mlp.fc1.bias": (64,),
        "layers.0.blocks.0.mlp.fc2.weight": (16, 64),
        "layers.0.blocks.0.mlp.fc2.bias": (16,),
        "layers.0.downsample.1.weight": (32, 16, 3, 3),
        "layers.0.downsample.1.bias": (32,),
        "layers.0.downsample.3.weight": (32,),
        "layers.0.downsample.3.bias": (32,),
        "classifier.norm.weight": (32,),
        "classifier.norm.bias": (32,),
        "classifier.head.weight": (5, 32),
        "classifier.head.bias": (5,),
    }


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    def loss(variables):
        return jnp.sum(jnp.sin(tiny().apply(variables, images())))

    for path, gradient in flatten_dict(jax.jit(jax.grad(loss))(variables_of(tiny())), sep="/").items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


def test_remat_marks_every_block_and_changes_nothing():
    plain, other, x = tiny(depths=(1,)), tiny(depths=(1,), remat=True), images()
    variables = variables_of(plain)
    np.testing.assert_allclose(apply(other, variables, x), apply(plain, variables, x), rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(tiny(remat=True).apply)(variables_of(tiny()), x))
    assert len(re.findall(r"\b(?:remat2?|checkpoint)\[", text)) == 2


def test_initial_values_make_steps_between_a_thousandth_and_a_tenth():
    mix = SS2D(inner=12, rank=2, d_state=3)
    initial = jax.jit(lambda key: mix.init(key, jnp.zeros((1, 2, 2, 4)))["params"])(jax.random.key(0, impl="rbg"))
    steps = np.log1p(np.exp(initial["dt_proj_2"]["bias"]))
    assert 0.00099 < steps.min() < steps.max() < 0.101 and steps.max() > 3 * steps.min()
    kernel = np.abs(initial["dt_proj_1"]["kernel"])
    assert 0.5 < kernel.max() * 2**0.5 < 1.0
    np.testing.assert_allclose(np.exp(initial["a_log"][1, :, 4]), [1, 2, 3], rtol=1e-6)
    np.testing.assert_array_equal(initial["skip"], 1.0)


@pytest.mark.parametrize("size", [(1, 1), (17, 21)])
def test_images_of_any_size_each_by_itself(size):
    variables, x = variables_of(tiny()), images(2, size)
    logits = apply(tiny(), variables, x)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    x[1] = 0
    alone = apply(tiny(), variables, x)
    np.testing.assert_array_equal(alone[0], logits[0])
    assert np.abs(alone[1] - logits[1]).max() > 1e-3


def test_dropped_branches_in_training_only_and_image_by_image():
    module, variables, x = tiny(drop_path=0.5), variables_of(tiny()), images(1).repeat(16, 0)
    still, plain = (str(jax.make_jaxpr(m.apply)(variables, x)) for m in (module, tiny()))
    assert still == plain
    train = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={"dropout": key}))
    one, two, again = (np.asarray(train(jax.random.key(seed, impl="rbg"))) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3
    # The first block is never dropped; of the last one's two branches either, both or none, so there are four outcomes.
    assert 2 <= len(np.unique(one[:, 0].round(4))) <= 4


def test_bfloat16_computes_narrow_and_keeps_float32_parameters_and_logits():
    plain, module, x = tiny(depths=(1,)), tiny(depths=(1,), dtype="bfloat16"), images()
    variables = variables_of(plain)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    wide, narrow = apply(plain, variables, x), apply(module, variables, x)
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()


def test_float64_is_not_narrowed():
    plain, module, x = tiny(depths=(1,)), tiny(depths=(1,), dtype=None), images()
    variables = variables_of(plain)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), variables)
        double = apply(module, wide, x.astype(np.float64))
    assert double.dtype == np.float64
    assert 0 < np.abs(double - apply(plain, variables, x)).max() < 1e-4


# --- sites -----------------------------------------------------------------------------------------------------------


def test_every_linear_map_can_be_a_site_and_the_mlps_are_the_default():
    layers = find_layers(tiny(), jnp.zeros((1, *SIZE, 3)))
    assert not [layer.name for layer in layers if layer.refusal]
    block = ["in_proj", "conv", "x_proj", *(f"dt_proj_{k}" for k in range(4)), "out_proj"]
    blocks = [[*(f"{b}/ss2d/{n}" for n in block), f"{b}/mlp/fc1", f"{b}/mlp/fc2"] for b in ("layer1_0", "layer2_0")]
    assert [layer.name for layer in layers] == [
        "stem_conv1",
        "stem_conv2",
        *blocks[0],
        "downsample1_conv",
        *blocks[1],
        "head",
    ]
    default = [site.name for site in select_sites(layers)]
    assert default == [f"{b}/mlp/{n}" for b in ("layer1_0", "layer2_0") for n in ("fc1", "fc2")]
    (conv,) = select_sites(layers, "layer1_0/ss2d/conv")
    assert (conv.kind, conv.groups, conv.width) == ("patch", 12, 9)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (2, 0)}, "depths must be the number of blocks of each stage, got (2, 0)"),
        ({"depths": 2}, "depths must be the number of blocks of each stage, got 2"),
        ({"width": 7}, "width must be an even number of channels (the stem starts with half), got 7"),
        ({"width": 0}, "width must be an even number"),
        ({"ssm_ratio": 0}, "ssm_ratio times width must give at least one channel, got 0"),
        ({"mlp_ratio": "4"}, "mlp_ratio times width must give at least one channel, got '4'"),
        ({"d_state": 0}, "d_state must be a whole number, at least 1, got 0"),
        ({"drop_path": 1.0}, "drop_path must be in [0, 1), got 1.0"),
        ({"num_classes": -1}, "num_classes must be 0 (no head: features) or more, got -1"),
        ({"droppath": 0.1}, 'no option "droppath". Did you mean "drop_path"?'),
    ],
)
def test_bad_input_is_refused_before_anything_is_traced(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny(**overrides)


def test_a_single_image_is_refused():
    with pytest.raises(ConfigError, match=re.escape("got (12, 20, 3)")):
        jax.eval_shape(tiny().init, jax.random.key(0), jax.ShapeDtypeStruct((*SIZE, 3), jnp.float32))
