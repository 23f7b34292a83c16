"""The certificate: fused against explicit, per site and end to end, measured on the *change* that denoising makes.

At small t the whole change is a few thousandths of the output, so a tolerance on the output itself would pass a fusion
that does nothing. The figure is

    error = ‖(fused − base) − (explicit − base)‖ / ‖explicit − base‖

and the bound is what arithmetic with unit round-off ε allows, 32·ε·(‖base‖ + ‖explicit‖) / ‖explicit − base‖.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.explicit import call_denoised, explicit_apply, explicit_extras
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.intercept import sow, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in
from drep_jax.typing import Tree

SAFETY = 32.0
"""Factor on ε in the bound; rounding in a deep network accumulates over layers and sums."""


NO_CHANGE = 4 * SAFETY * float(np.finfo(np.float64).eps)
"""Relative change that float64 cannot tell from none: a patch denoiser that does nothing still sums in another order."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One comparison of fused with explicit.

    Attributes:
      error: ‖fused − explicit‖ / ‖explicit − base‖; relative to ‖base‖ when denoising changes nothing at all.
      bound: what arithmetic allows for that ratio.
      change: ‖explicit − base‖ / ‖base‖.
    """

    error: float
    bound: float
    change: float

    @property
    def passed(self) -> bool:
        """Whether the error is a finite number within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound

    @property
    def decisive(self) -> bool:
        """Whether the bound lies below the change itself; in too coarse a type any fusion would pass."""
        return self.bound < 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return {**dataclasses.asdict(self), "passed": self.passed, "decisive": self.decisive}


def figure(squares: Any, epsilon: float) -> Figure:
    """Makes a `Figure` of the sums of squares of (base, explicit, explicit − base, fused − explicit)."""
    base, explicit, change, error = (math.sqrt(float(value)) for value in squares)
    if change == 0.0:
        scale = base or 1.0
        return Figure(error=error / scale, bound=2 * SAFETY * epsilon, change=0.0)
    return Figure(
        error=error / change,
        bound=SAFETY * epsilon * (base + explicit) / change,
        change=change / base if base else math.inf,
    )


