"""Folds inference BatchNorm into the linear layer before it: (W, b, γ, β, μ, v) ↦ (W', b').

    BN(Wx + b) = γ·(Wx + b − μ)/√(v + ε) + β = W'x + b'
    with  W' = W·γ/√(v + ε),  b' = (b − μ)·γ/√(v + ε) + β

The BatchNorm stays in the tree with μ = 0, v = 1 − ε, γ = 1, so the same module reads the same
tree. A layer with a bias takes all of b' and leaves β = 0: the BatchNorm does nothing. Without a
bias, the constant stays in β, or in −μ if there is no β. The traced equations show which layer a
BatchNorm follows: it must read the layer's output unchanged, and nothing else may read it.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import bodies, inline, mark_name, path_of
from drep_jax.core.layers import LAYER_KINDS, Layer, find_layers
from drep_jax.errors import ExportError
from drep_jax.trees import check_finite, get_in, set_in
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


# ---------------------------------------------------------------------------------------------------------------------
# Discovery
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Folding
# ---------------------------------------------------------------------------------------------------------------------


def fold_batchnorm(variables: Tree, folds: Folds, *, round_back: bool = True) -> Tree:
    """Folds in float64; returns variables of the same structure, as NumPy arrays.

    Args:
      variables: {"params": …, "batch_stats": …} of the module that `folds` was found in, fused or
        not.
      folds: from `find_folds`.
      round_back: whether to cast the result to the types of `variables`; False leaves the changed
        leaves in float64.

    Raises:
      ExportError: if there is nothing to fold, or the variables belong to another network.
      NonFiniteError: if a weight becomes too large for its type, as with a variance near 0.
    """
    if not folds.found:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in folds.left.items())
        raise ExportError(f"This network has no BatchNorm that can be folded into the layer before it.{reasons}")
    params, stats = variables["params"], variables.get("batch_stats", {})
    for fold in folds.found:
        nodes = [get_in(tree, path) for tree, path in ((params, fold.layer.path), (stats, fold.norm))]
        if any(not isinstance(node, Mapping) for node in nodes) or not {"mean", "var"} <= nodes[1].keys():
            raise ExportError(
                f"The variables have no {fold.layer.name} or no statistics of {'/'.join(fold.norm)}: they belong to "
                "another network than the one in which the BatchNorms were found."
            )
        layer, norm, moments = folded_leaves(fold, nodes[0], get_in(params, fold.norm) or {}, nodes[1], round_back)
        params = set_in(params, fold.layer.path, {**nodes[0], **layer})
        if norm:
            params = set_in(params, fold.norm, norm)
        stats = set_in(stats, fold.norm, moments)
    new = jax.tree_util.tree_map(np.asarray, {**variables, "params": params, "batch_stats": stats})
    check_finite(new, "Refusing to fold BatchNorm")
    # in the same kinds of mappings as `variables`
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(variables), jax.tree_util.tree_leaves(new))


def folded_leaves(
    fold: Fold, layer: Tree, norm: Tree, moments: Tree, round_back: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the new leaves of a layer, of its BatchNorm, and of the BatchNorm's statistics."""
    epsilon = fold.module.epsilon
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in {**layer, **norm, **moments}.items() if name != "bias"}
    gain = wide.get("scale", 1.0) / np.sqrt(wide["var"] + epsilon)
    shift = (np.asarray(norm["bias"], np.float64) if "bias" in norm else 0.0) - wide["mean"] * gain

    def spread(vector: Any, leaf: Any) -> Any:
        """Reshapes a vector along the last axis, stacked or not, to broadcast against a leaf."""
        lead = vector.shape[:-1]
        return vector.reshape(*lead, *(1,) * (leaf.ndim - len(lead) - 1), vector.shape[-1])

    new_layer = {"kernel": wide["kernel"] * spread(gain, wide["kernel"])}
    new_norm = {name: np.full(leaf.shape, float(name == "scale")) for name, leaf in norm.items()}
    new_moments = {"mean": np.zeros_like(wide["mean"]), "var": np.full_like(wide["var"], 1.0 - epsilon)}
    if "bias" in layer:
        bias = np.asarray(layer["bias"], np.float64)
        new_layer["bias"] = bias * spread(gain, bias) + spread(shift, bias)
    elif "bias" in norm:
        new_norm["bias"] = shift
    else:
        new_moments["mean"] = -shift
    if round_back:
        with np.errstate(over="ignore"):  # the caller checks that all values are finite
            new_layer = {name: leaf.astype(layer[name].dtype) for name, leaf in new_layer.items()}
            new_norm = {name: leaf.astype(norm[name].dtype) for name, leaf in new_norm.items()}
            new_moments = {name: leaf.astype(moments[name].dtype) for name, leaf in new_moments.items()}
    new_moments["var"] = np.full_like(new_moments["var"], unit_variance(epsilon, new_moments["var"].dtype))
    return new_layer, new_norm, new_moments


def unit_variance(epsilon: float, dtype: Any) -> Any:
    """Returns the number v nearest to 1 − ε with v + ε = 1 in the arithmetic of `dtype`."""
    dtype = np.dtype(dtype)
    near = np.asarray(1.0 - epsilon, dtype)
    one = np.ones((), dtype)
    choices = (near, np.nextafter(near, one), np.nextafter(near, -one))
    return next((v for v in choices if np.add(v, np.asarray(epsilon, dtype)) == one), near)
