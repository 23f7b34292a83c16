"""Denoisers of all sites: the `denoise` subtree, and `Denoisers`, which also says how to use it.

For a site at path a/b the subtree holds

    denoise["a"]["b"] = {"kernel": W_Dᵀ, "bias": b_D, "z": …}

in Flax layout, so that D(x) = x·kernel + bias. The shapes are ([stack], [groups], d, d) and
([stack], [groups], d). If noise was sampled, z has shape ([stack], steps, [groups], d). `bias` and
`z` are absent where a site may have no constant. A site with a `rank` has three factors in place of
`kernel`, see `drep_jax.core.linear_denoiser`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.linear_denoiser import FACTORS, dtype_of, has_matrix
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.reverse_map import compose_steps
from drep_jax.core.schedule import Schedule, is_single_step
from drep_jax.core.sites import Site
from drep_jax.errors import ConfigError, FusionError
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Tree

DEFAULT_RULE = "ddpm"
"""Rule of a plain `denoise` subtree unless another is given."""


NO_PLACE = (
    "Before a BatchNorm a layer without bias takes a constant with --config.sites.batchnorm_bias=True, in Python "
    "find_sites(…, batchnorm_bias=True)."
)
"""What is said of a constant at a site that has no place for it."""


WHOLE = (
    "It has one over the whole concatenation that {layer} reads. Find the sites with --config.sites.concatenated=full, in "
    'Python find_sites(…, concatenated="full").'
)
"""What is said where a denoiser over a concatenation meets sites with one a source."""


# ---------------------------------------------------------------------------------------------------------------------
# The value
# ---------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=("tree",), meta_fields=("rule", "steps"))
@dataclasses.dataclass(frozen=True)
class Denoisers:
    """A `denoise` subtree with its reverse-step rule and its number of steps.

    A pytree whose only dynamic part is `tree`; rule and steps are static under `jit`. Every
    function that takes a `denoise` subtree also takes this value, and then needs no `rule=` and
    `steps=`.

    Attributes:
      tree: the `denoise` subtree.
      rule: see `drep_jax.core.schedule.reverse_step`.
      steps: reverse steps at each site; None for the number that the sites were given, or 1 for a
        rule that is a single step.

    Raises:
      ConfigError: for an unknown rule, or several steps of a rule that is a single step.

    >>> tree = {"fc": {"kernel": jnp.array([[0.5]])}}
    >>> maps = Denoisers(tree, "affine")
    >>> maps.keywords
    {'rule': 'affine', 'steps': 1}
    >>> maps.scaled(0.5).tree["fc"]["kernel"].tolist()
    [[0.25]]
    """

    tree: Tree
    rule: str = DEFAULT_RULE
    steps: int | None = None

    def __post_init__(self) -> None:
        if not is_single_step(self.rule):
            return
        if self.steps is None:
            object.__setattr__(self, "steps", 1)
        elif self.steps != 1:
            raise ConfigError(f'Rule "{self.rule}" is one single step; it cannot be taken {self.steps} times.')

    @property
    def keywords(self) -> dict[str, Any]:
        """Rule and steps as keyword arguments, for functions given the plain tree."""
        return {"rule": self.rule, "steps": self.steps}

    def check(self, backbone: Tree, sites: Sequence[Site]) -> None:
        """Checks that every denoiser fits its site and the backbone, see `check_params`."""
        check_params({"backbone": backbone, "denoise": self.tree}, sites)

    def as_affine(self, sites: Sequence[Site], schedule: Schedule) -> "Denoisers":
        """Returns the same maps for rule "affine": the steps of each site composed."""
        return Denoisers(as_affine(self.tree, sites, schedule, **self.keywords), "affine", 1)

    def scaled(self, strength: float) -> "Denoisers":
        """Returns denoisers whose full fusion is the fusion of these with strength τ.

        Raises:
          ConfigError: unless the rule is "affine", where x̂ = x − D(x) is linear in the denoiser.
        """
        if self.rule != "affine":
            raise ConfigError(
                f'Only maps of rule "affine" scale with the strength, and these are for rule "{self.rule}". '
                "Compose them first: denoisers.as_affine(sites, schedule).scaled(strength)."
            )
        return dataclasses.replace(self, tree=scaled(self.tree, strength))

    def with_noise(self, sites: Sequence[Site], key: jax.Array) -> "Denoisers":
        """Returns the same denoisers with a fixed z for each step, see `sample_noise`."""
        return dataclasses.replace(self, tree=sample_noise(self.tree, sites, key))


def resolve(
    denoise: Tree | Denoisers, rule: str | None = None, steps: int | None = None
) -> tuple[Tree, str, int | None]:
    """Returns the plain subtree, the rule and the steps that a function is to use.

    This is the one place that decides between a `Denoisers` value and the keywords `rule=` and
    `steps=` beside it.

    Args:
      denoise: a `denoise` subtree or a `Denoisers`.
      rule: keyword of the caller; None for the value's own, or `DEFAULT_RULE` for a subtree.
      steps: keyword of the caller; None for the value's own.

    Raises:
      ConfigError: if a keyword differs from what a `Denoisers` says.
    """
    if not isinstance(denoise, Denoisers):
        return denoise, DEFAULT_RULE if rule is None else rule, steps
    for name, keyword in (("rule", rule), ("steps", steps)):
        value = getattr(denoise, name)
        if keyword is not None and keyword != value:
            raise ConfigError(
                f"The denoisers are for {name}={value!r}, but the call says {name}={keyword!r}. Leave the keyword out, "
                f"or use dataclasses.replace(denoisers, {name}={keyword!r})."
            )
    return denoise.tree, denoise.rule, denoise.steps


def resolve_params(params: Tree, rule: str | None = None, steps: int | None = None) -> tuple[Tree, str, int | None]:
    """Returns {"backbone": …, "denoise": plain subtree} with rule and steps, see `resolve`."""
    denoise = params.get("denoise") if isinstance(params, Mapping) else None
    tree, rule, steps = resolve(denoise, rule, steps)
    if isinstance(denoise, Denoisers):
        params = {**params, "denoise": tree}
    return params, rule, steps


# ---------------------------------------------------------------------------------------------------------------------
# The subtree
# ---------------------------------------------------------------------------------------------------------------------


@standard_promotion
def init_denoise(sites: Sequence[Site], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns denoisers that predict no noise: zeros, for which Algorithm 1's l2 loss is 1.

    Args:
      sites: from `find_sites`.
      dtype: type of the leaves.

    Returns:
      The `denoise` subtree.
    """
    tree: dict[str, Any] = {}
    for index, site in enumerate(sites):
        shapes = leaf_shapes(site)
        names = FACTORS if site.rank else ("kernel",)
        leaves = {name: jnp.zeros(shapes[name], dtype) for name in (*names, *(("bias",) if site.bias else ()))}
        if site.rank:  # with both factors zero neither would get a gradient; any other start will do
            key = jax.random.fold_in(jax.random.key(0), index)
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
    """Returns the subtree with a fixed z ~ N(0, I) for each reverse step.

    It is drawn once and kept, so that fusing twice gives the same weights.

    Args:
      denoise: the `denoise` subtree.
      sites: the sites to draw for, each with a bias.
      key: of the draw.

    Raises:
      FusionError: if a site has no denoiser, or may have no constant to put W z in.
    """
    for index, site in enumerate(sites):
        if not site.bias:
            raise FusionError(
                f"{site.name}: sampled noise is a constant, and this site may not have one. Use zero noise. {NO_PLACE}"
            )
        leaves = _leaves_of(denoise, site)
        z = jax.random.normal(jax.random.fold_in(key, index), noise_shape(site), dtype_of(leaves))
        denoise = set_in(denoise, site.path, {**leaves, "z": z})
    return denoise


