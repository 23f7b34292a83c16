"""Denoising sites: which layers are denoised, and at which time steps (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`, see `drep_jax.core.layers`. A *site* is
the place of one denoiser: the input of one layer, or of several layers that read the very same
tensor through the same window (separate query, key and value projections).
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.batchnorm import with_norms
from drep_jax.core.layers import IDLE, Layer, find_layers
from drep_jax.core.promotion import standard_promotion
from drep_jax.errors import ConfigError, SiteError, did_you_mean
from drep_jax.typing import Path, Tree

MAX_PATCH_WIDTH = 2304
"""Largest patch width (k²C per group) for which kind "auto" takes a patch denoiser: 3×3 windows of 256 channels."""


BLOCKS = "blocks"
"""One denoiser for each source of a concatenation: a block-diagonal one for the layer."""


CONCATENATED = (BLOCKS, "full")
"""Forms of the denoiser of a concatenation."""


POSITIONS = "positions"
"""Calls of a layer weigh as many feature vectors of an image as they read."""


CALL_WEIGHTS = (POSITIONS, "calls")
"""What weighs alike where a layer is called several times: its feature vectors, or its calls."""


SITE_PATTERN = "site_pattern"
"""Attribute of a module: the pattern that is taken where none is given."""


@dataclasses.dataclass(frozen=True)
class Site:
    """The place of one denoiser: its layers, the shape of its matrix and its time steps.

    Attributes:
      path: of its denoiser in the `denoise` subtree. It is that of its first layer, or of a part below
        it (`drep_jax.core.layers.Part`).
      layers: the layers whose input is denoised, or their parts that read one source of a
        concatenation.
      kind: "dense", "patch" (a convolution's whole window) or "pointwise" (a convolution's
        channels).
      width: d, the number of rows and columns of its matrix W_D (per group).
      groups: number of matrices, one for each group of a grouped convolution.
      bias: whether the denoiser may have a constant. It may if every layer has a place to put it in,
        and no zeros are padded after it. The place is the layer's bias, or the running mean of
        `Layer.norm`.
      stack: number of stacked copies under `nn.scan`, or None.
      times: t of each copy, one number if not stacked; () before `assign_times`.
      steps: reverse steps of each copy: t, t − 1, …, t − steps + 1.
      rank: rank of the matrix minus a multiple of the identity, see
        `drep_jax.core.linear_denoiser`; None for a full matrix.
      call_weights: what weighs alike where the layers are called several times, see `CALL_WEIGHTS`.
    """

    path: Path
    layers: tuple[Layer, ...]
    kind: str
    width: int
    groups: int
    bias: bool
    stack: int | None
    times: tuple[int, ...] = ()
    steps: int = 1
    rank: int | None = None
    call_weights: str = POSITIONS

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def denoiser_shape(self) -> tuple[int, ...]:
        """Shape of a full denoiser's kernel: ([stack], [groups], width, width)."""
        lead = () if self.stack is None else (self.stack,)
        return lead + (() if self.groups == 1 else (self.groups,)) + (self.width, self.width)


def with_rank(sites: Sequence[Site], rank: int) -> tuple[Site, ...]:
    """Returns the sites with low-rank denoisers where these have fewer parameters.

    Args:
      sites: from `select_sites`.
      rank: r; 0 for full matrices everywhere.

    >>> import flax.linen as nn
    >>> sites = find_sites(nn.Sequential([nn.Dense(3)]), jax.ShapeDtypeStruct((1, 6), "float32"))
    >>> [with_rank(sites, rank)[0].rank for rank in (0, 2, 3)]
    [None, 2, None]
    """
    return tuple(dataclasses.replace(site, rank=rank if 0 < 2 * rank < site.width else None) for site in sites)


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


def default_pattern(layers: Sequence[Layer]) -> str:
    """Returns the paper's choice: the layers inside each MLP, or every layer without any MLP."""
    mlp = r"(?i).*mlp[^/]*/[^/]+"
    return mlp if any(re.fullmatch(mlp, layer.name) and not layer.refusal for layer in layers) else ".*"


