"""Recipes: denoisers against isotropic noise for any rule, number of steps and time steps.

A *recipe* says which noise is assumed at the sites and how it is removed. Its result is one affine
map a site, x̂ = A x + c, solved from the moments of a finished run without images. For a rule of
the schedule, k reverse steps with Algorithm 1's minimum are composed; `wiener:r` is a single map by
itself. So all recipes can be compared, interpolated by a strength, and fused alike.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from drep_jax.core.closed_form import closed_form, wiener_maps
from drep_jax.core.denoisers import as_affine
from drep_jax.core.moments import Moments
from drep_jax.core.reverse_map import site_steps
from drep_jax.core.schedule import RULES, Schedule, reverse_step
from drep_jax.core.sites import Site, assign_times
from drep_jax.errors import ConfigError, lookup
from drep_jax.typing import Path, Tree

WIENER = "wiener:"
"""Prefix of rules whose noise power is a fraction of each site's own feature power."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which noise is assumed at the sites, and how it is removed.

    Attributes:
      rule: a rule of the schedule (`ddpm`, `paper`, `ddim`, `ddim:r`), or `wiener:r` for noise of
        power r·tr E[F Fᵀ]/d.
      steps: reverse steps k at each site.
      scale: factor on the time steps, see `drep_jax.core.sites.assign_times`; not used by
        `wiener:r`.

    >>> Recipe("ddpm", 5, 10.0).label, Recipe("wiener:0.1").ratio
    ('ddpm, k 5, t ×10', 0.1)
    """

    rule: str
    steps: int = 1
    scale: float = 1.0

    @property
    def ratio(self) -> float | None:
        """The r of `wiener:r`; None for a rule of the schedule."""
        return float(self.rule.removeprefix(WIENER)) if self.rule.startswith(WIENER) else None

    @property
    def label(self) -> str:
        """Its name in tables, such as "ddpm, k 5, t ×10"."""
        if self.ratio is not None:
            return self.rule
        steps = "" if is_single(self.rule) else f", k {self.steps}"
        return f"{self.rule}{steps}, t ×{self.scale:g}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Recipes that fit into the schedule, and those that do not.

    Attributes:
      recipes: in the order of the settings.
      dropped: {label of a recipe: why it does not fit}.
    """

    recipes: tuple[Recipe, ...]
    dropped: dict[str, str]


def is_single(rule: str) -> bool:
    """Returns whether a rule of a recipe is one map or jump, which cannot be repeated."""
    return ":" in rule


def check_rule(rule: str, schedule: Schedule) -> None:
    """Checks that denoisers for a rule can be solved from moments.

    Raises:
      ConfigError: for an unknown rule, naming the nearest one; for `affine`, which predicts no
        noise; for a target outside the schedule.
    """
    if rule.startswith(WIENER) or rule == WIENER.rstrip(":"):
        try:
            ratio = float(rule.removeprefix(WIENER))
        except ValueError:
            ratio = math.nan
        if not (math.isfinite(ratio) and ratio > 0):
            raise ConfigError(
                f'Rule "{rule}" is not understood: noise over feature power is above 0, as in "wiener:0.01".'
            )
        return
    lookup({name: name for name in (*RULES, WIENER.rstrip(":"))}, rule.partition(":")[0], "rule")
    reverse_step(schedule, schedule.timesteps, rule)
    if rule == "affine":
        raise ConfigError(
            'Rule "affine" is for maps given directly; these denoisers predict noise. Use ddpm, paper or ddim, or wiener:r.'
        )