@dataclasses.dataclass(frozen=True)
class SiteFigure:
    """The comparison at one layer of a site (one stacked copy), on the features that reach it in the unchanged backbone."""

    path: str
    copy: int
    times: tuple[int, ...]
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certify` found; `passed` needs every figure within its bound and the float64 ones decisive.

    Attributes:
      rule: the reverse-step rule.
      steps: reverse steps a site.
      end_to_end: by precision ("float64", then the type the weights are stored in), the figure of the outputs.
      sites: by precision, the figures of the layers.
      structure: "same_tree" and "same_dtypes" of the parameters, and "same_program": the optimised program compiled for
        the fused weights is, to the letter, the backbone's own.
    """

    rule: str
    steps: int
    end_to_end: Mapping[str, Figure]
    sites: Mapping[str, tuple[SiteFigure, ...]]
    structure: Mapping[str, bool]

    @property
    def passed(self) -> bool:
        """Whether fused equals explicit and the structure is the backbone's."""
        figures = [*self.end_to_end.values(), *(site.figure for rows in self.sites.values() for site in rows)]
        exact = [self.end_to_end["float64"], *(site.figure for site in self.sites["float64"])]
        return (
            all(f.passed for f in figures)
            and all(f.decisive or f.change <= NO_CHANGE for f in exact)
            and all(self.structure.values())
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the machine-readable form, see docs/report.md."""
        results = {}
        for name, end in self.end_to_end.items():
            rows = [{"path": s.path, "slice": s.copy, "t": [*s.times], **s.figure.to_json()} for s in self.sites[name]]
            results[name] = {
                **end.to_json(),
                "passed": all([end.passed, *(row["passed"] for row in rows)]),
                "sites": rows,
            }
        return {
            "passed": self.passed,
            "rule": self.rule,
            "steps": self.steps,
            "results": results,
            "structure": dict(self.structure),
        }

    def __str__(self) -> str:
        lines = [
            f"Certificate: {'PASSED' if self.passed else 'FAILED'}   (rule {self.rule}, {self.steps} step(s) a site)"
        ]
        for name, end in self.end_to_end.items():
            worst = max(self.sites[name], key=lambda site: site.figure.error / site.figure.bound)
            lines.append(
                f"  {name:8s} end to end: error {end.error:.1e} of the change, bound {end.bound:.1e}; "
                f"worst layer {worst.path}: {worst.figure.error:.1e}, bound {worst.figure.bound:.1e}"
                + ("" if end.decisive else "  (too coarse a type to decide)")
            )
        marks = ", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in self.structure.items())
        lines.append(f"  denoising changes the output by {100 * self.end_to_end['float64'].change:.3g} %;  {marks}")
        return "\n".join(lines)


def certify(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *args: Any,
    rule: str = "ddpm",
    steps: int | None = None,
    fused: Tree | None = None,
    **kwargs: Any,
) -> Certificate:
    """Compares the fused network with the explicit one on real input, in float64 and in the stored precision.

    Args:
      backbone: an unbound Linen module.
      variables: its own variables, {"params": …, …}.
      denoise: the denoisers.
      sites, schedule, rule, steps: see `drep_jax.core.fusion.fuse`.
      *args: input for the backbone; use real images.
      fused: the weights that are deployed; by default fused here in float64 and rounded once. In float64 they are
        measured with the rounding to their type undone, so that a wrong leaf shows in whatever type it is stored.
      **kwargs: passed on to the backbone.

    Returns:
      A `Certificate`; look at `passed`.
    """
    params = {"backbone": variables["params"], "denoise": denoise}
    exact = fuse_exact(params, sites, schedule, rule=rule, steps=steps, round_back=False)
    stored = jax.tree_util.tree_map(lambda new, old: np.asarray(new).astype(old.dtype), exact, variables["params"])
    deployed = stored if fused is None else fused
    measured = undo_rounding(exact, stored, deployed, variables["params"])
    settings = (backbone, sites, schedule, rule, steps, kwargs)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        free = backbone.clone(dtype=None) if getattr(backbone, "dtype", None) is not None else backbone
        wide = [jax.tree_util.tree_map(wide_leaf, tree) for tree in (variables, denoise, measured, args)]
        results = {"float64": _measure((free, *settings[1:]), *wide)}
    name = str(np.result_type(*{np.asarray(get_in(deployed, s.layers[0].path)["kernel"]).dtype for s in sites}))
    if name != "float64":
        results[name] = _measure(settings, variables, denoise, deployed, args)
    return Certificate(
        rule=rule,
        steps=sites[0].steps if steps is None else steps,
        end_to_end={name: end for name, (end, _) in results.items()},
        sites={name: rows for name, (_, rows) in results.items()},
        structure=structure_kept(backbone, variables, {**variables, "params": deployed}, args, kwargs),
    )


def undo_rounding(exact: Tree, stored: Tree, deployed: Tree, base: Tree) -> Tree:
    """Returns `deployed` with every leaf that is `exact` but for rounding replaced by `exact`.

    Rounding is ‖deployed − exact‖ ≤ ‖stored − exact‖ + 32·ε·(‖base‖ + ‖exact‖), with ε of the arithmetic of `fuse`.
    """
    if not (_same_tree(stored, deployed) and _forms(stored) == _forms(deployed)):
        return exact  # `structure` refuses these

    def choose(exact: Any, stored: Any, deployed: Any, base: Any) -> Any:
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            return deployed
        epsilon = float(jnp.finfo(jnp.promote_types(stored.dtype, jnp.float32)).eps)
        stored, wide, base = (np.asarray(leaf).astype(np.float64) for leaf in (stored, deployed, base))
        slack = SAFETY * epsilon * (np.linalg.norm(base) + np.linalg.norm(exact))
        return exact if np.linalg.norm(wide - exact) <= np.linalg.norm(stored - exact) + slack else wide

    return jax.tree_util.tree_map(choose, exact, stored, deployed, base)


def _same_tree(before: Tree, after: Tree) -> bool:
    trees: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (before, after)]
    return trees[0] == trees[1]


def _forms(tree: Tree) -> list[Any]:
    return [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(tree)]


def wide_leaf(leaf: Any) -> Any:
    """Returns a leaf in float64 if it is floating, as NumPy."""
    array = np.asarray(leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _measure(
    settings: Any, variables: Tree, denoise: Tree, fused: Tree, args: Any
) -> tuple[Figure, tuple[SiteFigure, ...]]:
    backbone, sites, schedule, rule, steps, kwargs = settings
    types: dict[str, Any] = {}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        own = {name: leaf for name, leaf in module.variables["params"].items() if name in ("kernel", "bias")}

        def run(weights: Tree, x: Any) -> Any:
            return module.clone(parent=None, name=None).apply({"params": weights}, x)

        base = call(x)
        explicit = call_denoised(site, layer, module, extra, x, lambda clean: run(own, clean))
        types[layer.name] = base.dtype
        sow(module, layer, "squares", _squares(base, explicit, run(extra["fused"], x)))
        return base

    def compare(variables: Tree, denoise: Tree, fused: Tree, args: Any) -> Any:
        options = {"rule": rule, "steps": steps, **kwargs}
        extras = explicit_extras(denoise, sites, schedule, rule, steps)
        for site in sites:
            for layer in site.layers:
                weights = get_in(fused, layer.path)
                extras[layer.path]["fused"] = {name: weights[name] for name in ("kernel", "bias") if name in weights}
        base, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
        explicit = explicit_apply(backbone, variables, denoise, sites, schedule, *args, **options)
        after = backbone.apply({**variables, "params": fused}, *args, **kwargs)
        leaves = [floating_leaves(tree) for tree in (base, explicit, after)]
        types["output"] = leaves[0][0].dtype
        return sum(_squares(*parts) for parts in zip(*leaves, strict=True)), collected

    with jax.default_matmul_precision("highest"):
        end, collected = jax.device_get(jax.jit(compare)(variables, denoise, fused, args))
    rows = []
    for site in sites:
        for layer in site.layers:
            values = np.asarray(get_in(collected, layer.path)["squares"])
            values = values.reshape(site.stack or 1, -1, 4).sum(axis=1)  # of all calls, if a scan repeats one layer
            for copy, value in enumerate(values):
                times = tuple(range(site.times[copy], site.times[copy] - (steps or site.steps), -1))
                epsilon = float(jnp.finfo(types[layer.name]).eps)
                rows.append(SiteFigure(layer.name, copy, times, figure(value, epsilon)))
    # The coarsest type on the way decides what the output can resolve.
    epsilon = max(float(jnp.finfo(dtype).eps) for dtype in types.values())
    return figure(np.asarray(end), epsilon), tuple(rows)


def floating_leaves(tree: Tree) -> list[Any]:
    """Returns the floating leaves of a tree of outputs."""
    return [leaf for leaf in jax.tree_util.tree_leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _squares(base: Any, explicit: Any, fused: Any) -> Any:
    wide = jnp.promote_types(base.dtype, jnp.float32)
    base, explicit, fused = (value.astype(wide) for value in (base, explicit, fused))
    return jnp.stack([jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, fused - explicit)])


def structure_kept(backbone: nn.Module, before: Tree, after: Tree, args: Any, kwargs: Any) -> dict[str, bool]:
    """Returns whether two sets of variables have the same tree and types, and compile to the same program to the letter."""
    same_tree, same_dtypes = _same_tree(before, after), _forms(before) == _forms(after)
    same_program = False
    if same_tree and same_dtypes:
        apply = jax.jit(lambda variables, args: backbone.apply(variables, *args, **kwargs))

        def shapes(tree: Tree) -> Tree:  # where an array lies is no property of the network
            return jax.tree_util.tree_map(
                lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree
            )

        # One line for both, because the text of a program names the line that asked for it.
        one, two = (apply.lower(shapes(variables), shapes(args)).compile().as_text() for variables in (before, after))
        same_program = one is not None and one == two
    return {"same_tree": same_tree, "same_dtypes": same_dtypes, "same_program": same_program}