def pattern_of(module: nn.Module) -> str | None:
    """Returns the pattern that a network names for itself, or None.

    A network whose features are not those of MLPs alone says which layers are denoised unless the
    user says otherwise: `site_pattern = ".*"` in its class takes all that can be. Written without a
    type, it is no field.
    """
    return getattr(module, SITE_PATTERN, None)


def select_sites(
    layers: Sequence[Layer],
    pattern: str | Sequence[str] | None = None,
    *,
    kind: str = "auto",
    bias: bool = True,
    max_patch_width: int = MAX_PATCH_WIDTH,
    concatenated: str = BLOCKS,
    call_weights: str = POSITIONS,
    otherwise: str | None = None,
) -> tuple[Site, ...]:
    """Makes sites of the layers that match `pattern`, without time steps yet.

    Args:
      layers: from `find_layers`.
      pattern: a regular expression, or several, that must match a layer's whole path, as in
        `".*/mlp/fc[12]"`. None takes `otherwise` and skips layers that cannot be sites.
        Layers whose input does not depend on the images, and those that no output depends on, are
        skipped too, unless a pattern matches no others.
      kind: for convolutions: "patch" denoises the whole window (exact at borders), "pointwise" the
        channels of each pixel; "auto" is patch up to `max_patch_width`.
      bias: whether denoisers may have a constant; False learns all of them through the origin.
      max_patch_width: k²C per group.
      concatenated: for layers that read a concatenation of tensors along its channels: "blocks" for
        one denoiser a source, "full" for one over all of them.
      call_weights: for layers that are called several times: "positions" for equal weights of all
        feature vectors, "calls" for equal weights of all calls.
      otherwise: the pattern to take for None, see `pattern_of`; None for `default_pattern`.

    Returns:
      Sites in execution order of their first layers.

    Raises:
      SiteError: if no layer matches, a matching one cannot be a site, or the pattern is no regular
        expression.
      ConfigError: for an unknown kind.
    """
    if concatenated not in CONCATENATED:
        raise ConfigError(
            f'Unknown form "{concatenated}" of the denoiser of a concatenation.{did_you_mean(concatenated, CONCATENATED)}'
        )
    if call_weights not in CALL_WEIGHTS:
        raise ConfigError(
            f'Unknown weights "{call_weights}" of the calls of a layer.{did_you_mean(call_weights, CALL_WEIGHTS)}'
        )
    if isinstance(max_patch_width, bool) or not max_patch_width >= 1:
        raise ConfigError(f"The largest width of a patch denoiser must be at least 1, got {max_patch_width!r}.")
    if kind not in ("auto", "patch", "pointwise"):
        raise ConfigError(f'Unknown kind of denoiser "{kind}".{did_you_mean(kind, ("auto", "patch", "pointwise"))}')
    usual = otherwise or default_pattern(layers)
    patterns = [usual] if pattern is None else [pattern] if isinstance(pattern, str) else [*pattern]
    try:
        compiled = [re.compile(p) for p in patterns]
    except re.error as error:
        raise SiteError(f"Pattern {patterns} is not a regular expression: {error}.") from error
    matched = [[layer for layer in layers if p.fullmatch(layer.name)] for p in compiled]
    if pattern is None:
        matched = [[layer for layer in group if not layer.refusal] for group in matched]
    matched = [[layer for layer in group if layer.refusal not in IDLE] or group for group in matched]
    selected = [layer for layer in layers if any(layer in group for group in matched)]
    if not selected:
        names = [layer.name for layer in layers]
        listing = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
        raise SiteError(
            f"Pattern {patterns} selects no layer. It must match a whole path; the layers are: {listing or 'none'}."
        )
    if refused := [layer for layer in selected if layer.refusal]:
        lines = "\n".join(f"  {layer.name}: {layer.refusal}" for layer in refused)
        raise SiteError(f"These selected layers cannot be denoising sites; narrow the pattern {patterns}:\n{lines}")

    by_input: dict[Any, list[Layer]] = {}
    for layer in selected:
        by_input.setdefault((layer.reads, layer.scan, layer.kind, layer.axes, layer.window), []).append(layer)
    split = (
        zip(*(layer.parts() if concatenated == BLOCKS else (layer,) for layer in group), strict=True)
        for group in by_input.values()
    )
    sites = (_site(layers, kind, bias, max_patch_width) for parts in split for layers in parts)
    return tuple(dataclasses.replace(site, call_weights=call_weights) for site in sites)


