"""Finds the embedding layers of any Flax Linen module and makes them denoising sites with time steps (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`. A *site* is what one denoiser serves: one layer, or several
that read the very same tensor through the same window (separate query, key and value projections). Layers are found by
tracing the module abstractly, in execution order; nothing is computed.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.layers import NO_IMAGES, Layer, find_layers
from drep_jax.errors import ConfigError, SiteError, did_you_mean
from drep_jax.typing import Path

MAX_PATCH_WIDTH = 2304
"""Widest patch (k²C per group) that kind "auto" denoises as a whole; wider layers get a pointwise denoiser."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One denoiser's place: the layers it serves, the form of its matrix and its time steps.

    Attributes:
      path: path of its first layer, and of the denoiser in the `denoise` tree.
      layers: the layers whose input it denoises.
      kind: "dense", "patch" (a convolution's whole window) or "pointwise" (a convolution's channels).
      width: d, the side of its matrix W_D (per group).
      groups: number of independent matrices, one for each group of a grouped convolution.
      bias: whether it may have a constant: every layer has a bias to put it in, and no border is padded after it.
      stack: number of stacked copies under `nn.scan`, or None.
      times: the time step it was learned at, one for each copy (one number if not stacked).
      steps: reverse steps each copy takes: t, t − 1, …, t − steps + 1.
      rank: of the matrix but for a multiple of the identity, see `drep_jax.core.denoisers`; None for a full matrix.
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

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def denoiser_shape(self) -> tuple[int, ...]:
        """Shape of the denoiser's kernel: ([stack], [groups], width, width)."""
        lead = () if self.stack is None else (self.stack,)
        return lead + (() if self.groups == 1 else (self.groups,)) + (self.width, self.width)


def with_rank(sites: Sequence[Site], rank: int) -> tuple[Site, ...]:
    """Returns the sites with low-rank denoisers where that takes fewer numbers; rank 0 keeps full matrices."""
    return tuple(dataclasses.replace(site, rank=rank if 0 < 2 * rank < site.width else None) for site in sites)


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


def default_pattern(layers: Sequence[Layer]) -> str:
    """Returns the paper's choice: the linears inside each transformer block's MLP, or every layer if there is no MLP."""
    mlp = r"(?i).*mlp[^/]*/[^/]+"
    return mlp if any(re.fullmatch(mlp, layer.name) and not layer.refusal for layer in layers) else ".*"


def select_sites(
    layers: Sequence[Layer],
    pattern: str | Sequence[str] | None = None,
    *,
    kind: str = "auto",
    bias: bool = True,
    max_patch_width: int = MAX_PATCH_WIDTH,
) -> tuple[Site, ...]:
    """Turns the layers that match `pattern` into sites, without time steps yet.

    Args:
      layers: from `find_layers`.
      pattern: regular expression, or several, that must match a layer's whole path, as in `".*/mlp/fc[12]"`; None takes
        `default_pattern` and passes over layers that cannot be sites. Layers that read nothing of the images are passed
        over too, except by a pattern that matches no others.
      kind: for convolutions, "patch" denoises the whole window (exact at borders), "pointwise" its channels; "auto" is
        patch up to `max_patch_width` numbers a group.
      bias: False learns every denoiser through the origin.
      max_patch_width: see `kind`.

    Returns:
      Sites in execution order of their first layers.

    Raises:
      SiteError: if no layer matches, a chosen one cannot be a site, or the pattern is no regular expression.
    """
    if kind not in ("auto", "patch", "pointwise"):
        raise ConfigError(f'Unknown kind of denoiser "{kind}".{did_you_mean(kind, ("auto", "patch", "pointwise"))}')
    patterns = [default_pattern(layers)] if pattern is None else [pattern] if isinstance(pattern, str) else [*pattern]
    try:
        compiled = [re.compile(p) for p in patterns]
    except re.error as error:
        raise SiteError(f"Pattern {patterns} is not a regular expression: {error}.") from error
    matched = [[layer for layer in layers if p.fullmatch(layer.name)] for p in compiled]
    if pattern is None:
        matched = [[layer for layer in group if not layer.refusal] for group in matched]
    matched = [[layer for layer in group if layer.refusal != NO_IMAGES] or group for group in matched]
    chosen = [layer for layer in layers if any(layer in group for group in matched)]
    if not chosen:
        names = [layer.name for layer in layers]
        shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
        raise SiteError(
            f"Pattern {patterns} selects no layer. It must match a whole path; the layers are: {shown or 'none'}."
        )
    if refused := [layer for layer in chosen if layer.refusal]:
        lines = "\n".join(f"  {layer.name}: {layer.refusal}" for layer in refused)
        raise SiteError(f"These selected layers cannot be denoising sites; narrow the pattern {patterns}:\n{lines}")

    shared: dict[Any, list[Layer]] = {}
    for layer in chosen:
        shared.setdefault((layer.reads, layer.scan, layer.kind, layer.axes, layer.window), []).append(layer)
    return tuple(_site(tuple(group), kind, bias, max_patch_width) for group in shared.values())


