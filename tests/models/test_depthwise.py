"""The fast depthwise form against XLA's operator, with its gradients, and in a network that noise is measured on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import drep_jax
from drep_jax.models import depthwise_conv


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [((3, 3), (1, 1), ((1, 1), (1, 1))), ((3, 5), (2, 2), ((1, 1), (2, 2))), ((4, 2), (2, 1), ((0, 3), (1, 0)))],
)
def test_outputs_and_gradients_are_those_of_xlas_operator(size, strides, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 8, 3)), rng.normal(size=(*size, 1, 3))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}

    def loss(conv, x, kernel):
        y = conv(x, kernel, strides, padding, **options)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), y

    with jax.enable_x64(True):
        results = [
            jax.jit(jax.value_and_grad(lambda x, k, conv=conv: loss(conv, x, k), (0, 1), has_aux=True))(x, kernel)
            for conv in (lax.conv_general_dilated, depthwise_conv)
        ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)
    assert np.abs(results[0][1][1]).max() > 1


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        pad = ((1, 1), (1, 1))
        x = nn.Conv(
            3, (3, 3), (1, 1), pad, feature_group_count=3, conv_general_dilated=depthwise_conv, name="depthwise"
        )(x)
        return nn.Dense(4, name="head")(nn.relu(x).mean((1, 2)))


def test_noise_is_measured_through_it():
    """Streams have other batch sizes than the trace, so no equation may name the size of the batch."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(24, 6, 6, 3)).astype(np.float32)
    streams = np.stack([clean, clean, clean + rng.normal(0, 0.5, clean.shape).astype(np.float32)])
    net = Separable()
    variables = net.init(jax.random.key(0), clean[:1])
    sites = drep_jax.find_sites(net, clean[:1])
    assert [site.name for site in sites] == ["depthwise", "head"]
    measured = [drep_jax.measure(net, variables, sites, streams, [0.5, 0.5], chunk=chunk) for chunk in (24, 6)]
    for found in measured:
        assert all(after < before for before, after in found.errors.values())
    # All vectors are used here, so the size of the chunks makes no difference but for rounding.
    leaves = [jax.tree.leaves(one.denoise) for one in measured]
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
