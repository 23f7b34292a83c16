"""Finds the embedding layers of any Flax Linen module and makes them denoising sites with time steps (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`. A *site* is what one denoiser serves: one layer, or several
that read the very same tensor through the same window (separate query, key and value projections). Layers are found by
tracing the module abstractly, in execution order; nothing is computed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.dependence import independent, mark
from drep_jax.errors import ConfigError, SiteError, did_you_mean

Path = tuple[str, ...]

COLLECTION = "denoise"
"""Variable collection that sites write to; a module that lifts layers with `nn.scan` has to declare it."""

MAX_PATCH_WIDTH = 2304
"""Widest patch (k²C per group) that kind "auto" denoises as a whole; wider layers get a pointwise denoiser."""

NO_IMAGES = "what it reads is the same for all images, so it holds no feature of theirs to denoise"
"""Refusal of a layer that works on a constant or on parameters, such as one that computes position biases."""


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution reads its input; the attributes are those of `flax.linen.Conv`."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def single(self) -> bool:
        """Whether the window is one pixel."""
        return math.prod(self.kernel_size) == 1

    @property
    def fills_with_zeros(self) -> bool:
        """Whether zeros can stand where a pointwise denoiser would have put its constant: padding or input dilation."""
        if any(d > 1 for d in self.input_dilation):
            return True
        if isinstance(self.padding, str):
            return self.padding in ("SAME", "SAME_LOWER", "CAUSAL") and not self.single
        return any(low > 0 or high > 0 for low, high in self.padding)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a backbone, as the trace saw it.

    Attributes:
      path: where its parameters are, as in `params[path[0]][path[1]]…["kernel"]`.
      kind: "dense" or "conv".
      kernel_shape: shape of the kernel as the layer sees it (without the axis that `nn.scan` stacks).
      inputs: how many leading (Dense) axes of the kernel are contracted.
      axes: which axes of the input are contracted, counted from the end.
      window: for a convolution, how it reads its input.
      bias: whether it has one.
      stack: number of stacked copies under `nn.scan`, or None.
      scan: path of the module that `nn.scan` repeats, or None.
      reads: number of the tensor it reads; equal numbers are the very same tensor.
      order: position in execution order.
      writable: whether the collection "denoise" can be written where the layer is called.
      refusal: why it cannot be a site, or None.
    """

    path: Path
    kind: str
    kernel_shape: tuple[int, ...]
    inputs: int
    axes: tuple[int, ...]
    window: Window | None
    bias: bool
    stack: int | None
    scan: Path | None
    reads: int
    order: int
    writable: bool
    refusal: str | None = None

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def kernel_size(self) -> int:
        """Numbers in its kernel, all stacked copies counted."""
        return math.prod(self.kernel_shape) * (self.stack or 1)


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
      rank: of the matrix but for a multiple of the identity, see `drep_jax.low_rank`; None for a full matrix.
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
# Discovery
# ---------------------------------------------------------------------------------------------------------------------


