"""The certificate of folding: folded against original network, in float64 and as stored.

    error = ‖folded − original‖ / ‖original‖

A layer's bound is the rounding error of its terms, 32·ε·‖|γ/√(v+ε)|·(|Wx + b| + |μ|) + |β|‖ /
‖original‖: with a small variance two large terms cancel. End to end the bounds of the layers add
up. Folding must not change the function, so weights without any folding would pass these bounds.
Therefore the structure also states that every BatchNorm has become a constant.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.batchnorm import Fold, Folds
from drep_jax.core.certificate import floating_leaves, wide_leaf
from drep_jax.core.deployed import structure_kept, undo_rounding
from drep_jax.core.intercept import sow, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.precision import SAFETY, epsilon, type_name, widened
from drep_jax.core.sites import Site, select_sites
from drep_jax.exporting.fold_batchnorm import fold_batchnorm
from drep_jax.trees import get_in
from drep_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class FoldFigure:
    """One comparison of folded with original.

    Attributes:
      error: ‖folded − original‖ / ‖original‖.
      bound: the error that rounding allows.
    """

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is a finite number within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        """Returns the figure as JSON values."""
        return {**dataclasses.asdict(self), "passed": self.passed}


@dataclasses.dataclass(frozen=True)
class FoldCertificate:
    """The result of `certify_folds`.

    It passes if every error is within its bound, the bound in float64 is small, and the structure
    is right.

    Attributes:
      end_to_end: precision ("float64", then the type of the stored weights) ↦ figure of the
        outputs.
      layers: precision ↦ {layer: figure} of the BatchNorms' outputs, on the features of the
        original network.
      structure: "same_tree", "same_dtypes", "same_program", and "norms_are_constants": every folded
        BatchNorm has γ = 1, v + ε = 1 in its own type, and adds to each channel one number or none.
      left: {BatchNorm that was not folded: the reason}.
    """

    end_to_end: Mapping[str, FoldFigure]
    layers: Mapping[str, Mapping[str, FoldFigure]]
    structure: Mapping[str, bool]
    left: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether the folded network equals the original one and has the right structure."""
        figures = [*self.end_to_end.values(), *(figure for rows in self.layers.values() for figure in rows.values())]
        decisive = self.end_to_end["float64"].bound < 1e-3
        return all(figure.passed for figure in figures) and decisive and all(self.structure.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the certificate as JSON values."""
        results = {
            name: {**end.to_json(), "layers": {path: f.to_json() for path, f in self.layers[name].items()}}
            for name, end in self.end_to_end.items()
        }
        return {"passed": self.passed, "results": results, "structure": dict(self.structure), "left": dict(self.left)}

    def __str__(self) -> str:
        lines = [
            f"BatchNorm folded into the layer before: {'PASSED' if self.passed else 'FAILED'}   "
            f"({len(self.layers['float64'])} folded, {len(self.left)} left as they are)"
        ]
        for name, end in self.end_to_end.items():
            rows = self.layers[name]
            worst = max(rows, key=lambda path: rows[path].error / rows[path].bound)
            lines.append(
                f"  {name:8s} end to end: ‖folded − original‖/‖original‖ {end.error:.1e}, bound {end.bound:.1e}; "
                f"worst layer {worst}: {rows[worst].error:.1e}, bound {rows[worst].bound:.1e}"
            )
        marks = ", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in self.structure.items())
        return "\n".join([*lines, f"  {marks}", *(f"  left: {name}: {why}" for name, why in self.left.items())])


def certify_folds(
    module: nn.Module, variables: Tree, folds: Folds, *args: Any, folded: Tree | None = None, **kwargs: Any
) -> FoldCertificate:
    """Compares the folded network with the original one on real images, in float64 and as stored.

    Args:
      module: an unbound Linen module.
      variables: its variables before folding.
      folds: from `find_folds`.
      *args: input for the module, such as images; use real ones.
      folded: the variables to deploy; folded here by default. In float64 they are compared without
        the rounding to their type, so that a wrong leaf shows in any type.
      **kwargs: passed on to the module.

    Raises:
      ExportError: see `fold_batchnorm`.
      SiteError: if layers run under an `nn.scan` that hides the collection "denoise", which
        collects the figures.
    """
    exact = fold_batchnorm(variables, folds, round_back=False)
    stored = fold_batchnorm(variables, folds)
    deployed = stored if folded is None else folded
    measured = undo_rounding(exact, stored, deployed, variables)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        free = module.clone(dtype=None) if getattr(module, "dtype", None) is not None else module
        before, after, inputs = (jax.tree_util.tree_map(wide_leaf, tree) for tree in (variables, measured, args))
        with widened():
            results = {"float64": _measure(free, folds, before, after, inputs, kwargs, wide=True)}
    name = type_name(get_in(deployed["params"], fold.layer.path)["kernel"] for fold in folds.found)
    if name != "float64":
        results[name] = _measure(module, folds, variables, deployed, args, kwargs, wide=False)
    structure = structure_kept(module, variables, deployed, args, kwargs)
    structure["norms_are_constants"] = all(_is_constant(fold, deployed) for fold in folds.found)
    return FoldCertificate(
        end_to_end={name: end for name, (end, _) in results.items()},
        layers={name: rows for name, (_, rows) in results.items()},
        structure=structure,
        left=folds.left,
    )


def _is_constant(fold: Fold, variables: Tree) -> bool:
    norm = get_in(variables["params"], fold.norm) or {}
    moments = get_in(variables["batch_stats"], fold.norm)
    var, mean = np.asarray(moments["var"]), np.asarray(moments["mean"])
    ok = np.all(np.add(var, np.asarray(fold.module.epsilon, var.dtype)) == 1)
    ok &= np.all(np.asarray(norm.get("scale", 1)) == 1)
    if fold.layer.bias or "bias" in norm:
        ok &= np.all(mean == 0)
    if fold.layer.bias:
        ok &= np.all(np.asarray(norm.get("bias", 0)) == 0)
    return bool(ok)


def _measure(
    module: nn.Module, folds: Folds, variables: Tree, folded: Tree, args: Any, kwargs: Any, *, wide: bool
) -> tuple[FoldFigure, dict[str, FoldFigure]]:
    table = {fold.layer.path: fold for fold in folds.found}
    sites = select_sites([fold.layer for fold in folds.found], ".*")
    types: dict[str, Any] = {}

    def visit(site: Site, layer: Layer, part: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        norm: Any = table[layer.path].module
        norm = norm.clone(dtype=None) if wide else norm
        returned = call(x)
        before = norm.apply(extra["before"], returned)
        after = norm.apply(extra["after"], part.clone(parent=None, name=None).apply({"params": extra["layer"]}, x))
        params, moments = extra["before"].get("params", {}), extra["before"]["batch_stats"]
        gain = jnp.abs(params.get("scale", 1.0)) * jax.lax.rsqrt(moments["var"] + norm.epsilon)
        rows = (1,) * (returned.ndim - 1) + (-1,)
        gain, mean, bias = (
            jnp.abs(jnp.broadcast_to(v, moments["mean"].shape)).reshape(rows)
            for v in (gain, moments["mean"], params.get("bias", 0.0))
        )
        types[layer.name] = returned.dtype
        parts = (before, after - before, gain * (jnp.abs(returned) + mean) + bias)
        squares = [jnp.sum(jnp.square(p.astype(jnp.promote_types(p.dtype, jnp.float32)))) for p in parts]
        sow(part, layer, "squares", jnp.stack(squares))
        return returned

    def norm_variables(tree: Tree, fold: Fold) -> Tree:
        nodes = {name: get_in(tree[name], fold.norm) for name in ("params", "batch_stats")}
        return {name: dict(node) for name, node in nodes.items() if node}

    def run(variables: Tree, folded: Tree, args: Any) -> Any:
        extras = {}
        for path, fold in table.items():
            leaves = get_in(folded["params"], path)
            extras[path] = {
                "layer": {name: leaves[name] for name in ("kernel", "bias") if name in leaves},
                "before": norm_variables(variables, fold),
                "after": norm_variables(folded, fold),
            }
        base, collected = visit_sites(module, variables, sites, extras, visit, *args, collect=True, **kwargs)
        pairs = zip(*map(floating_leaves, (base, module.apply(folded, *args, **kwargs))), strict=True)
        ends = []
        for one, two in pairs:
            types["output"] = one.dtype
            ends.append(jnp.stack([jnp.sum(jnp.square(one)), jnp.sum(jnp.square(two - one))]))
        return sum(ends), collected

    with jax.default_matmul_precision("highest"):
        end, collected = jax.device_get(jax.jit(run)(variables, folded, args))
    rows: dict[str, FoldFigure] = {}
    units: list[float] = []
    for path, fold in table.items():
        values = np.asarray(get_in(collected, path)["squares"]).reshape(-1, 3).sum(axis=0)
        size, error, terms = np.sqrt(values)
        stored = [jnp.result_type(leaf) for leaf in jax.tree_util.tree_leaves(get_in(folded["params"], path))]
        unit = epsilon([types[fold.layer.name], *stored])
        units.append(unit)
        rows[fold.layer.name] = FoldFigure(float(error / (size or 1.0)), SAFETY * unit * float(terms / (size or 1.0)))
    unit = max(*units, epsilon([types["output"]]))
    size, error = np.sqrt(np.asarray(end))
    bound = 2 * SAFETY * unit + sum(row.bound for row in rows.values())
    return FoldFigure(float(error / (size or 1.0)), bound), rows
