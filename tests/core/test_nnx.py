"""Networks of flax.nnx: refused with the way out, and the bridge of docs/own_model.md."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse
from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import SiteError
from tests import trees
from tests.shapes import unchecked

X = trees.normal(1, (2, 4, 4, 3))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (2, 2), name="conv")(x)).mean((1, 2))
        return nn.Dense(2, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 4, (2, 2), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.conv(x)).mean((1, 2)))


def test_nnx_modules_are_refused_with_the_way_out():
    with (
        unchecked(),
        pytest.raises(SiteError, match=r"Nnx is a module of flax.nnx, .*flax.nnx.bridge.ToNNX brings it back"),
    ):
        find_layers(Nnx(rngs=nnx.Rngs(0)), X)
    with pytest.raises(SiteError, match=r"Nnx is a module of flax.nnx, .*also behind flax.nnx.bridge.to_linen"):
        find_sites(bridge.to_linen(Nnx), X)
    with unchecked(), pytest.raises(SiteError, match=r"dict is no flax.linen.Module"):
        find_layers({}, X)


def test_a_linen_twin_takes_the_parameters_and_gives_fused_ones_back():
    original = Nnx(rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(original, nnx.Param))
    np.testing.assert_allclose(Linen().apply({"params": params}, X), original(X), atol=1e-6)

    model = bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X)
    nnx.update(model, params)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    sites, schedule = find_sites(Linen(), X, pattern=".*"), Schedule(beta_end=0.02)
    denoise = trees.randomize(trees.zeros(jax.eval_shape(lambda: init_denoise(sites))), 1, 0.2)
    before = model(X)
    nnx.update(model, fuse({"backbone": params, "denoise": denoise}, sites, schedule))
    np.testing.assert_allclose(
        model(X), explicit_apply(Linen(), {"params": params}, denoise, sites, schedule, X), atol=1e-6
    )
    assert float(jnp.abs(model(X) - before).max()) > 1e-4
