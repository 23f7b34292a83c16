"""Runs a backbone and hands its sites to a visitor, under `nn.intercept_methods`.

The backbone itself never mentions denoising. What a visitor needs at a layer (the denoiser, numbers
of the schedule) travels as an extra leaf beside the layer's own parameters, because under `nn.scan`
only those are sliced for each copy.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from drep_jax.core.interceptor import intercepting
from drep_jax.core.layers import COLLECTION, LAYER_KINDS, Layer
from drep_jax.core.sites import Site
from drep_jax.errors import SiteError
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree

Visit = Callable[[Site, Layer, nn.Module, Any, Any, Callable[[Any], Any]], Any]
"""(site, layer, bound module, extra, input, call) ↦ output; `call(x)` is the layer itself."""


EXTRA = "denoise"
"""Name of the extra leaf beside a layer's kernel and bias."""


def visit_sites(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    extras: Mapping[Path, Tree],
    visit: Visit,
    *args: Any,
    collect: bool = False,
    **kwargs: Any,
) -> Any:
    """Runs `backbone`, with `visit` in place of the call of every layer of the sites.

    Args:
      backbone: an unbound Linen module.
      variables: its variables, {"params": …, …}.
      sites: whose layers are visited. A layer with several sites, one for each source of a
        concatenation, is visited by one inside the other: `call` is then the visit of the next.
      extras: {`place` of a site at a layer: tree for the visitor}; for stacked layers, with the stack
        as first axis of every leaf.
      visit: called as `visit(site, layer, module, extra, x, call)`, where `call(x)` is the layer
        itself; returns the layer's output.
      *args, **kwargs: for the backbone.
      collect: whether visitors may write to the collection "denoise", see `sow`.

    Returns:
      The backbone's outputs, or (outputs, collection) with `collect`.
    """
    table: dict[Path, list[tuple[Site, Layer]]] = {}
    for site in sites:
        for layer in site.layers:
            table.setdefault(layer.path, []).append((site, layer))
    params = variables["params"]
    for rows in table.values():
        for _, layer in rows:
            if (extra := extras.get(place(layer))) is not None:
                below = () if layer.part is None else (layer.part.name,)
                params = set_in(params, (*layer.path, EXTRA, *below), extra)

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        # A module may share the scope, and with it the path, of one of its layers.
        if context.method_name != "__call__" or module.path not in table or not isinstance(module, LAYER_KINDS):
            return next_fun(*args, **kwargs)
        extra: Any = module.get_variable("params", EXTRA)
        call = next_fun
        for site, layer in reversed(table[module.path]):
            own = extra if layer.part is None else (extra or {}).get(layer.part.name)
            call = functools.partial(_visited, visit, site, layer, module, own, call)
        return call(args[0] if args else kwargs["inputs"])

    with intercepting(intercept):
        outputs = backbone.apply(
            {**variables, "params": params}, *args, mutable=[COLLECTION] if collect else False, **kwargs
        )
    return (outputs[0], outputs[1].get(COLLECTION, {})) if collect else outputs


def _visited(
    visit: Visit, site: Site, layer: Layer, module: nn.Module, extra: Any, call: Callable[[Any], Any], x: Any
) -> Any:
    return visit(site, layer, module, extra, x, call)


def place(layer: Layer) -> Path:
    """Returns the path of what belongs to a site at one of its layers: the layer's, or that of its part below it."""
    return layer.path if layer.part is None else (*layer.path, layer.part.name)


def sown(collected: Tree, layer: Layer) -> dict[str, Any]:
    """Returns what was sown at a layer, or at its part, by name."""
    prefix = "" if layer.part is None else f"{layer.part.name}:"
    leaves = get_in(collected, layer.path)
    return {name.removeprefix(prefix): value for name, value in leaves.items() if name.startswith(prefix)}


def sow(module: nn.Module, layer: Layer, name: str, value: Any) -> None:
    """Adds `value` to what the collection "denoise" holds as `name` at this layer; see `sown`.

    Raises:
      SiteError: under an `nn.scan` or `nn.vmap` that does not lift the collection; names the line
        to add.
    """
    if not module.is_mutable_collection(COLLECTION):
        raise SiteError(
            f"{layer.name} runs under nn.scan or nn.vmap, which hides the collection that its statistics are written to. Add "
            f"'{COLLECTION}': 0 to its axes, as in nn.scan(…, variable_axes={{'params': 0, '{COLLECTION}': 0}}, …)."
        )
    module.sow(COLLECTION, _name(layer, name), value, init_fn=lambda: jnp.zeros_like(value), reduce_fn=jnp.add)


def sown_before(module: nn.Module, layer: Layer, name: str) -> Any:
    """Returns what earlier calls of a layer have sown, or None; the rounds of a loop do not see each other."""
    name = _name(layer, name)
    return module.get_variable(COLLECTION, name) if module.has_variable(COLLECTION, name) else None


def _name(layer: Layer, name: str) -> str:
    return name if layer.part is None else f"{layer.part.name}:{name}"


def sum_calls(site: Site, sown: Mapping[str, Any], axes: Mapping[str, int], otherwise: int) -> dict[str, Any]:
    """Sums what was sown over the calls of a layer that `nn.scan` repeats or `nn.vmap` spreads.

    Args:
      site: of the layer.
      sown: name ↦ values; their axes are ([stack], calls…, [groups], own…).
      axes: name ↦ number of own axes; with −1 there is none of the groups either.
      otherwise: that of all other names.
    """
    stack, groups = int(site.stack is not None), int(site.groups > 1)

    def add(name: str, value: Any) -> Any:
        last = axes.get(name, otherwise)
        return value.sum(axis=tuple(range(stack, value.ndim - (groups + last if last >= 0 else 0))))

    return {name: add(name, value) for name, value in sown.items()}
