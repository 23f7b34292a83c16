"""Isotropic denoisers for any rule, number of steps and time steps, solved from the moments of a finished run.

A *recipe* says which noise is assumed at the sites and how it is taken away. Whatever it says, what comes of it is one affine
map a site, x̂ = A x + c: k reverse steps of a rule with Algorithm 1's minimum compose (`drep_jax.core.fusion.composed_maps`), and
`wiener:r` is a single map by itself. So recipes can be compared, mixed with the backbone by a strength and fused alike.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from drep_jax.core.closed_form import closed_form, wiener_maps
from drep_jax.core.denoisers import site_steps
from drep_jax.core.fusion import composed_maps
from drep_jax.core.moments import Moments
from drep_jax.core.schedule import RULES, Schedule, reverse_step
from drep_jax.core.sites import Site, assign_times
from drep_jax.errors import ConfigError, lookup
from drep_jax.trees import set_in
from drep_jax.typing import Path, Tree

WIENER = "wiener:"
"""Prefix of rules whose noise is a share of each site's own feature power."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the sites of a network are denoised.

    Attributes:
      rule: of the schedule (`ddpm`, `paper`, `ddim`, `ddim:r`), or `wiener:r` with the noise power r·tr E[F Fᵀ]/d.
      steps: k, the reverse steps a site.
      scale: of the time steps, see `drep_jax.core.sites.assign_times`; without meaning for `wiener:r`.
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
    """Recipes, and those that were left out with the reason.

    Attributes:
      recipes: in the order of the settings.
      dropped: {label: why it does not fit}.
    """

    recipes: tuple[Recipe, ...]
    dropped: dict[str, str]


def is_single(rule: str) -> bool:
    """Returns whether a rule is one jump, which cannot be repeated."""
    return ":" in rule


def check_rule(rule: str, schedule: Schedule) -> None:
    """Refuses what is no rule that can be solved from moments.

    Raises:
      ConfigError: naming the nearest rule.
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


def check_grid(options: Mapping[str, Any], schedule: Schedule) -> None:
    """Refuses settings of the sweep that no grid can be made of.

    Raises:
      ConfigError: naming the setting.
    """
    for name in ("rules", "steps", "scales", "strengths"):
        if not options[name]:
            raise ConfigError(f"sweep.{name} is empty; give at least one.")
    for rule in options["rules"]:
        check_rule(rule, schedule)
    if not all(not isinstance(k, bool) and int(k) == k and k >= 1 for k in options["steps"]):
        raise ConfigError(f"sweep.steps={options['steps']} are numbers of reverse steps, each at least 1.")
    if not all(math.isfinite(scale) and scale > 0 for scale in options["scales"]):
        raise ConfigError(f"sweep.scales={options['scales']} are scales of the time steps, each above 0.")
    if not all(math.isfinite(tau) and tau >= 0 for tau in options["strengths"]):
        raise ConfigError(f"sweep.strengths={options['strengths']} are strengths of fusion, each at least 0.")


def make_grid(options: Mapping[str, Any], sites: Sequence[Site], schedule: Schedule) -> Grid:
    """Returns every recipe of rules × steps × scales; single jumps have one step, `wiener:r` no scale either.

    Raises:
      ConfigError: for settings that cannot be used, or if nothing fits into the schedule.
    """
    check_grid(options, schedule)
    wanted: list[Recipe] = []
    for rule in options["rules"]:
        if rule.startswith(WIENER):
            wanted.append(Recipe(rule))
            continue
        steps = (1,) if is_single(rule) else options["steps"]
        wanted += [Recipe(rule, int(k), float(scale)) for k in steps for scale in options["scales"]]
    recipes, dropped = [], {}
    for recipe in dict.fromkeys(wanted):
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
    """Returns each recipe's maps as a `denoise` subtree for rule "affine"; equal time steps are solved once.

    Args:
      recipes: of which those with the same t are solved together.
      moments: of the sites' features.
      sites: whose own time steps do not matter.
      schedule: the noise schedule.

    Returns:
      {"kernel": (I − A)ᵀ, "bias": −c} a site, computed in float64 and rounded once to float32.
    """
    found: dict[Recipe, Tree] = {}

    def times(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
        return () if recipe.ratio is not None else tuple(s.times for s in _respaced(recipe, sites, schedule))

    for when, alike in itertools.groupby(sorted(recipes, key=times), key=times):
        if not when:
            found.update({recipe: wiener_maps(moments, sites, recipe.ratio or 0.0) for recipe in alike})
            continue
        denoise: Tree = None
        for recipe in alike:
            placed = _respaced(recipe, sites, schedule)
            if denoise is None:
                denoise = closed_form(moments, placed, schedule, dtype=np.float64)
            found[recipe] = as_affine(denoise, placed, schedule, rule=recipe.rule, steps=recipe.steps)
    return [found[recipe] for recipe in recipes]


def as_affine(denoise: Tree, sites: Sequence[Site], schedule: Schedule, *, rule: str, steps: int) -> Tree:
    """Returns the `denoise` subtree for rule "affine" that is the same map as `steps` steps of `rule`, in float32."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), denoise)
        maps = composed_maps({"denoise": wide}, sites, schedule, rule=rule, steps=steps)
    tree: Tree = {}
    for site in sites:
        leaves = {"kernel": maps[site.path]["matrix"], "bias": maps[site.path].get("constant")}
        tree = set_in(
            tree, site.path, {n: -np.asarray(leaf, np.float32) for n, leaf in leaves.items() if leaf is not None}
        )
    return tree


def _respaced(recipe: Recipe, sites: Sequence[Site], schedule: Schedule) -> tuple[Site, ...]:
    return assign_times(sites, timesteps=schedule.timesteps, steps=recipe.steps, time_scale=recipe.scale)
