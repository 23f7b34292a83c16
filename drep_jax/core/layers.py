"""Finds the linear layers of any Flax Linen module, in execution order (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`. The module is traced abstractly;
nothing is computed.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from drep_jax.core.concatenation import find_sources
from drep_jax.core.customized import LEAVES, refusal_of
from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import independent_marks, mark, mark_name, marked
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.reads import Marked, Use, find_reads
from drep_jax.core.window import Window, window_of
from drep_jax.errors import SiteError
from drep_jax.rows import block_of
from drep_jax.trees import get_in
from drep_jax.typing import Path, Tree

COLLECTION = "denoise"
"""Variable collection that sites write to; `nn.scan` around layers has to declare it."""


LAYER_KINDS = (nn.Dense, nn.DenseGeneral, nn.Conv)
"""Modules whose calls are layers."""


NNX = (
    "is a module of flax.nnx, whose layers cannot be intercepted, also behind flax.nnx.bridge.to_linen. Write the network with "
    "flax.linen: nnx.to_pure_dict(nnx.state(model, nnx.Param)) are its parameters, and flax.nnx.bridge.ToNNX brings it back "
    "into an nnx program (docs/own_model.md)."
)
"""What is said of an nnx module."""


TWO_FORMS = "its weights are used as two different layers, and one change cannot be right for both"
"""Refusal of a kernel that is called with two windows, or along two axes."""


NO_IMAGES = "what it reads is the same for all images, so it holds no feature of theirs to denoise"
"""Refusal of a layer whose input does not depend on the images (position biases)."""


NO_OUTPUT = "no output of the network depends on it, as of an auxiliary head in evaluation mode"
"""Refusal of a layer that is called for nothing."""


IDLE = (NO_IMAGES, NO_OUTPUT)
"""Refusals of layers that patterns skip, unless they match nothing else."""


class Part(NamedTuple):
    """Some adjacent channels of a layer's input: those of one source of a concatenation.

    Attributes:
      number: index of the source.
      first, end: its channels are first … end − 1.
      channels: of the whole input.
    """

    number: int
    first: int
    end: int
    channels: int

    @property
    def name(self) -> str:
        """Name of its denoiser in the `denoise` subtree, below the layer's path."""
        return f"part{self.number}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a backbone, or the part of it that reads one source of a concatenation.

    Attributes:
      path: of its parameters, as in `params[path[0]][path[1]]…["kernel"]`.
      kind: "dense" or "conv".
      kernel_shape: of one copy, without the axis that `nn.scan` stacks; of the part alone.
      inputs: number of leading kernel axes that are contracted; 0 for a convolution.
      axes: the contracted axes of the input, counted from the end.
      window: how a convolution reads its input; None for a Dense layer.
      bias: whether it has a bias.
      stack: number of stacked copies under `nn.scan`, or None.
      scan: path of the module that `nn.scan` repeats, or None.
      reads: index of its input tensor; layers with equal indices read the very same tensor.
      order: index in execution order.
      writable: whether the collection "denoise" can be written where the layer is called.
      refusal: why it cannot be a site, or None.
      calls: number of calls of each copy in one forward pass.
      spread: whether `nn.vmap` has added axes to its input, other than a first one to that of a
        Dense layer.
      norm: path of the BatchNorm whose running mean takes the constant of a denoiser, or None.
      sources: channels of each tensor that its input is a concatenation of; () if it is none.
      part: the channels that are read, or None for all.
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
    calls: int = 1
    spread: bool = False
    norm: Path | None = None
    sources: tuple[int, ...] = ()
    part: Part | None = None

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def kernel_size(self) -> int:
        """Number of entries of its kernel, over all stacked copies."""
        return math.prod(self.kernel_shape) * (self.stack or 1)

    @property
    def channel_axis(self) -> int:
        """Axis of the kernel that its input's channels are on, counted from the end."""
        return -len(self.kernel_shape) if self.window is None else -2

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the kernel of one copy in the parameter tree."""
        return self.kernel_shape if self.part is None else self._with_channels(self.part.channels)

    def parts(self) -> tuple["Layer", ...]:
        """Returns the layer as one part a source; itself if it reads no concatenation."""
        ends = [sum(self.sources[: n + 1]) for n in range(len(self.sources))]
        return tuple(
            dataclasses.replace(
                self, kernel_shape=self._with_channels(size), part=Part(number, end - size, end, ends[-1])
            )
            for number, (size, end) in enumerate(zip(self.sources, ends, strict=True))
        ) or (self,)

    def _with_channels(self, channels: int) -> tuple[int, ...]:
        axis = len(self.kernel_shape) + self.channel_axis
        return (*self.kernel_shape[:axis], channels, *self.kernel_shape[axis + 1 :])


@standard_promotion
def find_layers(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Finds the linear layers of `module` in the order in which they run.

    The module is traced abstractly, once to initialize it and once to apply it. Layers inside
    `nn.remat`, `nn.jit` and `nn.scan` are found at the path of their parameters. A layer that is
    called several times is one layer. A layer that cannot be fused exactly is listed with the
    reason in `refusal`: masked kernels, an overridden `__call__`, transformed weights, an input
    that does not depend on the images, ….

    Args:
      module: an unbound Flax Linen module.
      *args: its inputs, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: passed on unchanged, not traced.

    Returns:
      The layers. Layers with equal `reads` read the very same tensor.

    Raises:
      SiteError: for a module of `flax.nnx`, or anything else that is no Linen module.

    >>> net = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    >>> for layer in find_layers(net, jax.ShapeDtypeStruct((1, 3), "float32")):
    ...     print(layer.name, layer.kind, layer.kernel_shape, layer.refusal)
    layers_0 dense (3, 4) None
    layers_1 dense (4, 2) None
    """
    if not isinstance(module, nn.Module):
        kind = type(module)
        nnx = any(base.__module__.startswith("flax.nnx") for base in kind.__mro__)
        raise SiteError(f"{kind.__name__} {NNX if nnx else 'is no flax.linen.Module.'}")
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = nn.unbox(jax.eval_shape(lambda *inputs: module.init(keys, *inputs, **kwargs), *args))
    params = variables.get("params", {})
    layers: dict[Path, Layer] = {}
    tensors: list[tuple[Any, Any]] = []  # keeps every traced input alive, so that identities stay unique
    reads: dict[Path, list[int]] = {}  # index of the tensor that each call reads
    shapes: dict[Path, set[tuple[int, ...]]] = {}  # of the inputs
    bridged: list[str] = []  # modules of flax.nnx inside
    inside = False  # a marked call, where the layer is called once more, alone

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        layer = context.module
        if type(layer).__module__.startswith("flax.nnx"):
            bridged.append(getattr(layer, "nnx_class", type(layer)).__name__)
        if inside or not isinstance(layer, LAYER_KINDS) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        rows = block_of("/".join(layer.path[-1:]), x.shape[:-1], seeking=True)
        what = (x, None if rows is None else rows.source)  # the tensor, and what says which of its rows count
        same = (index for index, other in enumerate(tensors) if other[0] is what[0] and other[1] is what[1])
        index = next(same, len(tensors))
        tensors.append(what)
        reads.setdefault(layer.path, []).append(index)
        described = _describe(layer, x, get_in(params, layer.path), len(layers))
        first = layers.setdefault(layer.path, described)
        shapes.setdefault(layer.path, set()).add(x.shape)
        if not first.refusal and not _same_form(first, described):
            layers[layer.path] = dataclasses.replace(first, refusal=TWO_FORMS)
        if layers[layer.path].refusal:
            marked_x = mark(mark_name(layer.path), x)
            return next_fun(marked_x, *args[1:], **{name: v for name, v in kwargs.items() if name != "inputs"})
        inside = True
        try:
            return marked(mark_name(layer.path), alone(layer))(leaves_of(layer), x)
        finally:
            inside = False

    def trace(variables: Any, *args: Any) -> Any:
        with intercepting(record):
            return module.apply(variables, *args, rngs={"dropout": keys["dropout"]}, mutable=[COLLECTION], **kwargs)

    jaxpr = jax.make_jaxpr(trace)(variables, *args).jaxpr
    if bridged and not layers:
        raise SiteError(f"{bridged[0]} {NNX}")
    leaves = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    constant = independent_marks(jaxpr, len(leaves))
    called = {
        mark_name(path): Marked(tuple(("params", *path, name) for name in _leaf_names(layer)), shapes[path])
        for path, layer in layers.items()
        if not layer.refusal
    }
    unknown = [None] * (len(jaxpr.invars) - len(leaves))
    seen = find_reads(jaxpr, [*leaves, *unknown], called)
    sources = find_sources(jaxpr)
    groups: dict[tuple[int, ...], int] = {}  # of layers that read the same tensors in all of their calls
    return tuple(
        _judged(
            dataclasses.replace(
                layer,
                reads=groups.setdefault(tuple(reads[path]), len(groups)),
                sources=sources.get(mark_name(path), ()) if _reads_channels(layer) else (),
            ),
            seen.uses.get(mark_name(path)),
            [("params", *path, name) in seen.elsewhere for name in _leaf_names(layer)],
            mark_name(path) in constant,
            [other.name for other in layers.values()].count(layer.name) > 1,
            shapes[path],
        )
        for path, layer in layers.items()
    )


