"""The grid of `fuse.py --sweep`: denoisers for every (rule, k, time-step scale), solved from the saved moments."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from drep_jax import closed_form
from drep_jax.closed_form import Moments
from drep_jax.denoise_tree import set_in
from drep_jax.errors import ConfigError
from drep_jax.fusion import composed_maps
from drep_jax.schedule import Schedule
from drep_jax.selection import Candidate, Choice
from drep_jax.sites import Path, Site, assign_times

Tree = Any
JUMPS = ("ddim:", "affine")
"""Rules that are one single step."""


def as_affine(
    variables: Tree, denoise: Tree, sites: tuple[Site, ...], schedule: Schedule, rule: str, steps: int
) -> Tree:
    """Returns denoisers for rule "affine" that do in one step what `denoise` does in `steps` by `rule`, in float32."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), denoise)
        maps = composed_maps(
            {"backbone": variables["params"], "denoise": wide}, sites, schedule, rule=rule, steps=steps
        )
        maps = jax.tree_util.tree_map(np.asarray, maps)
    tree: Tree = {}
    for site in sites:
        found = maps[site.path]
        leaves = {"kernel": -found["matrix"].astype(np.float32)}
        if "constant" in found:
            leaves["bias"] = -found["constant"].astype(np.float32)
        tree = set_in(tree, site.path, leaves)
    return tree


def sweep_candidates(
    config: Mapping[str, Any],
    sites: tuple[Site, ...],
    schedule: Schedule,
    variables: Tree,
    moments: Mapping[Path, Moments],
) -> tuple[list[Candidate], list[str]]:
    """Returns a candidate for every combination of the grid, and a line for each that cannot be had.

    Raises:
      ConfigError: for an unknown rule, or a grid without any candidate.
    """
    options = config["sweep"]
    candidates, dropped = [], []
    for rule in options["rules"]:
        jump = any(rule.startswith(name) for name in JUMPS)
        for steps in (1,) if jump else options["steps"]:
            for scale in options["scales"]:
                label = f"{rule} k={steps} t×{scale:g}"
                try:
                    placed = assign_times(sites, timesteps=schedule.timesteps, steps=steps, scale=scale)
                    denoise = closed_form.closed_form(moments, placed, schedule)
                    maps = as_affine(variables, denoise, placed, schedule, rule, steps)
                except ConfigError as error:
                    if "time steps, but the schedule has" not in str(error):
                        raise
                    dropped.append(f"{label}: {error}")
                    continue
                candidates.append(Candidate(label, maps))
    if options["wiener"]:
        for ratio in config["wiener"]["ratios"]:
            candidates.append(Candidate(f"wiener {ratio:g}", closed_form.wiener_maps(moments, sites, ratio)))
    if not candidates:
        raise ConfigError(f"The sweep has no combination left to try. {' '.join(dropped)}")
    return candidates, dropped


def sweep_table(choice: Choice, most: int = 15) -> str:
    """Returns the best points of a sweep as a table, the backbone first and the chosen one marked."""

    def total(number: int) -> float:
        point = choice.points[number]
        scores = point.agreement if choice.criterion == "agreement" or point.accuracy is None else point.accuracy
        value = sum(scores.values())
        return value if np.isfinite(value) else -np.inf

    ranked = sorted(range(1, len(choice.points)), key=total, reverse=True)[:most]
    shown = [0, *dict.fromkeys([*([choice.chosen] if choice.chosen else []), *ranked])]
    labelled = choice.points[0].accuracy is not None
    rows = []
    for number in shown:
        point = choice.points[number]
        row = [f"{point.label}{' *' if number == choice.chosen else ''}", f"{point.strength:g}"]
        if point.accuracy is not None:
            row += [_cell(point.accuracy[c]) for c in choice.conditions]
        row += (
            [_cell(float(np.mean(list(point.agreement.values()))))]
            if labelled
            else [_cell(point.agreement[c]) for c in choice.conditions]
        )
        rows.append(row)
    headers = ["map", "strength", *choice.conditions, *(["agreement"] if labelled else [])]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True)


def _cell(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "overflow"
