"""The certificate: fused against explicit, at every layer and end to end, measured on the *change*.

At small t denoising changes the output by a few thousandths. A tolerance on the output itself would
pass a fusion that does nothing. So the error is relative to the change, and so is the bound, which
is what arithmetic of precision ε allows:

    error = ‖(fused − base) − (explicit − base)‖ / ‖explicit − base‖
    bound = 32·ε·(‖base‖ + ‖explicit‖ + ‖b′‖) / ‖explicit − base‖

‖b′‖ is over all positions of the output. A denoiser that amplifies directions in which the features
hardly vary has a constant that cancels their mean there, and the sum is no more exact than its
terms. The bound of the outputs has no such term; it is widened by the largest factor by which ‖b′‖
widens that of a layer. ε is that of the coarsest type that the numbers go through: the arithmetic, and the weights as they
are stored. In float64 each layer is compared by itself, so that its error is measured whatever the
network rounds to in between.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.core.denoisers import Denoisers, resolve
from drep_jax.core.deployed import deployed_part, structure_kept, undo_rounding
from drep_jax.core.explicit import call_denoised, explicit_apply, explicit_extras
from drep_jax.core.figure import Figure, figure
from drep_jax.core.fusion import FUSED, fuse_variables_exact
from drep_jax.core.intercept import place, sow, sown, visit_sites
from drep_jax.core.layers import Layer, alone
from drep_jax.core.precision import SAFETY, epsilon, held_line, rounding, type_name, widened
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in
from drep_jax.typing import AnyArray, Path, Tree

NO_CHANGE = 4 * SAFETY * float(np.finfo(np.float64).eps)
"""Relative change below which float64 cannot tell it from none.