def _site(layers: tuple[Layer, ...], kind: str, bias: bool, max_patch_width: int) -> Site:
    """Makes the site of layers, or of parts of them, that read the same tensor through the same window."""
    first = layers[0]
    groups = 1
    if first.window is None:
        site_kind, width = "dense", math.prod(first.kernel_shape[: first.inputs])
    else:
        window = first.window
        channels, patch_width = first.kernel_shape[-2], math.prod(first.kernel_shape[:-1])
        is_patch = kind == "patch" or (kind == "auto" and patch_width <= max_patch_width)
        if window.single and not window.fills_with_zeros:
            is_patch = False  # the same denoiser, without gathering
        site_kind, width = ("patch", patch_width) if is_patch else ("pointwise", channels)
        groups = window.groups
        bias = bias and not (site_kind == "pointwise" and window.fills_with_zeros)
    return Site(
        path=first.path if first.part is None else (*first.path, first.part.name),
        layers=layers,
        kind=site_kind,
        width=width,
        groups=groups,
        bias=bias and all(layer.bias or layer.norm for layer in layers),
        stack=first.stack,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Time steps
# ---------------------------------------------------------------------------------------------------------------------


def assign_times(sites: Sequence[Site], *, timesteps: int, steps: int = 1, time_scale: float = 1.0) -> tuple[Site, ...]:
    """Gives site i of N, in execution order, its time step t (Algorithm 2).

    t = time_scale·steps·(N − i + 1), rounded, and at least `steps`.

    Every copy of a stacked site counts as one of the N, and the copies of one `nn.scan` interleave
    as they run. The sites of one layer, one for each source of a concatenation, count as one and share
    their t. A site takes the reverse steps t, t − 1, …, t − steps + 1. With time_scale 1, as in
    the paper, the last site ends at t = 1. A larger scale assumes more noise at every site.

    Args:
      sites: from `select_sites`.
      timesteps: T of the schedule.
      steps: reverse steps k at each site.
      time_scale: factor on t.

    Raises:
      ConfigError: if the largest t exceeds `timesteps`, `steps` < 1, or the scale is not above 0.

    >>> import flax.linen as nn
    >>> net = nn.Sequential([nn.Dense(3), nn.Dense(3), nn.Dense(3)])
    >>> sites = find_sites(net, jax.ShapeDtypeStruct((1, 6), "float32"), steps=2)
    >>> [site.times for site in sites]
    [(6,), (4,), (2,)]
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ConfigError(f"The number of steps per site must be a whole number of at least 1, got {steps!r}.")
    if isinstance(time_scale, bool) or not (math.isfinite(time_scale) and time_scale > 0):
        raise ConfigError(f"The scale of the time steps must be a number above 0, got {time_scale!r}.")
    first_in_scan: dict[Path, int] = {}
    for site in sites:
        if (scan := site.layers[0].scan) is not None:
            first_in_scan[scan] = min(first_in_scan.get(scan, site.layers[0].order), site.layers[0].order)
    slots = set()  # (start of the layer or its scan, copy, order of the layer)
    for site in sites:
        layer = site.layers[0]
        start = layer.order if layer.scan is None else first_in_scan[layer.scan]
        slots |= {(start, copy, layer.order) for copy in range(site.stack or 1)}
    total = len(slots)
    largest = max(steps, round(time_scale * steps * total))
    if largest > timesteps:
        scaled, smaller = ("", "") if time_scale == 1 else (f" at time scale {time_scale:g}", "a smaller scale, ")
        raise ConfigError(
            f"{total} sites of {steps} step(s) each need {largest} time steps{scaled}, but the schedule has "
            f"{timesteps}; take fewer sites or steps, {smaller}or a longer schedule."
        )
    times: dict[tuple[int, int], int] = {}
    for rank, (_, copy, order) in enumerate(sorted(slots)):
        times[order, copy] = max(steps, round(time_scale * steps * (total - rank)))
    return tuple(
        dataclasses.replace(
            site, steps=steps, times=tuple(times[site.layers[0].order, copy] for copy in range(site.stack or 1))
        )
        for site in sites
    )


@standard_promotion
def find_sites(
    module: nn.Module,
    *args: Any,
    pattern: str | Sequence[str] | None = None,
    timesteps: int = 1000,
    steps: int = 1,
    time_scale: float = 1.0,
    kind: str = "auto",
    bias: bool = True,
    batchnorm_bias: bool = False,
    max_patch_width: int = MAX_PATCH_WIDTH,
    concatenated: str = BLOCKS,
    call_weights: str = POSITIONS,
    **kwargs: Any,
) -> tuple[Site, ...]:
    """Finds the sites of a network: `find_layers`, `select_sites` and `assign_times` in one call.

    Args:
      module: an unbound Flax Linen module.
      *args: its inputs, as arrays or `jax.ShapeDtypeStruct`.
      pattern: see `select_sites`; None takes the module's own `site_pattern`, if it has one.
      kind, bias, max_patch_width, concatenated, call_weights: see `select_sites`.
      timesteps, steps, time_scale: see `assign_times`.
      batchnorm_bias: whether denoisers may also have a constant before a layer without bias that a
        BatchNorm follows. It goes into the BatchNorm's running mean, so fusing then changes
        "batch_stats" as well: see `drep_jax.core.fusion.fuse_variables`.
      **kwargs: for the module, not traced.

    Returns:
      Sites in execution order.

    Raises:
      SiteError, ConfigError: see `select_sites` and `assign_times`.

    >>> import flax.linen as nn
    >>> net = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    >>> for site in find_sites(net, jax.ShapeDtypeStruct((1, 3), "float32")):
    ...     print(site.name, site.kind, site.denoiser_shape, site.times)
    layers_0 dense (3, 3) (2,)
    layers_1 dense (4, 4) (1,)
    """
    layers = find_layers(module, *args, **kwargs)
    if batchnorm_bias:
        layers = with_norms(layers, module, *args, **kwargs)
    return assign_times(
        select_sites(
            layers,
            pattern,
            kind=kind,
            bias=bias,
            max_patch_width=max_patch_width,
            concatenated=concatenated,
            call_weights=call_weights,
            otherwise=pattern_of(module),
        ),
        timesteps=timesteps,
        steps=steps,
        time_scale=time_scale,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Coverage
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of a backbone the sites cover.

    Attributes:
      layers: layers that are denoised.
      candidates: parameter leaves called `kernel`, of layers that the outputs depend on.
      kernel_share: fraction of all entries of such leaves that belong to denoised layers.
    """

    layers: int
    candidates: int
    kernel_share: float


def coverage(sites: Sequence[Site], params: Tree, idle: Collection[Path] = ()) -> Coverage:
    """Returns how much of a backbone the sites cover.

    Args:
      sites: of the backbone.
      params: its parameters, or their shapes.
      idle: paths of layers that no output depends on, which do not count.
    """
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kernels = {
        path: leaf.size for path, leaf in leaves.items() if path[-1] == "kernel" and tuple(path[:-1]) not in idle
    }
    denoised = {(*layer.path, "kernel") for site in sites for layer in site.layers}
    total = sum(kernels.values())
    return Coverage(
        layers=len(denoised),
        candidates=len(kernels),
        kernel_share=sum(size for path, size in kernels.items() if path in denoised) / total if total else 0.0,
    )
