"""Finds the linear layers of any Flax Linen module, in execution order (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`. The module is traced abstractly;
nothing is computed.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.customized import differing, overrides
from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import independent_marks, mark, mark_name, marked
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.reads import Marked, Use, find_reads
from drep_jax.errors import SiteError
from drep_jax.trees import get_in
from drep_jax.typing import Path, Tree

COLLECTION = "denoise"
"""Variable collection that sites write to; `nn.scan` around layers has to declare it."""


LAYER_KINDS = (nn.Dense, nn.DenseGeneral, nn.Conv)
"""Modules whose calls are layers."""


LEAVES = ("bias", "kernel")
"""Names of a layer's parameters, in tree order."""


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
        """Whether a window can contain zeros that are no pixels: by padding or input dilation.

        A pointwise denoiser acts before they are filled in, so its constant would be missing there.
        """
        if any(d > 1 for d in self.input_dilation):
            return True
        if isinstance(self.padding, str):
            return self.padding in ("SAME", "SAME_LOWER", "CAUSAL") and not self.single
        return any(low > 0 or high > 0 for low, high in self.padding)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a backbone.

    Attributes:
      path: of its parameters, as in `params[path[0]][path[1]]…["kernel"]`.
      kind: "dense" or "conv".
      kernel_shape: of one copy, without the axis that `nn.scan` stacks.
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

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def kernel_size(self) -> int:
        """Number of entries of its kernel, over all stacked copies."""
        return math.prod(self.kernel_shape) * (self.stack or 1)


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
    tensors: list[Any] = []  # keeps every traced input alive, so that identities stay unique
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
        index = next((index for index, tensor in enumerate(tensors) if tensor is x), len(tensors))
        tensors.append(x)
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
    groups: dict[tuple[int, ...], int] = {}  # of layers that read the same tensors in all of their calls
    return tuple(
        _judged(
            dataclasses.replace(layer, reads=groups.setdefault(tuple(reads[path]), len(groups))),
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
    spread = any(layer.kind != "dense" or shape[1:] not in shapes for shape in use.spread)
    return dataclasses.replace(layer, refusal=refusal, calls=max(use.calls, 1), spread=spread)


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
        kind, window, axes, inputs = "conv", _window(layer), (-1,), 0
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
        refusal=_refusal(layer, kernel.shape, params, outer_shape, transforms, stacked),
    )


def _refusal(
    layer: Any, shape: tuple[int, ...], node: Any, outer: tuple[int, ...] | None, transforms: list[str], stacked: bool
) -> str | None:
    """Returns why a layer cannot be a site, or None.

    Args:
      layer: bound.
      shape: of its kernel where it is called.
      node: of the parameter tree at its path.
      outer: of its kernel in the parameter tree, or None if it is not at the layer's path.
      transforms: names of the Flax transformations around the layer, outermost first.
      stacked: whether the two shapes differ.
    """
    if overridden := overrides(type(layer)):
        return (
            f"{type(layer).__name__} overrides {', '.join(overridden)}, so it need not be a linear map; if it only pads or "
            "scales, do that in a module around a plain layer"
        )
    if not layer.path:
        return "the module is itself the layer; wrap it in a module that has it as a part"
    if outer is None:
        return "its kernel is not in the parameter tree at its own path"
    if shared := sorted(set(node) - {*LEAVES}):
        return (
            f"its scope belongs to another module, which also holds {', '.join(shared)} there (nn.share_scope); give the "
            "layer a scope of its own"
        )
    if layer.promote_dtype is not nn.dtypes.promote_dtype:
        return "its promote_dtype is not Flax's, so it may change the weights before they are used"
    if unknown := sorted(set(transforms) - {"scan", "remat", "checkpoint", "jit", "vmap", "named_call"}):
        return f"its weights pass through {', '.join(unknown)} before they are used"
    if getattr(layer, "mask", None) is not None:
        return "its kernel is masked, and fusing would fill the masked entries"
    if getattr(layer, "batch_dims", ()):
        return "it has batch_dims, so every batch row has a kernel of its own"
    custom = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    products = [f for f in (getattr(layer, name, None) for name in custom) if f is not None]
    if not all(getattr(f, "is_convolution", False) for f in products):
        return "it replaces the matrix product, which then need not be linear (if it is, say f.is_convolution = True)"
    if isinstance(layer, nn.Conv) and (name := differing(layer, products, _window(layer), shape)):
        return (
            f"its function {name} says is_convolution and computes something else than jax.lax.conv_general_dilated; if it "
            "pads, do that in a module around the layer"
        )
    if stacked and "vmap" in transforms:
        return "nn.vmap stacks its kernel: its copies run side by side and have no order in time"
    if stacked and transforms.count("scan") != 1:
        return "its kernel is stacked by other than exactly one nn.scan"
    if stacked and outer[1:] != shape:
        return f"its kernel {outer} is not stacked on the first axis (use variable_axes={{'params': 0}})"
    return None
