"""Finds the linear layers of any Flax Linen module by tracing it abstractly, in execution order; nothing is computed.

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.jaxpr import independent, mark
from drep_jax.typing import Path

COLLECTION = "denoise"
"""Variable collection that sites write to; a module that lifts layers with `nn.scan` has to declare it."""


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