def scaled(denoise: Tree, strength: float) -> Tree:
    """Returns maps of rule "affine" whose full fusion is the fusion of `denoise` with strength τ.

    W'(τ) = W + τ·(W A − W) with A = I − W_D, so it is enough to scale W_D and b_D by τ.
    """
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf * np.asarray(strength, leaf.dtype)), denoise)


def as_affine(
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str | None = None,
    steps: int | None = None,
) -> Tree:
    """Returns the subtree for rule "affine" that is the same map as `steps` steps of `rule`.

    Args:
      denoise: a `denoise` subtree or a `Denoisers`.
      sites, schedule, rule, steps: see `drep_jax.core.fusion.fuse`.

    Returns:
      {"kernel": (I − A)ᵀ, "bias": −c} at each site, composed in float64 and rounded once to
      float32.
    """
    denoise, rule, steps = resolve(denoise, rule, steps)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), denoise)
        maps = compose_steps(wide, sites, schedule, rule, steps)
    tree: Tree = {}
    for site in sites:
        leaves = {"kernel": maps[site.path]["matrix"], "bias": maps[site.path].get("constant")}
        narrow = {name: -np.asarray(leaf, np.float32) for name, leaf in leaves.items() if leaf is not None}
        tree = set_in(tree, site.path, narrow)
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_params(params: Tree, sites: Sequence[Site]) -> None:
    """Checks that `params` is {"backbone", "denoise"} and that every denoiser fits its layers.

    Raises:
      FusionError: names the site or leaf, its shape and the expected shape.
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
            parts = [s.layers[0] for s in sites if s.layers[0].part is not None and s.layers[0].path == names[:-1]]
            whole = f" {WHOLE.format(layer=parts[0].name)}" if parts else ""
            raise FusionError(f"denoise/{'/'.join(names)}: no selected site has such a leaf.{whole}")
    for site in sites:
        _check_denoiser(site, _leaves_of(denoise, site))
        for layer in site.layers:
            node = get_in(backbone, layer.path)
            expected = (() if layer.stack is None else (layer.stack,)) + layer.whole_shape
            shape = tuple(node["kernel"].shape) if isinstance(node, Mapping) and "kernel" in node else None
            if shape != expected:
                raise FusionError(f"{layer.name}: the backbone's kernel has shape {shape}, expected {expected}.")


def _leaves_of(denoise: Tree, site: Site) -> Mapping[str, Any]:
    leaves = get_in(denoise, site.path)
    if not has_matrix(leaves):
        first = site.layers[0]
        whole = ""
        if first.part is not None and has_matrix(get_in(denoise, first.path)):
            whole = f" {WHOLE.format(layer=first.name)}"
        raise FusionError(f"{site.name}: there is no denoiser for this site in the `denoise` subtree.{whole}")
    return leaves


def _check_denoiser(site: Site, leaves: Mapping[str, Any]) -> None:
    expected = leaf_shapes(site)
    for name, leaf in leaves.items():
        if name in ("bias", "z") and not site.bias:
            raise FusionError(
                f"{site.name}: the denoiser has a constant ({name}), but the site has nowhere to put it: a layer "
                f"without bias, or zeros padded after a pointwise denoiser. Learn it through the origin. {NO_PLACE}"
            )
        if tuple(leaf.shape) != expected[name]:
            raise FusionError(
                f"{site.name}: the denoiser's {name} has shape {tuple(leaf.shape)}, expected {expected[name]}."
            )
