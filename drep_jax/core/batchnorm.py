"""Which BatchNorm reads the output of which layer, and nothing else does.

The traced equations show it. Two things rest on it: folding the BatchNorm into the layer
(`drep_jax.exporting.fold_batchnorm`), and the constant of a denoiser before a layer without bias.
That constant c adds W·c to the layer's output, and the BatchNorm subtracts its running mean:

    (W A x + W c) − mean = W A x − mean'        mean' = mean − W·c
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import bodies, inline, mark_name, path_of
from drep_jax.core.layers import LAYER_KINDS, Layer, find_layers
from drep_jax.core.promotion import standard_promotion
from drep_jax.trees import get_in
from drep_jax.typing import Path, Tree

RETURNED, READ = "drep_returned:", "drep_read:"
"""Prefixes of the names given to the output of a layer and to the input of a BatchNorm.

The path follows.
"""


@dataclasses.dataclass(frozen=True)
class Fold:
    """One BatchNorm and the layer that it is folded into.

    Attributes:
      layer: the layer whose output it reads.
      norm: path of the BatchNorm.
      module: the BatchNorm itself, unbound.
    """

    layer: Layer
    norm: Path
    module: nn.BatchNorm


@dataclasses.dataclass(frozen=True)
class Folds:
    """The BatchNorms of a network: those that can be folded, and the others.

    Attributes:
      found: those that can, in execution order.
      left: {BatchNorm that cannot: the reason}.
    """

    found: tuple[Fold, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        head = f"BatchNorm: {len(self.found)} folded into the layer before, {len(self.left)} left as they are"
        return "\n".join([head, *(f"  {name}: {reason}" for name, reason in self.left.items())])


def find_folds(module: nn.Module, *args: Any, **kwargs: Any) -> Folds:
    """Finds every BatchNorm that can be folded into a layer without changing the function.

    Args:
      module: an unbound Linen module, called as for inference.
      *args: its inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and types count.
      **kwargs: passed on, not traced.
    """
    layers = {layer.path: layer for layer in find_layers(module, *args, **kwargs)}
    norms: dict[Path, nn.BatchNorm] = {}
    left: dict[Path, str] = {}

    def mark(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        part: Any = context.module
        is_layer = isinstance(part, LAYER_KINDS) and part.path in layers
        if context.method_name != "__call__" or not (is_layer or isinstance(part, nn.BatchNorm)):
            return next_fun(*args, **kwargs)
        if is_layer:
            return checkpoint_name(next_fun(*args, **kwargs), RETURNED + mark_name(part.path))
        owner = next(cls for cls in type(part).__mro__ if "__call__" in vars(cls))
        if vars(owner)["__call__"].__module__ != nn.normalization.__name__:
            left[part.path] = f"{type(part).__name__} overrides __call__"
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        norms[part.path] = part.clone(parent=None, name=None, use_running_average=True)
        if part.axis not in (-1, x.ndim - 1):
            left[part.path] = f"it normalizes axis {part.axis} and not the last one"
        x = checkpoint_name(x, READ + mark_name(part.path))
        return next_fun(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "x"})

    keys = {name: jax.random.key(0) for name in ("params", "dropout")}

    def forward(variables: Tree, *args: Any) -> Any:
        with intercepting(mark):
            return module.apply(variables, *args, rngs={"dropout": keys["dropout"]}, **kwargs)

    variables = nn.unbox(jax.eval_shape(lambda *a: module.init(keys, *a, **kwargs), *args))
    reads = list(_reads(inline(jax.make_jaxpr(forward)(variables, *args)).jaxpr))
    layer_calls = collections.Counter(read.layer for read in reads if read.norm is None)
    norm_calls = collections.Counter(read.norm for read in reads if read.norm is not None)
    folds = []
    for read in reads:
        if read.norm is None or read.norm in left:
            continue
        layer = layers.get(read.layer) if read.layer is not None else None
        if layer is None or read.obstacle:
            left[read.norm] = read.obstacle
        elif norm_calls[read.norm] > 1 or layer_calls[read.layer] > 1:
            twice = read.norm if norm_calls[read.norm] > 1 else layer.path
            left[read.norm] = f"{'/'.join(twice)} is called more than once"
        elif layer.refusal:
            left[read.norm] = f"{layer.name}: {layer.refusal}"
        elif get_in(variables["batch_stats"], read.norm)["mean"].ndim != 1 + (layer.stack is not None):
            left[read.norm] = f"it is stacked in another way than {layer.name}"
        else:
            folds.append(Fold(layer, read.norm, norms[read.norm]))
    return Folds(tuple(folds), {"/".join(path): reason for path, reason in left.items()})


@standard_promotion
def with_norms(layers: Sequence[Layer], module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the layers, with the BatchNorm that takes the constant of a denoiser where there is one.

    It is there for a layer without bias whose output only one BatchNorm reads, channel by channel,
    and subtracts its running mean.

    Args:
      layers: from `find_layers`.
      module, *args, **kwargs: see `find_folds`.
    """
    norms = {
        fold.layer.path: fold.norm
        for fold in find_folds(module, *args, **kwargs).found
        if not fold.layer.bias and len(fold.layer.kernel_shape[fold.layer.inputs :] if fold.layer.inputs else (0,)) == 1
    }
    return tuple(dataclasses.replace(layer, norm=norms.get(layer.path)) for layer in layers)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A call of a layer (norm None), or of a BatchNorm with the layer it reads, or an obstacle."""

    layer: Path | None
    norm: Path | None
    obstacle: str = ""


def _reads(jaxpr: core.Jaxpr) -> Iterator[_Read]:
    """Yields all calls of layers and BatchNorms whose results are used, also in loops."""
    live = _live(jaxpr)
    maker = {var: eqn for eqn in live for var in eqn.outvars}
    users = collections.Counter(v for eqn in live for v in set(_variables(eqn.invars)))
    users.update(set(_variables(jaxpr.outvars)))
    for eqn in live:
        name = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
        if name.startswith(RETURNED):
            yield _Read(_path(name), None)
        elif name.startswith(READ):
            [x] = eqn.invars
            made = maker.get(x)
            source = str(made.params.get("name", "")) if made is not None and made.primitive.name == "name" else ""
            if not source.startswith(RETURNED):
                what = "an input" if made is None else f'the result of "{made.primitive.name}"'
                yield _Read(None, _path(name), f"it reads {what}, not of one layer")
            elif users[x] > 1:
                yield _Read(_path(source), _path(name), f"others read the output of {source[len(RETURNED) :]} too")
            else:
                yield _Read(_path(source), _path(name))
        for body in bodies(eqn):
            yield from _reads(body)


def _path(name: str) -> Path:
    return path_of(name.split(":", 1)[1])


def _variables(atoms: Any) -> Iterator[Any]:
    return (v for v in atoms if not isinstance(v, core.Literal))


def _live(jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the equations that the outputs depend on.

    Flax traces some bodies twice and drops one result.
    """
    needed, live = set(_variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(_variables(eqn.invars))
            live.append(eqn)
    return live[::-1]
