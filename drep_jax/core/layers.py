"""Finds the linear layers of any Flax Linen module, in execution order (Algorithm 2).

A *layer* is one `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`. The module is traced abstractly;
nothing is computed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import independent, mark
from drep_jax.core.promotion import standard_promotion
from drep_jax.trees import get_in
from drep_jax.typing import Path

COLLECTION = "denoise"
"""Variable collection that sites write to; `nn.scan` around layers has to declare it."""


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

    >>> net = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    >>> for layer in find_layers(net, jax.ShapeDtypeStruct((1, 3), "float32")):
    ...     print(layer.name, layer.kind, layer.kernel_shape, layer.refusal)
    layers_0 dense (3, 4) None
    layers_1 dense (4, 2) None
    """
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = nn.unbox(jax.eval_shape(lambda *inputs: module.init(keys, *inputs, **kwargs), *args))
    params = variables.get("params", {})
    layers: dict[Path, Layer] = {}
    inputs: list[Any] = []  # keeps every traced input alive, so that identities stay unique

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, (nn.Dense, nn.DenseGeneral, nn.Conv)) and context.method_name == "__call__":
            x = args[0] if args else kwargs["inputs"]
            if layer.path not in layers:
                reads = next((index for index, tensor in enumerate(inputs) if tensor is x), len(inputs))
                inputs.append(x)
                layers[layer.path] = _describe(layer, x, get_in(params, layer.path), reads, len(layers))
            marked = mark("/".join(layer.path), x)
            args, kwargs = ((marked, *args[1:]), kwargs) if args else (args, {**kwargs, "inputs": marked})
        return next_fun(*args, **kwargs)

    def trace(variables: Any, *args: Any) -> Any:
        with intercepting(record):
            return module.apply(variables, *args, rngs={"dropout": keys["dropout"]}, mutable=[COLLECTION], **kwargs)

    constant = independent(trace, variables, *args)
    return tuple(
        dataclasses.replace(layer, refusal=NO_IMAGES) if layer.name in constant and not layer.refusal else layer
        for layer in layers.values()
    )


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


def _describe(layer: nn.Module, x: Any, params: Any, reads: int, order: int) -> Layer:
    """Describes a bound layer that reads `x`; `params` is its node of the whole tree, or None."""
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
        reads=reads,
        order=order,
        writable=layer.is_mutable_collection(COLLECTION),
        refusal=_refusal(layer, kernel.shape, outer_shape, transforms, stacked),
    )


def _refusal(
    layer: Any, shape: tuple[int, ...], outer: tuple[int, ...] | None, transforms: list[str], stacked: bool
) -> str | None:
    """Returns why a layer cannot be a site, or None.

    Args:
      layer: bound.
      shape: of its kernel where it is called.
      outer: of its kernel in the parameter tree, or None if it is not at the layer's path.
      transforms: names of the Flax transformations around the layer, outermost first.
      stacked: whether the two shapes differ.
    """
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
    products = [f for f in (getattr(layer, name, None) for name in custom) if f is not None]
    if not all(getattr(f, "is_convolution", False) for f in products):
        return "it replaces the matrix product, which then need not be linear (if it is, say f.is_convolution = True)"
    if stacked and "vmap" in transforms:
        return "nn.vmap stacks its kernel: its copies run side by side and have no order in time"
    if stacked and transforms.count("scan") != 1:
        return "its kernel is stacked by other than exactly one nn.scan"
    if stacked and outer[1:] != shape:
        return f"its kernel {outer} is not stacked on the first axis (use variable_axes={{'params': 0}})"
    return None