def _site(layers: tuple[Layer, ...], kind: str, bias: bool, max_patch_width: int) -> Site:
    first = layers[0]
    groups = 1
    if first.window is None:
        form, width = "dense", math.prod(first.kernel_shape[: first.inputs])
    else:
        window = first.window
        channels, patch = first.kernel_shape[-2], math.prod(first.kernel_shape[:-1])
        whole = kind == "patch" or (kind == "auto" and patch <= max_patch_width)
        if window.single and not window.fills_with_zeros:
            whole = False  # the window is the pixel: the same denoiser, without gathering patches
        form, width, groups = ("patch", patch, window.groups) if whole else ("pointwise", channels, window.groups)
        bias = bias and not (form == "pointwise" and window.fills_with_zeros)
    return Site(
        path=first.path,
        layers=layers,
        kind=form,
        width=width,
        groups=groups,
        bias=bias and all(layer.bias for layer in layers),
        stack=first.stack,
    )


def assign_times(sites: Sequence[Site], *, timesteps: int, steps: int = 1, time_scale: float = 1.0) -> tuple[Site, ...]:
    """Gives the i-th of N sites in execution order the time step t = time_scale·steps·(N − i + 1), rounded (Alg. 2).

    Every slice of a stacked site counts as one of the N; slices of one `nn.scan` interleave as they run. A site then
    takes the reverse steps t, t − 1, …, t − steps + 1, so with time_scale 1 (the paper's) the last site ends at t = 1. A
    larger scale assumes more noise at every site; t is never below `steps`.

    Raises:
      ConfigError: if the chain does not fit into `timesteps`, or for `steps` < 1 or a scale that is no number above 0.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ConfigError(f"The number of steps per site must be a whole number of at least 1, got {steps!r}.")
    if isinstance(time_scale, bool) or not (math.isfinite(time_scale) and time_scale > 0):
        raise ConfigError(f"The scale of the time steps must be a number above 0, got {time_scale!r}.")
    first_in_scan: dict[Path, int] = {}
    for site in sites:
        if (scan := site.layers[0].scan) is not None:
            first_in_scan[scan] = min(first_in_scan.get(scan, site.layers[0].order), site.layers[0].order)
    slots = []
    for number, site in enumerate(sites):
        layer = site.layers[0]
        start = layer.order if layer.scan is None else first_in_scan[layer.scan]
        slots += [(start, copy, layer.order, number) for copy in range(site.stack or 1)]
    total = len(slots)
    largest = max(steps, round(time_scale * steps * total))
    if largest > timesteps:
        scaled, less = ("", "") if time_scale == 1 else (f" at time scale {time_scale:g}", "a smaller scale, ")
        raise ConfigError(
            f"{total} sites of {steps} step(s) each need {largest} time steps{scaled}, but the schedule has "
            f"{timesteps}; take fewer sites or steps, {less}or a longer schedule."
        )
    times: dict[tuple[int, int], int] = {}
    for position, (_, copy, _, number) in enumerate(sorted(slots)):
        times[number, copy] = max(steps, round(time_scale * steps * (total - position)))
    return tuple(
        dataclasses.replace(site, steps=steps, times=tuple(times[number, copy] for copy in range(site.stack or 1)))
        for number, site in enumerate(sites)
    )


def find_sites(
    module: nn.Module,
    *args: Any,
    pattern: str | Sequence[str] | None = None,
    timesteps: int = 1000,
    steps: int = 1,
    time_scale: float = 1.0,
    kind: str = "auto",
    bias: bool = True,
    **kwargs: Any,
) -> tuple[Site, ...]:
    """Finds, selects and orders the sites of `module`: `find_layers`, `select_sites` and `assign_times` in one call."""
    return assign_times(
        select_sites(find_layers(module, *args, **kwargs), pattern, kind=kind, bias=bias),
        timesteps=timesteps,
        steps=steps,
        time_scale=time_scale,
    )


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of a backbone the sites cover."""

    layers: int
    candidates: int
    kernel_share: float


def coverage(sites: Sequence[Site], params: Any) -> Coverage:
    """Returns how many linear layers are denoised and their share of all numbers in leaves called `kernel`."""
    kernels = {
        tuple(key.key for key in path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if getattr(path[-1], "key", None) == "kernel"
    }
    covered = {(*layer.path, "kernel") for site in sites for layer in site.layers}
    total = sum(kernels.values())
    return Coverage(
        layers=len(covered),
        candidates=len(kernels),
        kernel_share=sum(size for path, size in kernels.items() if path in covered) / total if total else 0.0,
    )