Even a patch denoiser that does nothing sums in another order than the layer itself."""


PIXELS = 2**18
"""Pixels of the images that are compared at once; larger batches go through in parts."""


@dataclasses.dataclass(frozen=True)
class SiteFigure:
    """The comparison at one layer of a site, on its features in the unchanged backbone.

    Attributes:
      path: of the layer, as text.
      copy: index of its stacked copy; 0 if not stacked.
      times: t of each reverse step.
      figure: error, bound and change of the layer's output.
    """

    path: str
    copy: int
    times: tuple[int, ...]
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result of `certify`.

    It is passed if every error is within its bound, every float64 bound is decisive, and the
    structure is the backbone's. If the code of the network rounds to a coarser type (`held`), the
    bound of its outputs follows that type and need not be decisive; those of the layers are.

    Attributes:
      rule: the reverse-step rule.
      steps: reverse steps at each site.
      end_to_end: {precision: figure of the outputs}, "float64" and the type the weights are stored
        in.
      sites: {precision: figures of the layers}.
      structure: {"same_tree", "same_dtypes"} of the parameters, and "same_program": whether the
        optimized program compiled for the fused weights is the backbone's own, to the letter.
      held: the type that the network rounds to even if it is given float64, or None.
      sizes: {"height×width": certificate on images of another size}; {} if there is one size only.
    """

    rule: str
    steps: int
    end_to_end: Mapping[str, Figure]
    sites: Mapping[str, tuple[SiteFigure, ...]]
    structure: Mapping[str, bool]
    held: str | None = None
    sizes: Mapping[str, "Certificate"] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether fused equals explicit and the structure is the backbone's, at every size."""
        figures = [*self.end_to_end.values(), *(site.figure for rows in self.sites.values() for site in rows)]
        exact = [site.figure for site in self.sites["float64"]]
        if self.held is None:
            exact.append(self.end_to_end["float64"])
        return (
            all(f.passed for f in figures)
            and all(f.decisive or f.change <= NO_CHANGE for f in exact)
            and all(self.structure.values())
            and all(certificate.passed for certificate in self.sizes.values())
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
            "held": self.held,
            **({"sizes": {name: other.to_json() for name, other in self.sizes.items()}} if self.sizes else {}),
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
        if self.held is not None:
            lines.append("  " + held_line(self.held))
        lines.append(f"  denoising changes the output by {100 * self.end_to_end['float64'].change:.3g} %;  {marks}")
        for name, other in self.sizes.items():
            lines += [f"at {name}: {line}" if index == 0 else line for index, line in enumerate(str(other).split("\n"))]
        return "\n".join(lines)


@standard_promotion
def certify(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree | Denoisers,
    sites: Sequence[Site],
    schedule: Schedule,
    *args: Any,
    rule: str | None = None,
    steps: int | None = None,
    fused: Tree | None = None,
    fused_statistics: Tree | None = None,
    **kwargs: Any,
) -> Certificate:
    """Compares the fused network with the explicit one, in float64 and in the stored precision.

    Args:
      backbone: an unbound Linen module.
      variables: its variables, {"params": …, …}.
      denoise: a `denoise` subtree or a `Denoisers`.
      sites, schedule, rule, steps: see `drep_jax.core.fusion.fuse`.
      *args: inputs of the backbone; use real images.
      fused: the weights that are deployed; by default they are fused here in float64 and rounded
        once. For the comparison in float64 their rounding is undone, see `undo_rounding`, so that a
        wrong leaf shows whatever type it is stored in.
      fused_statistics: the "batch_stats" that are deployed with `fused`. Needed where a running mean
        takes a constant.
      **kwargs: for the backbone.

    Returns:
      A `Certificate`; its `passed` is the verdict.

    Raises:
      FusionError, NonFiniteError, ConfigError: see `drep_jax.core.fusion.fuse_variables`.
    """
    denoise, rule, steps = resolve(denoise, rule, steps)
    base_part = {name: tree for name, tree in variables.items() if name in FUSED}
    exact = fuse_variables_exact(base_part, denoise, sites, schedule, rule=rule, steps=steps, round_back=False)
    stored = jax.tree_util.tree_map(lambda new, old: np.asarray(new).astype(old.dtype), exact, base_part)
    deployed = deployed_part(stored, fused, fused_statistics, sites)
    measured = {**variables, **undo_rounding(exact, stored, deployed, base_part)}
    deployed = {**variables, **deployed}
    settings = (backbone, sites, schedule, rule, steps, kwargs)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        free = backbone.clone(dtype=None) if getattr(backbone, "dtype", None) is not None else backbone
        base, denoisers, after, inputs = (
            jax.tree_util.tree_map(wide_leaf, tree) for tree in (variables, denoise, measured, args)
        )
        with widened():
            held = rounding(lambda variables, args: free.apply(variables, *args, **kwargs), base, inputs)
            results = {"float64": _measure((free, *settings[1:]), base, denoisers, after, inputs, held, wide=True)}
    name = type_name(get_in(deployed["params"], layer.path)["kernel"] for site in sites for layer in site.layers)
    if name != "float64":
        results[name] = _measure(settings, variables, denoise, deployed, args, held, wide=False)
    return Certificate(
        rule=rule,
        steps=sites[0].steps if steps is None else steps,
        end_to_end={name: end for name, (end, _) in results.items()},
        sites={name: rows for name, (_, rows) in results.items()},
        structure=structure_kept(backbone, variables, deployed, args, kwargs),
        held=None if held is None else str(held),
    )


def wide_leaf(leaf: Any) -> Any:
    """Returns a leaf as NumPy array, in float64 if it is floating."""
    array = np.asarray(leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _measure(
    settings: Any, variables: Tree, denoise: Tree, fused: Tree, args: Any, held: Any, *, wide: bool
) -> tuple[Figure, tuple[SiteFigure, ...]]:
    """Returns the figures of the outputs and of all layers, in the arguments' precision.

    Args:
      settings: backbone, sites, schedule, rule, steps and further arguments of the backbone.
      variables, denoise, fused, args: as for `certify`.
      held: the coarsest type that the network rounds to even in float64, or None.
      wide: whether this is the comparison in float64, where each layer is given its input so.
    """
    backbone, sites, schedule, rule, steps, kwargs = settings
    types: dict[str, Any] = {}
    layers = _by_layer(sites)

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if (site, layer) != layers[layer.path][0]:
            return call(x)  # a part of a layer that is compared as a whole
        weights = {name: leaf for name, leaf in module.variables["params"].items() if name in ("kernel", "bias")}
        run, returned = alone(module), call(x)
        base = returned
        if wide and x.dtype != np.float64:
            x = x.astype(np.float64)
            base = run(weights, x)
        denoised = functools.partial(run, weights)
        for number, (owner, part) in reversed([*enumerate(layers[layer.path])]):
            denoised = functools.partial(_denoised, owner, part, module, extra["parts"][number], denoised)
        explicit = denoised(x)
        types[layer.name] = base.dtype
        squares = _squares(base, explicit, run(extra["fused"], x), extra.get("mean"))
        bias = extra["fused"].get("bias", jnp.zeros(1, squares.dtype)).astype(squares.dtype)
        constant = jnp.sum(jnp.square(bias)) * (base.size / bias.size)
        sow(module, layer, "squares", jnp.concatenate([squares, constant[None]]))
        return returned

    def visited(variables: Tree, denoise: Tree, fused: Tree, args: Any) -> Any:
        denoisers = explicit_extras(denoise, sites, schedule, rule, steps)
        extras: dict[Path, Tree] = {}
        for rows in layers.values():
            parts = tuple(denoisers[place(part)] for _, part in rows)
            extras[place(rows[0][1])] = {"parts": parts, **_fused_extras(rows[0][1], variables, fused)}
        base, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
        leaves = floating_leaves(base)
        types["output"] = leaves[0].dtype
        return leaves, collected

    def explicit(variables: Tree, denoise: Tree, args: Any) -> Any:
        options = {"rule": rule, "steps": steps, **kwargs}
        return floating_leaves(explicit_apply(backbone, variables, denoise, sites, schedule, *args, **options))

    def after(fused: Tree, args: Any) -> Any:
        return floating_leaves(backbone.apply(fused, *args, **kwargs))

    # Three short programs instead of a long one: a third of the memory, and less to compile.
    visited_program, explicit_program, after_program = jax.jit(visited), jax.jit(explicit), jax.jit(after)
    end, collected = np.zeros(4), None
    with jax.default_matmul_precision("highest"):
        for part in _chunks(args):
            base, figures = visited_program(variables, denoise, fused, part)
            others = explicit_program(variables, denoise, part), after_program(fused, part)
            end += sum(np.asarray(_squares(*outputs), np.float64) for outputs in zip(base, *others, strict=True))
            figures = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), figures)
            collected = figures if collected is None else jax.tree_util.tree_map(np.add, collected, figures)
    rows, coarsest, widenings = [], [], []
    for site, layer in (parts[0] for parts in layers.values()):
        values = np.asarray(sown(collected, layer)["squares"])
        values = values.reshape(site.stack or 1, -1, 5).sum(axis=1)  # over all calls, if a scan repeats one layer
        for copy, squares in enumerate(values):
            times = tuple(range(site.times[copy], site.times[copy] - (steps or site.steps), -1))
            leaves = get_in(fused["params"], layer.path)
            stored = [jnp.result_type(leaves[leaf]) for leaf in ("kernel", "bias") if leaf in leaves]
            coarsest.append(epsilon([types[layer.name], *stored]))
            base_norm, explicit_norm, constant = np.sqrt(squares[[0, 1, 4]].astype(np.float64))
            total = float(base_norm + explicit_norm)
            widenings.append(1.0 + float(constant) / total if total > 0 else 1.0)
            rows.append(SiteFigure(layer.name, copy, times, figure(squares[:4], coarsest[-1], widenings[-1])))
    # The coarsest type in the network decides what the output can resolve.
    resolution = max(*coarsest, epsilon([types["output"], *([] if held is None else [held])]))
    return figure(np.asarray(end), resolution, max(widenings)), tuple(rows)


