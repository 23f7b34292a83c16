"""The product computes what the convolution computes, in both directions, and leaves to it what is no product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from drep_jax.core.layers import find_layers
from drep_jax.models.activations import gelu
from drep_jax.models.pointwise import pointwise_conv, whole_window_conv
from drep_jax.models.resnet import ResNet
from tests.trees import normal

NAMES = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("size", "strides", "padding", "options", "product"),
    [
        (1, (1, 1), ((0, 0), (0, 0)), {}, True),
        (1, (2, 3), "VALID", {}, True),
        (1, (2, 2), ((0, 0), (0, 0)), {}, True),
        (1, (2, 1), ((1, 0), (0, 0)), {}, False),
        (3, (1, 1), ((1, 1), (1, 1)), {}, False),
        (1, (1, 1), ((0, 0), (0, 0)), {"feature_group_count": 2}, False),
        (1, (1, 1), ((0, 0), (0, 0)), {"lhs_dilation": (2, 1)}, False),
    ],
)
def test_value_and_gradients_are_those_of_the_convolution(size, strides, padding, options, product):
    groups = options.get("feature_group_count", 1)
    x, kernel = normal(0, (2, 5, 7, 4)), normal(1, (size, size, 4 // groups, 6))
    options = {"dimension_numbers": NAMES, **options}

    def both(conv):
        def loss(x, kernel):
            y = conv(x, kernel, strides, padding, **options)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    jax.tree_util.tree_map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        both(pointwise_conv),
        both(lax.conv_general_dilated),
    )
    gradients = jax.grad(lambda x, k: pointwise_conv(x, k, strides, padding, **options).sum(), argnums=(0, 1))
    assert str(jax.make_jaxpr(gradients)(x, kernel)).count("conv_general_dilated[") == (1 if product else 3)


def test_the_pointwise_layers_of_a_resnet_use_it_and_stay_sites():
    net = ResNet(stage_sizes=(1, 1), block="bottleneck", num_classes=3, width=4)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    layers = find_layers(net, images)
    assert not any(layer.refusal for layer in layers)
    wide = [layer for layer in layers if layer.kind == "conv" and not layer.window.single]
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    gradients = jax.grad(lambda v, x: net.apply(v, x).sum())
    convolutions = sum(layer.kind == "conv" for layer in layers)
    # The images need no gradient, so the stem's convolution has one of its kernel only.
    expected = convolutions + 2 * len(wide) - 1
    assert str(jax.make_jaxpr(gradients)(variables, images)).count("conv_general_dilated[") == expected


def test_gelu():
    x = jnp.linspace(-6.0, 6.0, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    half = x.astype(jnp.bfloat16)
    assert gelu(half).dtype == jnp.bfloat16
    np.testing.assert_allclose(gelu(half).astype(jnp.float32), gelu(half.astype(jnp.float32)), rtol=8e-3)


@pytest.mark.parametrize(
    ("window", "padding", "product"),
    [((3, 4), "VALID", True), ((3, 4), ((0, 0), (1, 0)), False), ((2, 4), "VALID", False)],
)
def test_a_window_of_the_whole_maps_is_a_product(window, padding, product):
    x, kernel = normal(0, (5, 3, 4, 2)), normal(1, (*window, 2, 6))
    expected = lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NAMES)
    run = jax.jit(lambda x, kernel: whole_window_conv(x, kernel, (1, 1), padding, dimension_numbers=NAMES))
    np.testing.assert_allclose(run(x, kernel), expected, rtol=1e-5, atol=1e-5)
    assert ("conv_general_dilated" not in str(jax.make_jaxpr(run)(x, kernel))) == product