def alone(layer: nn.Module) -> Callable[[Tree, Any], Any]:
    """Returns a bound layer as a function of its leaves and its input; a bias that it does not have is added."""
    unbound: Any = layer.clone(parent=None, name=None)

    def run(leaves: Tree, x: Any) -> Any:
        y = unbound.apply({"params": leaves}, x)
        extra = None if unbound.use_bias else leaves.get("bias")
        return y if extra is None else y + extra.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)

    return run


def leaves_of(layer: nn.Module) -> Tree:
    """Returns the kernel of a bound layer, and its bias if it has one."""
    return {name: layer.get_variable("params", name) for name in LEAVES if layer.has_variable("params", name)}


def _keys(path: Any) -> Path:
    return tuple(str(getattr(key, "key", key)) for key in path)


def _leaf_names(layer: Layer) -> tuple[str, ...]:
    """Returns the names of a layer's leaves, in tree order."""
    return LEAVES if layer.bias else ("kernel",)


def _reads_channels(layer: Layer) -> bool:
    """Returns whether a layer mixes all channels of the last axis of its input, and nothing else than windows of them."""
    return layer.axes == (-1,) and (layer.window is None or layer.window.groups == 1)


def _same_form(one: Layer, other: Layer) -> bool:
    return dataclasses.replace(one, order=0, writable=True) == dataclasses.replace(other, order=0, writable=True)


