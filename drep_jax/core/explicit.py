"""The explicit path (Eq. 5): every site's input denoised in plain sight, which is what fusion has to reproduce."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.core.denoisers import dtype_of, predict, site_steps
from drep_jax.core.intercept import visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import affine, features, input_from_features, kernel_matrix
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in
from drep_jax.typing import Path, Tree

# ---------------------------------------------------------------------------------------------------------------------
# Explicit path
# ---------------------------------------------------------------------------------------------------------------------


def denoise_features(denoiser: Tree, triples: Float[Array, "k 3"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies k reverse steps x̂ = s·x − g·D(x) + σ·z to feature vectors (…, [groups], d), largest t first (Eq. 5)."""
    dtype = jnp.promote_types(x.dtype, dtype_of(denoiser))
    x, triples = x.astype(dtype), triples.astype(dtype)
    for j in range(triples.shape[0]):
        scale, gain, sigma = triples[j]
        predicted = predict(denoiser, x)
        x = scale * x - gain * predicted
        if "z" in denoiser:
            z = sigma * denoiser["z"][j]
            x = x + z.reshape((1,) * (x.ndim - z.ndim) + z.shape)
    return x


def call_denoised(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Callable[[Any], Any]) -> Any:
    """Calls a layer on its denoised input; a patch denoiser works on the windows, after padding."""
    vectors = denoise_features(extra["denoiser"], extra["triples"], features(layer, site.kind, x))
    if site.kind != "patch":
        return call(input_from_features(layer, vectors, x))
    weights: Any = (module.get_variable("params", name) for name in ("kernel", "bias"))
    vectors, kernel, bias = module.promote_dtype(vectors, *weights, dtype=module.dtype)
    matrix = kernel_matrix(layer, site.kind, kernel)
    y = affine(vectors, matrix[0] if site.groups == 1 else matrix, precision=module.precision)
    y = y if site.groups == 1 else y.reshape(*y.shape[:-2], -1)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def explicit_extras(
    denoise: Tree, sites: Sequence[Site], schedule: Schedule, rule: str, steps: int | None = None
) -> dict[Path, Tree]:
    """Returns what `call_denoised` needs at every layer: the site's denoiser and its reverse-step triples."""
    table = site_steps(sites, schedule, rule, steps)
    return {
        layer.path: {"denoiser": dict(get_in(denoise, site.path)), "triples": floating(table[site.path])}
        for site in sites
        for layer in site.layers
    }


def floating(values: np.ndarray) -> Array:
    """Returns numbers in the widest floating type that JAX has switched on."""
    return jnp.asarray(values, jax.dtypes.canonicalize_dtype(np.float64))


def explicit_apply(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *args: Any,
    rule: str = "ddpm",
    steps: int | None = None,
    **kwargs: Any,
) -> Any:
    """Runs the backbone with every site's input denoised in plain sight: what `fuse` has to reproduce, at extra cost.

    Args:
      backbone: an unbound Linen module.
      variables: the backbone's own, {"params": …, …}.
      denoise: the denoisers, see `drep_jax.core.denoisers`.
      sites, schedule, rule, steps: see `drep_jax.core.fusion.fuse`.
      *args, **kwargs: for the backbone.
    """
    extras = explicit_extras(denoise, sites, schedule, rule, steps)
    return visit_sites(backbone, variables, sites, extras, call_denoised, *args, **kwargs)
