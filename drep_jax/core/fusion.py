"""Fusion (Eq. 7, Algorithm 2): the reverse steps at a layer's input become part of the layer, (W, b, W_D, t) ↦ (W', b').

One reverse step is `x̂ = A x + c` with `A = s·I − g·W_D` and `c = σ·z − g·b_D`; k steps compose, the largest t first. The
layer `y = W x̂ + b` is then `W' = W A_k⋯A_1` and `b' = b + W Σ_j A_k⋯A_{j+1} c_j`. Walking from the last step to the first
needs no product of two d×d matrices: with the Flax kernel K = Wᵀ and D(x) = x·K_D + b_D,

    b ← b + Kᵀ c_j        K ← s_j·K − g_j·K_D·K        for j = k … 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.denoisers import check_params, dtype_of, site_steps, times_kernel
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import bias_from_columns, kernel_from_matrix, kernel_matrix
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.errors import FusionError
from drep_jax.trees import check_finite, get_in
from drep_jax.typing import Path, Tree


def fuse(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str = "ddpm",
    steps: int | None = None,
    strength: Any = 1.0,
) -> Tree:
    """Fuses every denoiser into its layers and returns the backbone's parameters with other numbers in them.

    W'(τ) = W + τ·(W A_k⋯A_1 − W) and likewise for b: strength τ = 1 is the paper's fusion, τ = 0 the unchanged backbone.
    Pure, and fit for `jit` (everything but `params` and `strength` static), `vmap` over strength, `grad` and `pmap`.
    Computes in the wider of float32 and the parameters' type with `Precision.HIGHEST`.

    Args:
      params: {"backbone": tree, "denoise": tree}, see `drep_jax.core.denoisers`.
      sites: from `find_sites`.
      schedule: the one the denoisers were learned on.
      rule: "ddpm" (Eq. 5), "paper" (Eq. 7 as printed), "ddim", "ddim:r" or "affine".
      steps: reverse steps k a site; None for the number the sites were given.
      strength: τ, a scalar.

    Returns:
      A tree of exactly the structure, shapes and types of `params["backbone"]`.

    Raises:
      FusionError: if denoisers and backbone do not fit, or k needs denoisers learned at another t.
      NonFiniteError: for NaN or Inf, when called with concrete values.
    """
    sites = tuple(sites)
    check_params(params, sites)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(params)):
        check_finite(params, "Refusing to fuse")
    table = site_steps(sites, schedule, rule, steps)
    new: dict[Path, Any] = {}
    for site in sites:
        for layer in site.layers:
            node = get_in(params["backbone"], layer.path)
            triples = table[site.path]
            fused = fuse_layer(layer, site, node, get_in(params["denoise"], site.path), triples, strength)
            new.update({(*layer.path, name): leaf for name, leaf in fused.items()})

    def replace(path: tuple[Any, ...], leaf: Any) -> Any:
        return new.get(tuple(getattr(key, "key", key) for key in path), leaf)

    return jax.tree_util.tree_map_with_path(replace, params["backbone"])


def fuse_layer(
    layer: Layer,
    site: Site,
    node: Any,
    denoiser: Any,
    triples: np.ndarray,
    strength: Any,
    *,
    stacked: bool | None = None,
) -> dict[str, Any]:
    """Returns a layer's fused kernel and bias; `stacked` says whether they have the axis of `nn.scan` (None: as the site)."""
    weights = {name: node[name] for name in ("kernel", "bias") if name in node}
    if layer.bias != ("bias" in weights):
        raise FusionError(
            f"{layer.name}: expected {'a' if layer.bias else 'no'} bias leaf in the backbone's parameters."
        )
    wide = jnp.promote_types(weights["kernel"].dtype, jnp.float32)
    wide = jnp.promote_types(wide, dtype_of(denoiser))

    def one(weights: Any, denoiser: Any, triples: Any) -> Any:
        cast = jax.tree_util.tree_map(lambda leaf: leaf.astype(wide), (weights, denoiser))
        fused = _compose(layer, site, cast[0], cast[1], triples.astype(wide))
        tau = jnp.asarray(strength, wide)
        mix = {name: (1 - tau) * leaf + tau * fused[name] for name, leaf in cast[0].items()}  # exact at τ = 0 and 1
        return {name: leaf.astype(weights[name].dtype) for name, leaf in mix.items()}

    run = jax.vmap(one) if (site.stack is not None if stacked is None else stacked) else one
    return run(weights, dict(denoiser), jnp.asarray(triples, wide))


