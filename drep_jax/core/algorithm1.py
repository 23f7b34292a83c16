"""Algorithm 1's loss (Eq. 11): a denoiser predicts the noise that was added to the features of the frozen backbone."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from drep_jax.core.denoisers import dtype_of, predict
from drep_jax.core.explicit import floating
from drep_jax.core.intercept import sow, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features
from drep_jax.core.sampling import draw, systematic, threefry
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.trees import get_in
from drep_jax.typing import Tree

LOSSES: dict[str, Callable[[Any], Any]] = {
    "l2": lambda residual: jnp.mean(jnp.square(residual)),
    "l1": lambda residual: jnp.mean(jnp.abs(residual)),
    "l1+l2": lambda residual: jnp.mean(jnp.abs(residual)) + jnp.mean(jnp.square(residual)),
}


def algorithm1_losses(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    index: Int[Array, " batch"],
    *args: Any,
    loss: str = "l2",
    tokens: float = 1.0,
    **kwargs: Any,
) -> dict[str, Array]:
    """Computes every site's denoising loss in one forward pass of the frozen backbone (Algorithm 1, Eq. 11).

    At each site, with its input features F and its own t:  X_t = √ᾱ_t·F + √(1−ᾱ_t)·ε,  loss = mean (ε − D(X_t))² over all
    numbers (l2), mean |ε − D(X_t)| (l1), or their sum. Predicting no noise gives 1 (l2). No gradient flows through the
    backbone. ε depends on (key, example index, site) only, so neither the batch's order nor the number of devices matter.

    Args:
      backbone, variables: the frozen backbone.
      denoise: the denoisers.
      sites, schedule: where, and at which t.
      key: the step's key.
      index: global number of each example, (batch,).
      *args: the batch, first axis (batch,); the rest for the backbone.
      loss: "l2", "l1" or "l1+l2".
      tokens: share of the feature vectors of each example to use, drawn anew by systematic sampling; the loss is an
        expectation over them, so a sample of them gives an unbiased gradient for less work.
      **kwargs: for the backbone.

    Returns:
      {site name: loss}, a scalar each or one number a stacked copy.
    """
    if loss not in LOSSES:
        raise ConfigError(f'Unknown loss "{loss}".{did_you_mean(loss, LOSSES)}')
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the share of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    key = threefry(key)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(index)
    extras, slot = {}, 0
    for site in sites:
        count = site.stack or 1
        bars = np.array([schedule.alpha_bar(t) for t in site.times])
        numbers = {
            "signal": floating(np.sqrt(bars)),
            "noise": floating(np.sqrt(1.0 - bars)),
            "slot": jnp.arange(slot, slot + count, dtype=jnp.int32),
        }
        slot += count
        if site.stack is None:
            numbers = {name: value[0] for name, value in numbers.items()}
        extras[site.path] = {"denoiser": dict(get_in(denoise, site.path)), **numbers}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.path:  # the other layers of a site read the same tensor
            clean = jax.lax.stop_gradient(features(layer, site.kind, x))
            value = _site_loss(clean, site, extra, key, keys, LOSSES[loss], tokens)
            sow(module, layer, "loss", value)
            sow(module, layer, "calls", jnp.ones_like(value))
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
    losses = {}
    for site in sites:
        leaves = get_in(collected, site.path)
        value = leaves["loss"] / leaves["calls"]
        # What is left after the stack are the calls of one layer that nn.scan repeats or nn.vmap spreads.
        losses[site.name] = value.mean(axis=tuple(range(0 if site.stack is None else 1, value.ndim)))
    return losses


def _site_loss(clean: Any, site: Site, extra: Tree, key: Any, keys: Any, loss: Any, tokens: float) -> Any:
    shape = (site.width,) if site.groups == 1 else (site.groups, site.width)
    batch = keys.shape[0]
    if clean.ndim > len(shape) and clean.shape[0] % batch == 0:
        clean = clean.reshape(batch, -1, *shape)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, extra["slot"]))(keys)
    else:  # features without a batch axis, of a table that is the same for every example
        clean = clean.reshape(1, -1, *shape)
        keys = jax.random.fold_in(key, extra["slot"])[None]
    if tokens < 1.0:
        pick = jax.vmap(lambda k: systematic(jax.random.fold_in(k, 1), clean.shape[1], tokens))(keys)
        clean = jnp.take_along_axis(clean, pick.reshape(*pick.shape, *(1,) * len(shape)), axis=1)
    dtype = jnp.promote_types(clean.dtype, dtype_of(extra["denoiser"]))
    noise = draw(keys, clean.shape[1:], dtype)
    noisy = extra["signal"].astype(dtype) * clean.astype(dtype) + extra["noise"].astype(dtype) * noise
    return _regression(loss, extra["denoiser"], noisy.reshape(-1, *shape), noise.reshape(-1, *shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _regression(loss: Any, denoiser: Tree, noisy: Any, noise: Any) -> Any:
    """Returns loss(ε − D(X_t)); its gradient is taken on the spot, so X_t and ε need not be kept for a backward pass."""
    return loss(noise - predict(denoiser, noisy))


def _regression_forward(loss: Any, denoiser: Tree, noisy: Any, noise: Any) -> Any:
    return jax.value_and_grad(lambda d: loss(noise - predict(d, noisy)))(denoiser)


def _regression_backward(loss: Any, gradient: Tree, weight: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: (weight * leaf).astype(leaf.dtype), gradient), None, None


_regression.defvjp(_regression_forward, _regression_backward)
