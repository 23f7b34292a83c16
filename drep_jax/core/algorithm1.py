"""Algorithm 1's loss (Eq. 11): a denoiser predicts the noise added to the backbone's features."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from drep_jax.core.calls import call_weight, counted_vectors, positions_of
from drep_jax.core.denoisers import Denoisers, resolve
from drep_jax.core.explicit import floating
from drep_jax.core.intercept import sow, sown, sown_before, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.linear_denoiser import dtype_of, predict
from drep_jax.core.matrix_form import features
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.sampling import draw, systematic, threefry
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.trees import get_in
from drep_jax.typing import AnyArray, Tree

LOSSES: dict[str, Callable[[Any], Any]] = {
    "l2": lambda residual: jnp.mean(jnp.square(residual)),
    "l1": lambda residual: jnp.mean(jnp.abs(residual)),
    "l1+l2": lambda residual: jnp.mean(jnp.abs(residual)) + jnp.mean(jnp.square(residual)),
}
"""Name ↦ loss of the residuals ε − D(X_t)."""


@standard_promotion
def algorithm1_losses(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    index: Int[AnyArray, " batch"],
    *args: Any,
    loss: str = "l2",
    tokens: float = 1.0,
    **kwargs: Any,
) -> dict[str, Float[Array, "..."]]:
    """Computes every site's denoising loss in one forward pass (Algorithm 1, Eq. 11).

    At each site, with its input features F and its own t:

        X_t = √ᾱ_t·F + √(1−ᾱ_t)·ε        ε ~ N(0, I)
        loss = mean (ε − D(X_t))²  (l2),  mean |ε − D(X_t)|  (l1),  or their sum  (l1+l2)

    The mean is over all entries. Where a layer is called several times it is over all calls, weighted as
    `Site.call_weights` says; where the network names padding (`drep_jax.rows`), over what is none. A denoiser
    that predicts no noise has the l2 loss 1. The backbone is frozen: no gradient flows through it. ε is a
    function of (key, example index, site, number of the call) only, so neither the order of the batch nor the
    number of devices matters. The rounds of a loop with the same weights count as one call.

    Padding differs from batch to batch. So that its share has no influence on the minimum, the gradient is
    that of the sum over a fixed number of entries, padding included.

    Args:
      backbone: an unbound Linen module.
      variables: its variables, which stay frozen.
      denoise: a `denoise` subtree or a `Denoisers`.
      sites: where to denoise, with time steps.
      schedule: the noise schedule.
      key: of the training step.
      index: global index of each example.
      *args: inputs of the backbone, the batch first, (batch, …).
      loss: "l2", "l1" or "l1+l2".
      tokens: fraction of each example's feature vectors to use, in (0, 1]. They are drawn anew at
        every step by systematic sampling. The loss is a mean over feature vectors, so the gradient
        stays unbiased and costs less.
      **kwargs: for the backbone.

    Returns:
      {site name: loss}, a scalar or one number for each stacked copy.

    Raises:
      ConfigError: for an unknown loss, or `tokens` outside (0, 1].
      SiteError: if `nn.scan` hides the collection "denoise"; names the line to add.
    """
    if loss not in LOSSES:
        raise ConfigError(f'Unknown loss "{loss}".{did_you_mean(loss, LOSSES)}')
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the fraction of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    denoise, _, _ = resolve(denoise)
    key = threefry(key)
    keys = jax.vmap(lambda example: jax.random.fold_in(key, example))(index)
    extras, slot = {}, 0
    for site in sites:
        copies = site.stack or 1
        bars = np.array([schedule.alpha_bar(t) for t in site.times])
        leaves = {
            "signal": floating(np.sqrt(bars)),
            "noise": floating(np.sqrt(1.0 - bars)),
            "slot": jnp.arange(slot, slot + copies, dtype=jnp.int32),
        }
        slot += copies
        if site.stack is None:
            leaves = {name: leaf[0] for name, leaf in leaves.items()}
        extras[site.path] = {"denoiser": dict(get_in(denoise, site.path)), **leaves}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.layers[0].path:  # the other layers of a site read the same tensor
            clean = jax.lax.stop_gradient(features(layer, site.kind, x))
            valid = counted_vectors(site, layer, site.kind, x)
            number = sown_before(module, layer, "number")
            value, share = _site_loss(clean, valid, number, site, extra, key, keys, LOSSES[loss], tokens)
            positions = positions_of(site, layer, site.kind, x)
            by_image = bool(positions) and positions[0] % len(index) == 0  # else a table, the same for all images
            weight = call_weight(site, math.prod(positions) // (len(index) if by_image else 1))
            sow(module, layer, "loss", value if weight == 1.0 else weight * value)
            sow(module, layer, "calls", weight * jnp.ones_like(value))
            if layer.calls > 1 or valid is not None:
                sow(module, layer, "counted", weight * jnp.asarray(share, value.dtype))
            if layer.calls > 1:
                sow(module, layer, "number", jnp.ones((), jnp.int32))
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
    losses = {}
    for site in sites:
        sums = sown(collected, site.layers[0])
        value = sums["loss"] / sums["calls"]
        # Axes after the stack are calls of one layer that nn.scan repeats or nn.vmap spreads.
        axes = tuple(range(0 if site.stack is None else 1, value.ndim))
        losses[site.name] = value.mean(axis=axes)
        if "counted" in sums:  # the value is a mean over what counts; the gradient stays that of the sum
            share = (sums["counted"] / sums["calls"]).mean(axis=axes)
            mean = losses[site.name] / jnp.maximum(share, jnp.finfo(share.dtype).tiny)
            losses[site.name] += jax.lax.stop_gradient(mean - losses[site.name])
    return losses


def _site_loss(
    clean: Float[AnyArray, "*positions d"],
    valid: Bool[Array, "*positions"] | None,
    number: Any,
    site: Site,
    extra: Tree,
    key: Any,
    keys: Any,
    loss: Any,
    tokens: float,
) -> tuple[Float[Array, ""], Any]:
    """Returns the loss of one call at one site (one stacked copy), and the share of the vectors that count.

    Args:
      clean: F, feature vectors.
      valid: which of them count; the others add nothing to the loss. None if all do.
      number: of earlier calls; None in the first.
      site: gives the width and the groups.
      extra: {"denoiser", "signal": √ᾱ, "noise": √(1−ᾱ), "slot": index of the site's copy}.
      key, keys: of the step, and of each example.
      loss: of the residuals.
      tokens: fraction of each example's vectors.
    """
    shape = (site.width,) if site.groups == 1 else (site.groups, site.width)
    batch = keys.shape[0]
    if clean.ndim > len(shape) and clean.shape[0] % batch == 0:
        clean = clean.reshape(batch, -1, *shape)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, extra["slot"]))(keys)
    else:  # features without a batch axis, of a table that is the same for every example
        clean = clean.reshape(1, -1, *shape)
        keys = jax.random.fold_in(key, extra["slot"])[None]
    if number is not None:
        later = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, 2), number))(keys)
        keys = jnp.where(number > 0, later, keys)
    valid = None if valid is None else valid.reshape(clean.shape[:2])
    if tokens < 1.0:
        picks = jax.vmap(lambda k: systematic(jax.random.fold_in(k, 1), clean.shape[1], tokens))(keys)
        clean = jnp.take_along_axis(clean, picks.reshape(*picks.shape, *(1,) * len(shape)), axis=1)
        valid = None if valid is None else jnp.take_along_axis(valid, picks, axis=1)
    if valid is not None:
        clean = jnp.where(valid.reshape(*valid.shape, *(1,) * len(shape)), clean, 0)
    dtype = jnp.promote_types(clean.dtype, dtype_of(extra["denoiser"]))
    noise = draw(keys, clean.shape[1:], dtype)
    noisy = extra["signal"].astype(dtype) * clean.astype(dtype) + extra["noise"].astype(dtype) * noise
    share: Any = 1.0
    if valid is not None:
        share, valid = valid.mean(dtype=dtype), valid.reshape(-1, *(1,) * len(shape))
    return _regression(loss, extra["denoiser"], noisy.reshape(-1, *shape), noise.reshape(-1, *shape), valid), share


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _regression(
    loss: Any, denoiser: Tree, noisy: Float[AnyArray, "*batch d"], noise: Float[AnyArray, "*batch d"], valid: Any = None
) -> Float[Array, ""]:
    """Returns loss(ε − D(X_t)), where entries that do not count are 0.

    The gradient is computed in the forward pass, so X_t and ε need not be kept for a backward pass.
    """
    return _error(loss, denoiser, noisy, noise, valid)


def _error(loss: Any, denoiser: Tree, noisy: Any, noise: Any, valid: Any) -> Any:
    residual = noise - predict(denoiser, noisy)
    return loss(residual if valid is None else jnp.where(valid, residual, 0))


def _regression_forward(loss: Any, denoiser: Tree, noisy: Any, noise: Any, valid: Any) -> Any:
    return jax.value_and_grad(lambda d: _error(loss, d, noisy, noise, valid))(denoiser)


def _regression_backward(loss: Any, gradient: Tree, cotangent: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: (cotangent * leaf).astype(leaf.dtype), gradient), None, None, None


_regression.defvjp(_regression_forward, _regression_backward)