def _chunks(args: Any) -> list[Any]:
    """Returns the arguments as one batch of images after the other, so that large images need no more memory."""
    if len(args) != 1 or np.ndim(args[0]) != 4:
        return [args]
    (images,) = args
    count, pixels = images.shape[0], images.shape[1] * images.shape[2]
    most = max(1, PIXELS // pixels)
    size = next(size for size in range(min(count, most), 0, -1) if count % size == 0)
    return [(images[first : first + size],) for first in range(0, count, size)]


def _by_layer(sites: Sequence[Site]) -> dict[Path, list[tuple[Site, Layer]]]:
    """Returns the sites of every layer, several where it reads a concatenation, with the layer's parts."""
    layers: dict[Path, list[tuple[Site, Layer]]] = {}
    for site in sites:
        for layer in site.layers:
            layers.setdefault(layer.path, []).append((site, layer))
    return layers


def _denoised(site: Site, layer: Layer, module: nn.Module, extra: Tree, call: Callable[[Any], Any], x: Any) -> Any:
    return call_denoised(site, layer, module, extra, x, call)


def floating_leaves(tree: Tree) -> list[Any]:
    """Returns the floating leaves of a tree of outputs."""
    return [leaf for leaf in jax.tree_util.tree_leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _fused_extras(layer: Layer, variables: Tree, fused: Tree) -> dict[str, Any]:
    """Returns a layer's fused leaves; what its BatchNorm's mean has lost is its bias, beside that mean."""
    leaves = get_in(fused["params"], layer.path)
    extras: dict[str, Any] = {"fused": {name: leaves[name] for name in ("kernel", "bias") if name in leaves}}
    if layer.norm is not None:
        before, after = (get_in(tree["batch_stats"], layer.norm)["mean"] for tree in (variables, fused))
        extras["fused"]["bias"] = before - after
        extras["mean"] = before
    return extras


def _squares(
    base: Float[AnyArray, "*shape"],
    explicit: Float[AnyArray, "*shape"],
    fused: Float[AnyArray, "*shape"],
    mean: Float[AnyArray, " channels"] | None = None,
) -> Float[Array, "4"]:
    """Returns the sums of squares for `figure`; a mean that is subtracted is a term of `base`."""
    wide = jnp.promote_types(base.dtype, jnp.float32)
    base, explicit, fused = (value.astype(wide) for value in (base, explicit, fused))
    sums = [jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, fused - explicit)]
    if mean is not None:
        sums[0] += jnp.sum(jnp.square(mean.astype(wide))) * (base.size // mean.size)
    return jnp.stack(sums)