def _compose(layer: Layer, site: Site, weights: Any, denoiser: Any, triples: Any) -> dict[str, Any]:
    kernel, constant = _walk(site, kernel_matrix(layer, site.kind, weights["kernel"]), denoiser, triples)
    fused = {"kernel": kernel_from_matrix(layer, site.kind, kernel)}
    if "bias" in weights:
        fused["bias"] = weights["bias"] + bias_from_columns(layer, site.kind, constant)
    return fused


def _walk(site: Site, kernel: Any, denoiser: Any, triples: Any) -> tuple[Any, Any]:
    """Carries K (groups, d, columns) through the steps, last one first; returns K' and what they add to the bias."""

    def columns(vector: Any) -> Any:  # Kᵀ v for each group
        vector = vector.reshape(site.groups, site.width)
        return jnp.einsum("gdc,gd->gc", kernel, vector, precision=jax.lax.Precision.HIGHEST)

    constant = jnp.zeros((kernel.shape[0], kernel.shape[2]), kernel.dtype)
    for j in reversed(range(triples.shape[0])):
        scale, gain, sigma = triples[j]
        if "bias" in denoiser:
            constant = constant - gain * columns(denoiser["bias"])
        if "z" in denoiser:
            constant = constant + sigma * columns(denoiser["z"][j])
        kernel = scale * kernel - gain * times_kernel(denoiser, site.groups, kernel)
    return kernel, constant


def composed_maps(
    params: Tree, sites: Sequence[Site], schedule: Schedule, *, rule: str = "ddpm", steps: int | None = None
) -> dict[Path, Tree]:
    """Returns each site's k steps as one map x̂ = x + x·matrix + constant, in the denoiser's own shapes.

    matrix = (A_k⋯A_1 − I)ᵀ and constant = Σ_j A_k⋯A_{j+1} c_j, which is absent where a site may have none.
    """
    table = site_steps(sites, schedule, rule, steps)
    maps = {}
    for site in sites:

        def one(denoiser: Any, triples: Any, site: Site = site) -> Any:
            form = site.denoiser_shape[0 if site.stack is None else 1 :]
            eye = jnp.eye(site.width, dtype=dtype_of(denoiser))[None]
            matrix, constant = _walk(site, jnp.repeat(eye, site.groups, axis=0), denoiser, triples)
            out = {"matrix": (matrix - eye).reshape(form)}
            return {**out, "constant": constant.reshape(form[:-1])} if site.bias else out

        denoiser = dict(get_in(params["denoise"], site.path))
        triples = jnp.asarray(table[site.path], dtype_of(denoiser))
        maps[site.path] = (one if site.stack is None else jax.vmap(one))(denoiser, triples)
    return maps


class Survival(NamedTuple):
    """How much of the change of the weights a storage type keeps; 1 is all of it."""

    share: float
    worst: float
    worst_layer: str


def fuse_exact(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str = "ddpm",
    steps: int | None = None,
    strength: float = 1.0,
    round_back: bool = True,
) -> Tree:
    """Fuses in float64 on the CPU, as exports do, and returns NumPy arrays.

    Args:
      params, sites, schedule, rule, steps, strength: see `fuse`.
      round_back: cast once at the end to the backbone's own types; False leaves the fused leaves in float64.
    """
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree_util.tree_map(_float64, params)
        fused = jax.tree_util.tree_map(
            np.asarray, fuse(wide, sites, schedule, rule=rule, steps=steps, strength=strength)
        )
    if not round_back:
        return fused
    return jax.tree_util.tree_map(lambda new, old: new.astype(old.dtype), fused, params["backbone"])


def _float64(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def survival(base: Tree, fused64: Tree, stored: Tree) -> Survival:
    """Measures what rounding to the storage type leaves of the change: 1 − ‖stored − fused64‖ / ‖fused64 − base‖, at least 0.

    At small t fusion changes W by a few thousandths, less than bfloat16 resolves. Only leaves that change count.
    """
    flat = [
        ("/".join(str(getattr(key, "key", key)) for key in path), *map(_float64, leaves))
        for (path, _), *leaves in zip(
            jax.tree_util.tree_leaves_with_path(base),
            *(jax.tree_util.tree_leaves(tree) for tree in (base, fused64, stored)),
            strict=True,
        )
    ]
    changed = [(name, np.sum((kept - new) ** 2), np.sum((new - old) ** 2)) for name, old, new, kept in flat]
    changed = [(name, lost, size) for name, lost, size in changed if size > 0]
    if not changed:
        return Survival(1.0, 1.0, "")
    shares = {name: max(0.0, 1.0 - float(np.sqrt(lost / size))) for name, lost, size in changed}
    worst = min(shares, key=lambda name: shares[name])
    total = np.sqrt(sum(lost for _, lost, _ in changed) / sum(size for *_, size in changed))
    return Survival(max(0.0, 1.0 - float(total)), shares[worst], worst)