def _judged(
    layer: Layer, use: Use | None, elsewhere: Sequence[bool], constant: bool, ambiguous: bool, shapes: set[Any]
) -> Layer:
    """Returns a layer with what its use in the whole network says.

    Args:
      layer: as it was described where it is called.
      use: of it; None if it is refused already.
      elsewhere: whether each of its leaves is read outside of it as well.
      constant: whether no image reaches it.
      ambiguous: whether another layer has the same name.
      shapes: of its inputs where it is called.
    """
    if use is None:
        return layer
    refusal = None
    if use.branch:
        refusal = "it runs inside a branch or a while loop, so how often it is called depends on the data"
    elif use.changed:
        refusal = (
            "its weights are changed between the parameter tree and the layer, and fusing would change them before"
        )
    elif any(elsewhere):
        tied = " and ".join(name for name, other in zip(_leaf_names(layer), elsewhere, strict=True) if other)
        refusal = f"its {tied} is read outside of the layer as well (tied weights), and fusing would change that, too"
    elif ambiguous:
        refusal = "another layer has the same name, because a part of one of them contains a slash"
    elif constant:
        refusal = NO_IMAGES
    elif not use.calls:
        refusal = NO_OUTPUT
    spread = any(layer.kind != "dense" or shape[1:] not in shapes for shape in use.spread)
    return dataclasses.replace(layer, refusal=refusal, calls=max(use.calls, 1), spread=spread)


def _describe(layer: nn.Module, x: Any, params: Any, order: int) -> Layer:
    """Describes a bound layer at a call with `x`; `params` is its node of the whole tree, or None."""
    kernel: Any = layer.get_variable("params", "kernel")
    scope: Any = layer.scope
    lifts = [re.findall(r"(\w+)\(", part) for part in scope.debug_path]  # as in "remat(scan(encoder))"
    transforms = [name for names in lifts for name in names]
    scans = [depth for depth, names in enumerate(lifts) if "scan" in names]
    outer_shape: Any = getattr(params.get("kernel"), "shape", None) if isinstance(params, Mapping) else None
    stacked = outer_shape is not None and outer_shape != kernel.shape

    if isinstance(layer, nn.Conv):
        kind, window, axes, inputs = "conv", window_of(layer), (-1,), 0
    else:
        kind, window = "dense", None
        axis = getattr(layer, "axis", -1)
        contracted = (axis,) if isinstance(axis, int) else tuple(axis)
        axes = tuple(sorted(a if a < 0 else a - x.ndim for a in contracted))
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
        reads=0,
        order=order,
        writable=layer.is_mutable_collection(COLLECTION),
        refusal=refusal_of(layer, window, kernel.shape, params, outer_shape, transforms, stacked),
    )
