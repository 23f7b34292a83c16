"""The explicit path (Eq. 5): every site's input is denoised in a step of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.core.denoisers import Denoisers, resolve
from drep_jax.core.intercept import place, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.linear_denoiser import dtype_of, predict
from drep_jax.core.matrix_form import affine, features, input_from_features, kernel_matrix
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.reverse_map import site_steps
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in
from drep_jax.typing import AnyArray, Path, Tree


def denoise_features(
    denoiser: Tree, triples: Float[AnyArray, "k 3"], x: Float[AnyArray, "*batch d"]
) -> Float[AnyArray, "*batch d"]:
    """Applies k reverse steps x̂ = s·x − g·D(x) + σ·z to feature vectors, largest t first (Eq. 5).

    Args:
      denoiser: of one layer, without the axis of a stack.
      triples: (s, g, σ) of each step.
      x: (…, d), or (…, groups, d) for a grouped denoiser.
    """
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
    """Calls a layer on its denoised input; a patch denoiser works on the windows, after padding.

    A visitor for `drep_jax.core.intercept.visit_sites`, with extras from `explicit_extras`. The windows
    of a part are multiplied by their rows of the kernel, and zeros take the place of its channels in
    the layer's input.
    """
    vectors = denoise_features(extra["denoiser"], extra["triples"], features(layer, site.kind, x))
    if site.kind != "patch":
        return call(input_from_features(layer, vectors, x))
    rest = None
    if layer.part is not None:
        rest = call(jnp.asarray(x).at[..., layer.part.first : layer.part.end].set(0))
    weights: Any = (module.get_variable("params", name) for name in ("kernel", "bias"))
    vectors, kernel, bias = module.promote_dtype(vectors, *weights, dtype=module.dtype)
    matrix = kernel_matrix(layer, site.kind, kernel)
    y = affine(vectors, matrix[0] if site.groups == 1 else matrix, precision=module.precision)
    y = y if site.groups == 1 else y.reshape(*y.shape[:-2], -1)
    if rest is not None:
        return rest + y
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def explicit_extras(
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    rule: str | None = None,
    steps: int | None = None,
) -> dict[Path, Tree]:
    """Returns what `call_denoised` needs at the `place` of every site: denoiser and reverse-step triples."""
    denoise, rule, steps = resolve(denoise, rule, steps)
    table = site_steps(sites, schedule, rule, steps)
    return {
        place(layer): {"denoiser": dict(get_in(denoise, site.path)), "triples": floating(table[site.path])}
        for site in sites
        for layer in site.layers
    }


def floating(values: Float[np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns numbers in the widest floating type that JAX has switched on."""
    return jnp.asarray(values, jax.dtypes.canonicalize_dtype(np.float64))


@standard_promotion
def explicit_apply(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    *args: Any,
    rule: str | None = None,
    steps: int | None = None,
    **kwargs: Any,
) -> Any:
    """Runs the backbone with the input of every site denoised (Eq. 5).

    The outputs are those of the network that `fuse` returns, up to rounding, at extra cost.

    Args:
      backbone: an unbound Linen module.
      variables: its variables, {"params": …, …}.
      denoise: a `denoise` subtree or a `Denoisers`.
      sites, schedule, rule, steps: see `drep_jax.core.fusion.fuse`.
      *args, **kwargs: for the backbone.

    Returns:
      The backbone's outputs.

    Raises:
      FusionError: if k needs denoisers learned at another t.
      ConfigError: if `rule` or `steps` differ from those of a `Denoisers`.
    """
    extras = explicit_extras(denoise, sites, schedule, rule, steps)
    return visit_sites(backbone, variables, sites, extras, call_denoised, *args, **kwargs)
