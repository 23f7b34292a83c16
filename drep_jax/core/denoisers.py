"""The `denoise` subtree: its form, its checks, its fixed noise z, and the reverse-step triples that go with it.

For a site at path a/b the subtree holds `denoise["a"]["b"] = {"kernel": W_Dᵀ, "bias": b_D, "z": …}` in Flax layout, so that
`D(x) = x @ kernel + bias`. Shapes are ([stack], [groups], d, d), ([stack], [groups], d) and, only if noise was sampled,
([stack], steps, [groups], d). `bias` and `z` are absent where a site may have no constant; a site with a `rank` has the factors
of `drep_jax.core.denoisers` in place of `kernel`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.matrix_form import affine
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.core.sites import Site
from drep_jax.errors import FusionError
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree


def init_denoise(sites: Sequence[Site], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns zero denoisers, which predict no noise: Algorithm 1's loss starts at 1, its value without a denoiser."""
    tree: dict[str, Any] = {}
    for number, site in enumerate(sites):
        shapes = leaf_shapes(site)
        names = FACTORS if site.rank else ("kernel",)
        leaves = {name: jnp.zeros(shapes[name], dtype) for name in (*names, *(("bias",) if site.bias else ()))}
        if site.rank:  # with both factors zero neither would ever get a gradient; which start is taken does not matter
            key = jax.random.fold_in(jax.random.key(0), number)
            leaves["down"] = jax.random.normal(key, shapes["down"], dtype) / math.sqrt(site.width)
        tree = set_in(tree, site.path, leaves)
    return tree


def leaf_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all leaves that a site's denoiser may have."""
    lead = site.denoiser_shape[:-2]
    shapes = {"kernel": site.denoiser_shape, "bias": (*lead, site.width), "z": noise_shape(site)}
    if site.rank:
        shapes |= {"scale": lead, "down": (*lead, site.width, site.rank), "up": (*lead, site.rank, site.width)}
    return shapes


def noise_shape(site: Site) -> tuple[int, ...]:
    """Returns the shape of a site's z: ([stack], steps, [groups], d)."""
    lead = () if site.stack is None else (site.stack,)
    return (*lead, site.steps, *site.denoiser_shape[len(lead) : -1])


def sample_noise(denoise: Tree, sites: Sequence[Site], key: jax.Array) -> dict[str, Any]:
    """Returns the subtree with a fixed z ~ N(0, I) for each reverse step, drawn once, so that fusing twice is the same.

    Raises:
      FusionError: if a site may have no constant: it has nowhere to put W z; or if it has no denoiser.
    """
    for number, site in enumerate(sites):
        if not site.bias:
            raise FusionError(
                f"{site.name}: sampled noise is a constant, and this site may not have one. Use zero noise."
            )
        leaves = get_in(denoise, site.path)
        if not _has_matrix(leaves):
            raise FusionError(f"{site.name}: there is no denoiser for this site in the `denoise` subtree.")
        z = jax.random.normal(jax.random.fold_in(key, number), noise_shape(site), dtype_of(leaves))
        denoise = set_in(denoise, site.path, {**leaves, "z": z})
    return denoise


def check_params(params: Tree, sites: Sequence[Site]) -> None:
    """Checks that `params` is {"backbone", "denoise"} and that every denoiser fits its layers.

    Raises:
      FusionError: names the site, what was found and what was expected.
    """
    if not isinstance(params, Mapping) or "denoise" not in params or "backbone" not in params:
        raise FusionError(
            'Fusion needs parameters {"backbone": …, "denoise": …}; there is no `denoise` subtree. These may be a plain '
            "backbone's weights, or weights that are already fused: fusing is done once, from the run that learned them."
        )
    backbone, denoise = params["backbone"], params["denoise"]
    boxed = jax.tree_util.tree_leaves(backbone, is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))
    if any(isinstance(leaf, nn.meta.AxisMetadata) for leaf in boxed):
        raise FusionError(
            "The backbone's parameters carry partitioning boxes; take them out with flax.linen.unbox first."
        )
    known = {(*site.path, leaf) for site in sites for leaf in leaf_shapes(site)}
    for path, _ in jax.tree_util.tree_leaves_with_path(denoise):
        if (names := tuple(str(getattr(k, "key", k)) for k in path)) not in known:
            raise FusionError(f"denoise/{'/'.join(names)}: no selected site has such a leaf.")
    for site in sites:
        leaves = get_in(denoise, site.path)
        if not _has_matrix(leaves):
            raise FusionError(f"{site.name}: there is no denoiser for this site in the `denoise` subtree.")
        expected = leaf_shapes(site)
        for name, leaf in leaves.items():
            if name in ("bias", "z") and not site.bias:
                raise FusionError(
                    f"{site.name}: the denoiser has a constant ({name}), but the site has nowhere to put it: a layer "
                    "without bias, or zeros padded after a pointwise denoiser. Learn it through the origin."
                )
            if tuple(leaf.shape) != expected[name]:
                raise FusionError(
                    f"{site.name}: the denoiser's {name} has shape {tuple(leaf.shape)}, expected {expected[name]}."
                )
        for layer in site.layers:
            node = get_in(backbone, layer.path)
            shape = (() if layer.stack is None else (layer.stack,)) + layer.kernel_shape
            found = tuple(node["kernel"].shape) if isinstance(node, Mapping) and "kernel" in node else None
            if found != shape:
                raise FusionError(f"{layer.name}: the backbone's kernel has shape {found}, expected {shape}.")