def check_grid(
    schedule: Schedule,
    *,
    rules: Sequence[str],
    steps: Sequence[int],
    scales: Sequence[float],
    strengths: Sequence[float],
) -> None:
    """Checks the settings `sweep.*` of a grid of recipes and strengths.

    Args:
      schedule: the noise schedule.
      rules: of `Recipe`.
      steps: numbers of reverse steps, each at least 1.
      scales: factors on the time steps, each above 0.
      strengths: τ of the fusion, each at least 0.

    Raises:
      ConfigError: naming the setting.
    """
    settings: dict[str, Sequence[object]] = {"rules": rules, "steps": steps, "scales": scales, "strengths": strengths}
    for name, values in settings.items():
        if not values:
            raise ConfigError(f"sweep.{name} is empty; give at least one.")
    for rule in rules:
        check_rule(rule, schedule)
    if not all(not isinstance(k, bool) and int(k) == k and k >= 1 for k in steps):
        raise ConfigError(f"sweep.steps={steps} are numbers of reverse steps, each at least 1.")
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ConfigError(f"sweep.scales={scales} are scales of the time steps, each above 0.")
    if not all(math.isfinite(tau) and tau >= 0 for tau in strengths):
        raise ConfigError(f"sweep.strengths={strengths} are strengths of fusion, each at least 0.")


def make_grid(
    sites: Sequence[Site],
    schedule: Schedule,
    *,
    rules: Sequence[str],
    steps: Sequence[int],
    scales: Sequence[float],
    strengths: Sequence[float] = (1.0,),
) -> Grid:
    """Returns every recipe of rules × steps × scales.

    Single jumps are taken with one step; `wiener:r` has neither steps nor a scale.

    Args:
      sites: to place the time steps on.
      schedule, rules, steps, scales, strengths: see `check_grid`; strengths are only checked.

    Raises:
      ConfigError: for settings that cannot be used, or if no recipe fits into the schedule.
    """
    check_grid(schedule, rules=rules, steps=steps, scales=scales, strengths=strengths)
    candidates: list[Recipe] = []
    for rule in rules:
        if rule.startswith(WIENER):
            candidates.append(Recipe(rule))
            continue
        counts = (1,) if is_single(rule) else steps
        candidates += [Recipe(rule, int(k), float(scale)) for k in counts for scale in scales]
    recipes, dropped = [], {}
    for recipe in dict.fromkeys(candidates):
        try:
            if recipe.ratio is None:
                site_steps(_respaced(recipe, sites, schedule), schedule, recipe.rule)
            recipes.append(recipe)
        except ConfigError as error:
            dropped[recipe.label] = str(error)
    if not recipes:
        raise ConfigError(f"Nothing of the grid fits into the schedule: {next(iter(dropped.values()))}")
    return Grid(tuple(recipes), dropped)


def solve(
    recipes: Sequence[Recipe], moments: Mapping[Path, Moments], sites: Sequence[Site], schedule: Schedule
) -> list[Tree]:
    """Solves recipes from moments; those with the same time steps share one closed form.

    Args:
      recipes: in any order.
      moments: {site path: moments of its features}.
      sites: whose own time steps do not matter.
      schedule: the noise schedule.

    Returns:
      For each recipe the `denoise` subtree for rule "affine", {"kernel": (I − A)ᵀ, "bias": −c} a
      site, computed in float64 and rounded once to float32.
    """
    solutions: dict[Recipe, Tree] = {}

    def times_of(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
        return () if recipe.ratio is not None else tuple(s.times for s in _respaced(recipe, sites, schedule))

    for times, group in itertools.groupby(sorted(recipes, key=times_of), key=times_of):
        if not times:
            solutions.update({recipe: wiener_maps(moments, sites, recipe.ratio or 0.0) for recipe in group})
            continue
        denoise: Tree = None
        for recipe in group:
            placed = _respaced(recipe, sites, schedule)
            if denoise is None:
                denoise = closed_form(moments, placed, schedule, dtype=np.float64)
            solutions[recipe] = as_affine(denoise, placed, schedule, rule=recipe.rule, steps=recipe.steps)
    return [solutions[recipe] for recipe in recipes]


def _respaced(recipe: Recipe, sites: Sequence[Site], schedule: Schedule) -> tuple[Site, ...]:
    return assign_times(sites, timesteps=schedule.timesteps, steps=recipe.steps, time_scale=recipe.scale)
