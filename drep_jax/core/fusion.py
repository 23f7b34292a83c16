"""Fusion (Eq. 7, Algorithm 2): the reverse steps at a layer's input become part of the layer.

(W, b, W_D, t) ↦ (W', b'). One reverse step is x̂ = A x + c with A = s·I − g·W_D and
c = σ·z − g·b_D. With k steps, the largest t first, the layer y = W x̂ + b becomes

    W' = W A_k⋯A_1            b' = b + W Σ_j A_k⋯A_{j+1} c_j

and with strength τ it becomes (1 − τ) W + τ W', and likewise for b. `drep_jax.core.reverse_map`
computes W' and b' without a product of two d×d matrices.

A layer without bias that a BatchNorm follows has b = 0, and the running mean takes what b' would be:
mean' = mean − b' (`drep_jax.core.batchnorm`). So fusing is a change of "params" and of
"batch_stats", which `fuse_variables` returns.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drep_jax.core.denoisers import Denoisers, check_params, resolve, resolve_params
from drep_jax.core.layers import Layer
from drep_jax.core.linear_denoiser import dtype_of
from drep_jax.core.matrix_form import bias_from_columns, kernel_from_matrix, kernel_matrix, with_part
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.reverse_map import carry_through_steps, compose_steps, site_steps
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.errors import FusionError
from drep_jax.trees import check_finite, get_in
from drep_jax.typing import AnyArray, Path, Tree

FUSED = ("params", "batch_stats")
"""Collections that fusion may change."""


@standard_promotion
def fuse(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str | None = None,
    steps: int | None = None,
    strength: float | Float[AnyArray, ""] = 1.0,
) -> Tree:
    """Fuses every denoiser into its layers; the result is a parameter tree for the plain backbone.

    W'(τ) = (1 − τ) W + τ W A_k⋯A_1 and likewise for b (Eq. 7). τ = 1 is the paper's fusion; τ = 0
    gives the backbone bit for bit.

    The function is pure. It works under `jit` (static: everything but `params` and `strength`),
    under `vmap` over the strength, `grad` and `pmap`. It computes with `Precision.HIGHEST` in
    float32, or in the parameters' type if that is wider.

    Args:
      params: {"backbone": tree, "denoise": `denoise` subtree or `Denoisers`}.
      sites: from `find_sites`.
      schedule: the one the denoisers were learned on.
      rule: "ddpm" (Eq. 5), "paper" (Eq. 7 as printed), "ddim", "ddim:r" or "affine". None for the
        rule of a `Denoisers`, or "ddpm" for a subtree.
      steps: reverse steps k at each site; None for the number the sites were given.
      strength: τ, a scalar.

    Returns:
      A tree of exactly the structure, shapes and types of `params["backbone"]`.

    Raises:
      FusionError: if denoisers and backbone do not fit, k needs denoisers learned at another t, or a
        constant goes into the running mean of a BatchNorm (`fuse_variables`).
      NonFiniteError: for NaN or Inf, when called with concrete values.
      ConfigError: if `rule` or `steps` differ from those of a `Denoisers`.

    A denoiser K_D = 0.1·I of rule "affine" is the map x̂ = 0.9 x:

    >>> import flax.linen as nn
    >>> from drep_jax import Schedule, find_sites
    >>> sites = find_sites(nn.Sequential([nn.Dense(1)]), jnp.zeros((1, 2)))
    >>> backbone = {"layers_0": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([3.0])}}
    >>> denoise = {"layers_0": {"kernel": 0.1 * jnp.eye(2), "bias": jnp.zeros(2)}}
    >>> fused = fuse({"backbone": backbone, "denoise": denoise}, sites, Schedule(), rule="affine")
    >>> [round(float(w), 3) for w in fused["layers_0"]["kernel"].ravel()]
    [0.9, 1.8]
    """
    fused, constants = _fused(params, tuple(sites), schedule, rule, steps, strength)
    if constants:
        path = "/".join(next(iter(constants))[:-1])
        raise FusionError(
            f"Fusing changes the running mean of {path}, and `fuse` returns parameters only. Call fuse_variables(variables, "
            "denoise, sites, schedule), which returns all variables."
        )
    return fused


@standard_promotion
def fuse_variables(
    variables: Tree,
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str | None = None,
    steps: int | None = None,
    strength: float | Float[AnyArray, ""] = 1.0,
) -> Tree:
    """Fuses every denoiser into the variables of a backbone: `fuse` for any site.

    W' and b' go into "params". Where a layer has no bias and the site was found with
    `batchnorm_bias`, the running mean of the BatchNorm that follows takes b': mean' = mean − b'.

    Args:
      variables: of the backbone, {"params": …, "batch_stats": …, …}.
      denoise: a `denoise` subtree or a `Denoisers`.
      sites, schedule, rule, steps, strength: see `fuse`.

    Returns:
      Variables of exactly the structure, shapes and types of `variables`.

    Raises:
      FusionError, NonFiniteError, ConfigError: see `fuse`; also if there is no running mean where
        one is to be changed.
    """
    params = {"backbone": variables["params"], "denoise": denoise}
    fused, constants = _fused(params, tuple(sites), schedule, rule, steps, strength)
    if not constants:
        return {**variables, "params": fused}
    statistics, missing = variables.get("batch_stats", {}), dict(constants)

    def subtract(path: tuple[Any, ...], leaf: Any) -> Any:
        constant = missing.pop(_names(path), None)
        if constant is None:
            return leaf
        if jnp.shape(leaf) != jnp.shape(constant):
            raise FusionError(
                f"batch_stats/{'/'.join(_names(path))} has shape {jnp.shape(leaf)}, expected {jnp.shape(constant)}: the "
                "variables belong to another network than the sites."
            )
        wide = jnp.promote_types(leaf.dtype, constant.dtype)
        return (jnp.asarray(leaf, wide) - constant.astype(wide)).astype(leaf.dtype)

    statistics = jax.tree_util.tree_map_with_path(subtract, statistics)
    if missing:
        raise FusionError(
            f"The variables have no batch_stats/{'/'.join(next(iter(missing)))}, which takes the constant of a denoiser. Pass "
            "all variables of the backbone, not its parameters alone."
        )
    return {**variables, "params": fused, "batch_stats": statistics}


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(str(getattr(key, "key", key)) for key in path)


def _fused(
    params: Tree, sites: Sequence[Site], schedule: Schedule, rule: str | None, steps: int | None, strength: Any
) -> tuple[Tree, dict[Path, Any]]:
    """Returns fused parameters, and {path of a running mean: what it is to lose}."""
    params, rule, steps = resolve_params(params, rule, steps)
    check_params(params, sites)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(params)):
        check_finite(params, "Refusing to fuse")
    table = site_steps(sites, schedule, rule, steps)
    fused_leaves: dict[Path, Any] = {}
    constants: dict[Path, Any] = {}
    for site in sites:
        denoiser = get_in(params["denoise"], site.path)
        for layer in site.layers:
            weights = get_in(params["backbone"], layer.path)
            if layer.part is not None:  # the parts before it are fused already
                weights = {name: fused_leaves.get((*layer.path, name), leaf) for name, leaf in weights.items()}
            fused = fuse_layer(layer, site, weights, denoiser, table[site.path], strength)
            if layer.norm is not None and "bias" in fused:
                mean = (*layer.norm, "mean")
                constant = fused.pop("bias")
                constants[mean] = constants[mean] + constant if mean in constants else constant
            fused_leaves.update({(*layer.path, name): leaf for name, leaf in fused.items()})

    def replace(path: tuple[Any, ...], leaf: Any) -> Any:
        return fused_leaves.get(tuple(getattr(key, "key", key) for key in path), leaf)

    return jax.tree_util.tree_map_with_path(replace, params["backbone"]), constants


def fuse_layer(
    layer: Layer,
    site: Site,
    weights: Mapping[str, Any],
    denoiser: Mapping[str, Any],
    triples: Float[np.ndarray, "*stack k 3"],
    strength: Any,
    *,
    stacked: bool | None = None,
) -> dict[str, Any]:
    """Fuses a site's denoiser into one of its layers.

    Args:
      layer, site: the layer and the site it belongs to.
      weights: the layer's parameters; only kernel and bias are used.
      denoiser: the site's.
      triples: of the site, see `drep_jax.core.reverse_map.site_steps`.
      strength: τ.
      stacked: whether weights, denoiser and triples have the axis of `nn.scan`; None if the site is
        stacked.

    Returns:
      The fused kernel and bias, in the types of the weights. Of a layer without bias, but with a
      `norm`, the bias is what the running mean loses, at least in float32; there is none if the
      denoiser has no constant.

    Raises:
      FusionError: if a bias is missing, or one is there that the layer does not have.
    """
    affine = {name: weights[name] for name in ("kernel", "bias") if name in weights}
    if layer.bias != ("bias" in affine):
        raise FusionError(
            f"{layer.name}: expected {'a' if layer.bias else 'no'} bias leaf in the backbone's parameters."
        )
    stacked = site.stack is not None if stacked is None else stacked
    if layer.norm is not None and not denoiser.keys().isdisjoint(("bias", "z")):
        kernel = affine["kernel"]
        shape = (*kernel.shape[:1], kernel.shape[-1]) if stacked else kernel.shape[-1:]
        affine["bias"] = jnp.zeros(shape, jnp.promote_types(kernel.dtype, jnp.float32))
    return _fuse_copies(*_forms(layer, site), stacked, affine, dict(denoiser), triples, strength)


def _forms(layer: Layer, site: Site) -> tuple[Layer, Site]:
    """Returns what decides the arithmetic of a layer, and not its name: equal forms share one program."""
    nameless: dict[str, Any] = {"path": (), "stack": None, "scan": None, "reads": 0, "order": 0, "writable": True}
    layer = dataclasses.replace(layer, **nameless, refusal=None, calls=1, spread=False, norm=None, sources=())
    return layer, dataclasses.replace(site, path=(), layers=(), times=(), stack=None)


@functools.partial(jax.jit, static_argnames=("layer", "site", "stacked"))
def _fuse_copies(
    layer: Layer, site: Site, stacked: bool, weights: Any, denoiser: Any, triples: Any, strength: Any
) -> dict[str, Any]:
    wide = jnp.promote_types(weights["kernel"].dtype, jnp.float32)
    wide = jnp.promote_types(wide, dtype_of(denoiser))

    def fuse_copy(weights: Any, denoiser: Any, triples: Any) -> Any:
        whole, denoiser = jax.tree_util.tree_map(lambda leaf: leaf.astype(wide), (weights, denoiser))
        matrix = kernel_matrix(layer, site.kind, whole["kernel"])
        base = {**whole, "kernel": kernel_from_matrix(layer, site.kind, matrix)}
        fused = _compose(layer, site, base, matrix, denoiser, triples.astype(wide))
        tau = jnp.asarray(strength, wide)
        mix = {name: (1 - tau) * leaf + tau * fused[name] for name, leaf in base.items()}  # exact at τ = 0 and 1
        mix["kernel"] = with_part(layer, whole["kernel"], mix["kernel"])
        return {name: leaf.astype(weights[name].dtype) for name, leaf in mix.items()}

    return (jax.vmap(fuse_copy) if stacked else fuse_copy)(weights, denoiser, triples)


def _compose(layer: Layer, site: Site, weights: Any, matrix: Any, denoiser: Any, triples: Any) -> dict[str, Any]:
    matrix, constant = carry_through_steps(site, matrix, denoiser, triples)
    fused = {"kernel": kernel_from_matrix(layer, site.kind, matrix)}
    if "bias" in weights:
        fused["bias"] = weights["bias"] + bias_from_columns(layer, site.kind, constant)
    return fused


def composed_maps(
    params: Tree, sites: Sequence[Site], schedule: Schedule, *, rule: str | None = None, steps: int | None = None
) -> dict[Path, dict[str, Any]]:
    """Returns each site's k steps as one map x̂ = x + x·matrix + constant.

    Args:
      params: {"denoise": `denoise` subtree or `Denoisers`}; anything else in it is not looked at.
      sites, schedule, rule, steps: see `fuse`.

    Returns:
      {site path: {"matrix", "constant"}}, see `drep_jax.core.reverse_map.compose_steps`.
    """
    params, rule, steps = resolve_params(params, rule, steps)
    return compose_steps(params["denoise"], sites, schedule, rule, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


@standard_promotion
def fuse_exact(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str | None = None,
    steps: int | None = None,
    strength: float = 1.0,
    round_back: bool = True,
) -> Tree:
    """Fuses in float64 on the CPU, as exports do, and returns NumPy arrays.

    Args:
      params, sites, schedule, rule, steps, strength: see `fuse`.
      round_back: whether to round once, at the end, to the backbone's own types; False leaves the
        fused leaves in float64.

    Raises:
      FusionError, NonFiniteError, ConfigError: see `fuse`.
    """
    exact = _in_float64(lambda wide: fuse(wide, sites, schedule, rule=rule, steps=steps, strength=strength), params)
    return _rounded(exact, params["backbone"]) if round_back else exact


@standard_promotion
def fuse_variables_exact(
    variables: Tree,
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rule: str | None = None,
    steps: int | None = None,
    strength: float = 1.0,
    round_back: bool = True,
) -> Tree:
    """Fuses like `fuse_variables`, in float64 on the CPU, and returns NumPy arrays.

    Args:
      variables, denoise, sites, schedule, rule, steps, strength: see `fuse_variables`.
      round_back: see `fuse_exact`.

    Returns:
      The variables; collections that fusion cannot change are handed on as they are.

    Raises:
      FusionError, NonFiniteError, ConfigError: see `fuse_variables`.
    """
    denoise, rule, steps = resolve(denoise, rule, steps)
    options: dict[str, Any] = {"rule": rule, "steps": steps, "strength": strength}
    part = {name: tree for name, tree in variables.items() if name in FUSED}
    exact = _in_float64(lambda wide: fuse_variables(wide[0], wide[1], sites, schedule, **options), (part, denoise))
    return {**variables, **(_rounded(exact, part) if round_back else exact)}


def _in_float64(function: Callable[[Any], Tree], arguments: Any) -> Tree:
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.tree_util.tree_map(np.asarray, function(jax.tree_util.tree_map(_float64, arguments)))


def _rounded(exact: Tree, base: Tree) -> Tree:
    return jax.tree_util.tree_map(lambda new, old: new.astype(old.dtype), exact, base)


def _float64(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


class Survival(NamedTuple):
    """The fraction of the change of the weights that a storage type keeps, in 0…1.

    Attributes:
      fraction: of all changed leaves together.
      worst: of the leaf that keeps least.
      worst_layer: path of that leaf, or "" if no leaf changes.
    """

    fraction: float
    worst: float
    worst_layer: str


@standard_promotion
def survival(base: Tree, fused64: Tree, stored: Tree) -> Survival:
    """Measures what rounding to a storage type leaves of the change of the weights.

    fraction = 1 − ‖stored − fused64‖ / ‖fused64 − base‖, at least 0.

    At small t fusion changes W by a few thousandths, less than bfloat16 resolves. Only leaves that
    change count.

    Args:
      base: the backbone's parameters.
      fused64: fused in float64.
      stored: the fused parameters as stored.
    """
    flat = [
        ("/".join(str(getattr(key, "key", key)) for key in path), *map(_float64, leaves))
        for (path, _), *leaves in zip(
            jax.tree_util.tree_leaves_with_path(base),
            *(jax.tree_util.tree_leaves(tree) for tree in (base, fused64, stored)),
            strict=True,
        )
    ]
    squares = [(name, np.sum((kept - new) ** 2), np.sum((new - old) ** 2)) for name, old, new, kept in flat]
    changed = [(name, lost, change) for name, lost, change in squares if change > 0]
    if not changed:
        return Survival(1.0, 1.0, "")
    fractions = {name: max(0.0, 1.0 - float(np.sqrt(lost / change))) for name, lost, change in changed}
    worst = min(fractions, key=lambda name: fractions[name])
    total = np.sqrt(sum(lost for _, lost, _ in changed) / sum(change for *_, change in changed))
    return Survival(max(0.0, 1.0 - float(total)), fractions[worst], worst)
