"""The placebo arm: random maps that change as much as the learned denoisers do, fused at the same sites.

As much can mean two things (`PLACEBOS`). *effect*: the features change as much, on clean images.
*norm*: the matrices have equal norms. Learned maps act mostly along directions in which features
hardly vary. A random map of that norm acts along all of them, so it changes features far more, and
any gain over it would be no news.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.calls import counted_vectors, positions_of, vector_weight
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.fusion import composed_maps
from drep_jax.core.intercept import sow, sown, sum_calls, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features, sampled_features
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree

PLACEBOS = ("effect", "norm")
"""What a placebo has in common with the learned maps."""


VECTORS = 64
"""Feature vectors of an image that an effect is measured on, at most."""


def placebo_denoisers(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    *,
    rule: str | None = None,
    steps: int | None = None,
) -> Tree:
    """Returns random denoisers for rule "affine" with the norms of the learned ones.

    The learned map of a site is x̂ = x + x·M + c. Its placebo is x̂ = x + x·R + r with Gaussian R
    and r, scaled to ‖R‖_F = ‖M‖_F and ‖r‖ = ‖c‖ in each group and stacked copy.

    Args:
      params: {"backbone": parameters, "denoise": the learned denoisers, a subtree or `Denoisers`}.
      sites: of the denoisers.
      schedule: noise schedule.
      key: of the random maps.
      rule, steps: of a plain subtree, see `drep_jax.core.fusion.fuse`.

    Returns:
      A `denoise` subtree.
    """
    tree: Tree = {}
    for number, (site, learned) in enumerate(
        (site, composed_maps(params, [site], schedule, rule=rule, steps=steps)[site.path]) for site in sites
    ):
        keys = jax.random.split(jax.random.fold_in(key, number), 2)
        leaves = {"kernel": -_same_norm(keys[0], learned["matrix"], 2)}  # "affine" subtracts the output
        if "constant" in learned:
            leaves["bias"] = -_same_norm(keys[1], learned["constant"], 1)
        tree = set_in(tree, site.path, leaves)
    return tree


def _same_norm(key: jax.Array, like: jax.Array, rank: int) -> jax.Array:
    axes = tuple(range(-rank, 0))
    noise = jax.random.normal(key, like.shape, like.dtype)
    norm, target = (jnp.sqrt(jnp.sum(jnp.square(v), axis=axes, keepdims=True)) for v in (noise, like))
    return noise * (target / norm)


@standard_promotion
def placebo_of_effect(
    backbone: nn.Module,
    variables: Tree,
    denoisers: Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    batches: Iterable[Any],
) -> Tree:
    """Returns random denoisers for rule "affine" that change clean features as much as the learned ones.

    The learned map x̂ = x + x·M + c changes a feature with mean m by (x − m)·M, which varies, and by
    m·M + c, which does not. The placebo is x̂ = x + (x − m)·R + r with Gaussian R and r, where, in
    each group and stacked copy,

        E‖(x − m)·R‖² = E‖(x − m)·M‖²        ‖r‖ = ‖m·M + c‖

    Where a site may have no constant, it is x̂ = x + x·R with E‖x·R‖² = E‖x·M‖². Where the network
    hides features under `nn.scan` (`Layer.writable`), norms are equal instead.

    Args:
      backbone, variables: the unfused network, which gives the features.
      denoisers: the learned ones.
      sites: of the denoisers.
      schedule: noise schedule.
      key: of the random maps.
      batches: clean images, normalized, or (images, {argument: rows}) with what the network is given
        beside them; they are gone through twice.

    Returns:
      A `denoise` subtree.
    """
    pairs = [batch if isinstance(batch, tuple) else (batch, {}) for batch in batches]
    learned = composed_maps({"denoise": denoisers}, sites, schedule)
    equal_norm = placebo_denoisers({"denoise": denoisers}, sites, schedule, key)
    seen = [site for site in sites if site.layers[0].writable]
    matrices = {
        site.path: {"learned": learned[site.path]["matrix"], "random": -get_in(equal_norm, site.path)["kernel"]}
        for site in seen
    }
    program = jax.jit(lambda variables, extras, *pair: _sums(backbone, variables, seen, extras, *pair))

    def sums(means: Mapping[Path, Any]) -> dict[Path, dict[str, np.ndarray]]:
        extras = {path: {**matrices[path], "mean": jnp.asarray(mean, jnp.float32)} for path, mean in means.items()}
        total: Any = None
        for pair in pairs:
            of_batch = jax.tree_util.tree_map(
                lambda leaf: np.asarray(leaf, np.float64), program(variables, extras, *pair)
            )
            total = of_batch if total is None else jax.tree_util.tree_map(np.add, total, of_batch)
        return {site.path: total[site.name] for site in seen}

    def per_vector(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        count = values["count"]
        return values[name] / count.reshape(count.shape + (1,) * (values[name].ndim - count.ndim))

    shift = {site.path: np.zeros(site.denoiser_shape[:-1]) for site in seen}
    means = {path: per_vector(values, "first") for path, values in sums(shift).items()}
    about_means = sums(means)
    tree: Tree = equal_norm
    for site in seen:
        values, mean = about_means[site.path], means[site.path]
        power = {name: per_vector(values, name) for name in ("learned", "random")}
        at_mean = {
            name: np.einsum("...d,...de->...e", mean, np.asarray(matrix, np.float64))
            for name, matrix in matrices[site.path].items()
        }
        if not site.bias:
            power = {name: power[name] + (at_mean[name] ** 2).sum(-1) for name in power}
        ratio = np.divide(
            power["learned"], power["random"], out=np.zeros_like(power["random"]), where=power["random"] > 0
        )
        scale = np.sqrt(ratio)[..., None]
        leaves = {"kernel": np.float32(-scale[..., None] * np.asarray(matrices[site.path]["random"], np.float64))}
        if site.bias:
            change = at_mean["learned"] + np.asarray(learned[site.path]["constant"], np.float64)
            direction = np.asarray(get_in(equal_norm, site.path)["bias"], np.float64)
            length = np.linalg.norm(direction, axis=-1, keepdims=True)
            random = np.divide(direction, length, out=np.zeros_like(direction), where=length > 0)
            constant = random * np.linalg.norm(change, axis=-1, keepdims=True) - scale * at_mean["random"]
            leaves["bias"] = np.float32(-constant)
        tree = set_in(tree, site.path, leaves)
    return tree


def _sums(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    extras: Mapping[Path, Tree],
    images: Any,
    arguments: Mapping[str, Any],
) -> Any:
    """Returns {site name: sums over feature vectors of 1, x − mean, ‖(x − mean)·M‖² and ‖(x − mean)·R‖²}."""
    batch = jax.tree_util.tree_leaves(images)[0].shape[0]

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.layers[0].path:  # the other layers of a site read the same tensor
            vectors, each = _some_vectors(site, layer, x, batch, extra["mean"])
            centered = vectors - extra["mean"][None]

            def total(values: Any) -> Any:
                return values.sum(0) if each is None else jnp.tensordot(each, values, 1)

            sow(module, layer, "count", jnp.asarray(vectors.shape[0], jnp.float32) if each is None else each.sum())
            sow(module, layer, "first", total(centered))
            product = "nd,de->ne" if centered.ndim == 2 else "ngd,gde->nge"
            for name in ("learned", "random"):
                change = jnp.einsum(product, centered, extra[name], precision="highest")
                square = jnp.square(change)
                sow(module, layer, name, square.sum((0, -1)) if each is None else total(square.sum(-1)))
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, images, collect=True, **arguments)
    axes = {"count": -1, "first": 1}
    return {site.name: sum_calls(site, sown(collected, site.layers[0]), axes, 0) for site in sites}


def _some_vectors(site: Site, layer: Layer, x: Any, batch: int, mean: Any) -> tuple[Any, Any]:
    """Returns up to `VECTORS` feature vectors of every image, evenly spaced, (n, [groups], d), and their weights.

    The weights, (n,), are those of the moments; None if all weigh alike.
    """
    positions = positions_of(site, layer, site.kind, x)
    total = math.prod(positions) // batch
    valid = counted_vectors(site, layer, site.kind, x)
    if not positions or positions[0] % batch or total <= VECTORS:  # a table for all images, or few vectors
        vectors: Any = features(layer, site.kind, x)
    else:
        picks = jnp.asarray(np.linspace(0, total - 1, VECTORS).astype(np.int32))
        vectors = sampled_features(layer, site.kind, x, jnp.tile(picks[None], (batch, 1)))
        valid = None if valid is None else valid.reshape(batch, total)[:, picks]
    vectors = vectors.reshape(-1, *mean.shape).astype(jnp.float32)
    if site.layers[0].calls == 1 and valid is None:
        return vectors, None
    each = jnp.full(len(vectors), vector_weight(site, max(1, total), max(1, min(total, VECTORS))), jnp.float32)
    if valid is None:
        return vectors, each
    counted = valid.reshape(-1)
    return jnp.where(counted.reshape(-1, *(1,) * mean.ndim), vectors, 0), each * counted