def _has_matrix(leaves: Any) -> bool:
    """Returns whether a denoiser has a full matrix or all factors of one, not both."""
    if not isinstance(leaves, Mapping):
        return False
    factors = [name in leaves for name in FACTORS]
    return not any(factors) if "kernel" in leaves else all(factors)


def site_steps(
    sites: Sequence[Site], schedule: Schedule, rule: str, steps: int | None = None
) -> dict[Path, np.ndarray]:
    """Returns each site's triples, float64 ([stack], k, 3), for k reverse steps down from its own t.

    Args:
      sites: with time steps.
      schedule: the one the denoisers were learned on.
      rule: see `drep_jax.core.schedule.reverse_step`.
      steps: k; at most the number the sites were given, since a denoiser is tied to the t it was learned at.

    Raises:
      FusionError: for more steps than that.
      ConfigError: for an unknown rule or a t outside the schedule.
    """
    table = {}
    for site in sites:
        if not site.times:
            raise FusionError(f"{site.name} has no time step yet: call `assign_times` on the selected sites.")
        k = site.steps if steps is None else steps
        if k > site.steps:
            raise FusionError(
                f"{k} steps a site would need denoisers learned at other time steps (t falls by {k} from site to site; "
                f"these were learned with {site.steps}). Learn them again with steps={k}."
            )
        rows = np.stack([reverse_steps(schedule, t, k, rule) for t in site.times])
        table[site.path] = rows[0] if site.stack is None else rows
    return table


FACTORS = ("scale", "down", "up")


def is_low_rank(denoiser: Mapping[str, Any]) -> bool:
    """Returns whether a denoiser is given by its factors."""
    return "down" in denoiser


def dtype_of(denoiser: Mapping[str, Any]) -> Any:
    """Returns the type of a denoiser's matrix."""
    return denoiser["down" if is_low_rank(denoiser) else "kernel"].dtype


def predict(denoiser: Mapping[str, Any], x: Any) -> Any:
    """Returns D(x) of feature vectors (…, [groups], d) by a denoiser without the axis of a stack."""
    if not is_low_rank(denoiser):
        return affine(x, denoiser["kernel"], denoiser.get("bias"))
    scale = denoiser["scale"]
    own = x * scale.reshape((1,) * (x.ndim - 1 - scale.ndim) + scale.shape + (1,))
    return own + affine(affine(x, denoiser["down"]), denoiser["up"], denoiser.get("bias"))


def dense(denoiser: Mapping[str, Any]) -> Any:
    """Returns the matrix of a denoiser, (…, d, d), as NumPy or JAX array like its leaves."""
    if not is_low_rank(denoiser):
        return denoiser["kernel"]
    scale = denoiser["scale"]
    return (
        scale[..., None, None] * np.eye(denoiser["up"].shape[-1], dtype=scale.dtype) + denoiser["down"] @ denoiser["up"]
    )


def times_kernel(denoiser: Mapping[str, Any], groups: int, kernel: Any) -> Any:
    """Returns the denoiser's matrix, in Flax layout, times K (groups, d, columns); a low rank costs 2·r·d·columns."""

    def product(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    parts = {name: denoiser[name] for name in (*FACTORS, "kernel") if name in denoiser}
    parts = {name: leaf if groups > 1 else leaf[None] for name, leaf in parts.items()}
    if not is_low_rank(denoiser):
        return product(parts["kernel"], kernel)
    return parts["scale"][:, None, None] * kernel + product(parts["down"], product(parts["up"], kernel))