def find_layers(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Finds the linear layers of `module` in the order in which they run.

    The module is traced abstractly, once to initialise and once to apply. Layers inside `nn.remat`, `nn.jit` and
    `nn.scan` are found at their parameters' path. A layer that is called several times is one layer. What looks like a
    layer but cannot be fused exactly (masked kernels, an overridden `__call__`, transformed weights, …), or reads
    nothing that depends on the inputs, is listed with the reason in `refusal`.

    Args:
      module: an unbound Flax Linen module.
      *args: its inputs, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: passed on unchanged, not traced.

    Returns:
      The layers; layer `reads` numbers say which ones read the very same tensor.
    """
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = nn.unbox(jax.eval_shape(lambda *a: module.init(keys, *a, **kwargs), *args))
    params = variables.get("params", {})
    found: dict[Path, Layer] = {}
    tensors: list[Any] = []  # keeps every traced input alive, so that identities stay unique

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, (nn.Dense, nn.DenseGeneral, nn.Conv)) and context.method_name == "__call__":
            x = args[0] if args else kwargs["inputs"]
            if layer.path not in found:
                reads = next((i for i, tensor in enumerate(tensors) if tensor is x), len(tensors))
                tensors.append(x)
                found[layer.path] = _describe(layer, x, _lookup(params, layer.path), reads, len(found))
            marked = mark("/".join(layer.path), x)
            args, kwargs = ((marked, *args[1:]), kwargs) if args else (args, {**kwargs, "inputs": marked})
        return next_fun(*args, **kwargs)

    def trace(variables: Any, *args: Any) -> Any:
        with nn.intercept_methods(record):
            return module.apply(variables, *args, rngs={"dropout": keys["dropout"]}, mutable=[COLLECTION], **kwargs)

    constant = independent(trace, variables, *args)
    return tuple(
        dataclasses.replace(layer, refusal=NO_IMAGES) if layer.name in constant and not layer.refusal else layer
        for layer in found.values()
    )


def _lookup(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _tuple(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _window(layer: nn.Conv) -> Window:
    size = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
    padding = nn.linear.canonicalize_padding(layer.padding, len(size))
    return Window(
        kernel_size=size,
        strides=_tuple(layer.strides, len(size)),
        padding=padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding),
        input_dilation=_tuple(layer.input_dilation, len(size)),
        kernel_dilation=_tuple(layer.kernel_dilation, len(size)),
        groups=layer.feature_group_count,
    )


def _describe(layer: nn.Module, x: Any, outer: Any, reads: int, order: int) -> Layer:
    kernel: Any = layer.get_variable("params", "kernel")
    scope: Any = layer.scope
    lifts = [re.findall(r"(\w+)\(", part) for part in scope.debug_path]  # as in "remat(scan(encoder))"
    transforms = [name for names in lifts for name in names]
    scans = [depth for depth, names in enumerate(lifts) if "scan" in names]
    outer_shape: Any = getattr(outer.get("kernel"), "shape", None) if isinstance(outer, Mapping) else None
    stacked = outer_shape is not None and outer_shape != kernel.shape

    if isinstance(layer, nn.Conv):
        kind, window, axes, inputs = "conv", _window(layer), (-1,), 0
    else:
        kind, window = "dense", None
        given = getattr(layer, "axis", -1)
        given = (given,) if isinstance(given, int) else tuple(given)
        axes = tuple(sorted(a if a < 0 else a - x.ndim for a in given))
        inputs = len(axes)
    return Layer(
        path=layer.path,
        kind=kind,
        kernel_shape=tuple(kernel.shape),
        inputs=inputs,
        axes=axes,
        window=window,
        bias=layer.use_bias,
        stack=int(outer_shape[0]) if stacked else None,
        scan=layer.path[: scans[0] + 1] if stacked and scans else None,
        reads=reads,
        order=order,
        writable=layer.is_mutable_collection(COLLECTION),
        refusal=_refusal(layer, kernel.shape, outer_shape, transforms, stacked),
    )


def _refusal(
    layer: Any, shape: tuple[int, ...], outer: tuple[int, ...] | None, transforms: list[str], stacked: bool
) -> str | None:
    owner = next(cls for cls in type(layer).__mro__ if "__call__" in vars(cls))
    if vars(owner)["__call__"].__module__ != nn.linear.__name__:
        return f"{type(layer).__name__} overrides __call__, so it need not be a linear map"
    if not layer.path:
        return "the module is itself the layer; wrap it in a module that has it as a part"
    if outer is None:
        return "its kernel is not in the parameter tree at its own path"
    if unknown := sorted(set(transforms) - {"scan", "remat", "checkpoint", "jit", "vmap", "named_call"}):
        return f"its weights pass through {', '.join(unknown)} before they are used"
    if getattr(layer, "mask", None) is not None:
        return "its kernel is masked, and fusing would fill the masked entries"
    if getattr(layer, "batch_dims", ()):
        return "it has batch_dims, so every batch row has a kernel of its own"
    custom = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    given = [f for f in (getattr(layer, name, None) for name in custom) if f is not None]
    if not all(getattr(f, "is_convolution", False) for f in given):
        return "it replaces the matrix product, which then need not be linear (if it is, say f.is_convolution = True)"
    if stacked and "vmap" in transforms:
        return "nn.vmap stacks its kernel: its copies run side by side and have no order in time"
    if stacked and transforms.count("scan") != 1:
        return "its kernel is stacked by other than exactly one nn.scan"
    if stacked and outer[1:] != shape:
        return f"its kernel {outer} is not stacked on the first axis (use variable_axes={{'params': 0}})"
    return None


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
