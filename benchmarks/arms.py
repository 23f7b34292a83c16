"""What camvid.py, coco.py and coco_c.py share: a folder of what is kept, arms, choice of strengths, table, command line.

A script says which arms there are, how images are scored, and what its tables show.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from benchmarks.keeping import kept
from drep_jax.core.closed_form import closed_form, wiener_maps
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.measured import measuring
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.evaluation.placebo import placebo_denoisers
from drep_jax.evaluation.selection import Candidate, choose
from drep_jax.exporting.statistics import Statistics
from drep_jax.learners.base import direct_maps, leading_counts, noise_predictors, selection_of, with_leading
from drep_jax.learners.streams import CorruptedImages
from drep_jax.metrics.reducers import Metric
from drep_jax.run.backbone import read_weights
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter

SEED = 11
UNFINISHED = 3
"""Exit status of a call that ended after its minutes."""

Results = Mapping[str, Mapping[str, Any]]
"""Arm ↦ condition ↦ statistics of every test image."""


class Job:
    """The network, its images, and the folder of what is kept."""

    def __init__(self, config: Any, cache: str, every: int) -> None:
        self.config, self.cache = config, cache
        os.makedirs(cache, exist_ok=True)
        self.setup = build(config)
        self.run = Run(config, self.setup, cache, MetricWriter(cache))
        self.variables = read_weights(self.run, config.backbone.init_from)
        self.index = np.arange(0, len(self.setup.test), every)
        self.every = every

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the tree of arrays in the file of that name, which is made if it is not there."""
        return kept(os.path.join(self.cache, re.sub(r"[^\w.-]+", "_", name) + ".npz"), make)

    def fused(self, denoisers: Denoisers) -> Any:
        """Returns the backbone with denoisers fused into it."""
        return fuse_variables_exact(self.variables, denoisers, self.setup.sites, self.setup.schedule)

    def chosen(self, name: str, candidates: Mapping[str, Any]) -> Any:
        """Returns maps at the leading sites and the strength that agree best on held-out images, see `best`."""
        sites = self.setup.sites
        counts = leading_counts(len(sites), self.config.select.leading)
        grid = [
            with_leading(Candidate(label, tree), sites, count) for label, tree in candidates.items() for count in counts
        ]
        candidate, strength = self.best(name, grid)
        label = grid[candidate].label if strength else "backbone"
        print(f"{name}: {label}, strength {strength:g}", flush=True)
        return direct_maps(grid[candidate].denoise).scaled(strength)

    def best(self, name: str, grid: Sequence[Candidate]) -> tuple[int, float]:
        """Returns the candidate and strength that `choose` takes; these two are kept."""

        def make() -> Any:
            choice = choose(self.setup, self.variables, grid, selection_of(self.config))
            for point in choice.points:
                scores = " ".join(f"{condition} {score:.1f}" for condition, score in point.agreement.items())
                print(f"  {point.label}, strength {point.strength:g}: {scores}")
            point = choice.points[choice.chosen]
            return {"candidate": np.array(point.candidate), "strength": np.array(point.strength)}

        point = self.kept(f"{name} chosen", make)
        return int(point["candidate"]), float(point["strength"])


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network, the statistics that its BatchNorms mix, and whether the whole network is kept."""

    network: Callable[[Any], Any]
    statistics: Statistics | None = None
    keep: bool = False


def backbone(job: Job) -> Any:
    """Returns the unchanged backbone."""
    return job.variables


def measured(job: Job, noise: str = "") -> Any:
    """Returns the backbone with the measured maps."""
    return job.fused(measured_maps(job, noise))


def measured_maps(job: Job, noise: str = "") -> Denoisers:
    """Returns the chosen maps of measured noise, by default that of the configuration."""
    options, shares = job.config.measured, job.config.measured.clean_share
    name = "measured mixed" if noise else "measured"

    @functools.cache
    def solver() -> Any:
        config = job.config.copy_and_resolve_references()
        config.noise = noise or config.noise
        images = CorruptedImages(config, job.setup)
        known = {name: options[name] for name in ("vectors", "shortcut", "chunk", "memory_gib")}
        solve = measuring(
            job.setup.backbone,
            job.variables,
            job.setup.sites,
            images,
            ridge=options.ridge or None,
            outputs=False,
            **known,
        )
        return lambda share: solve([share, *[(1 - share) / images.corrupted] * images.corrupted]).denoise

    solved = {f"clean share {share:g}": job.kept(f"{name} {share:g}", lambda s=share: solver()(s)) for share in shares}
    return job.chosen(name, solved)


def placebo(job: Job) -> Any:
    """Returns the backbone with random maps of the norms of the measured ones."""
    params = {"backbone": job.variables["params"], "denoise": measured_maps(job)}
    maps = placebo_denoisers(params, job.setup.sites, job.setup.schedule, jax.random.key(SEED))
    return job.fused(direct_maps(maps))


def from_clean(job: Job, wiener: bool) -> Any:
    """Returns the backbone with the closed form, or with the chosen Wiener filters."""
    moments, sites = run_moments(job.run, job.variables), job.setup.sites
    if not wiener:
        return job.fused(noise_predictors(job.config, closed_form(moments, sites, job.setup.schedule)))
    ratios = job.config.wiener.ratios
    return job.fused(job.chosen("wiener", {f"power {ratio:g}": wiener_maps(moments, sites, ratio) for ratio in ratios}))


def network(job: Job, name: str, arm: Arm) -> Any:
    """Returns the variables of an arm, from its file if it keeps them."""
    return job.kept(name, lambda: arm.network(job)) if arm.keep else arm.network(job)


# ---------------------------------------------------------------------------------------------------------------------
# Scores and tables
# ---------------------------------------------------------------------------------------------------------------------


def end_after(deadline: float, place: str) -> None:
    """Ends the script if the time, of `time.monotonic`, is over; `place` says where it stopped."""
    if time.monotonic() > deadline:
        print(f"The minutes are over at {place}; a further call goes on from here.")
        sys.exit(UNFINISHED)


def scored(
    job: Job, name: str, arm: Arm, score: Callable[[Any, str], Any], conditions: Sequence[str], deadline: float
) -> dict[str, Any]:
    """Returns the statistics of an arm by condition; its network is made if one of them is not kept.

    Args:
      job: with the test images.
      name: of the arm.
      arm: the network and its statistics.
      score: (variables, condition) ↦ statistics of the test images.
      conditions: noise, as text.
      deadline: see `end_after`.
    """
    variables = functools.cache(lambda: network(job, name, arm))
    results = {}
    for condition in conditions:
        end_after(deadline, f"{name}, {condition}")
        results[condition] = job.kept(f"{name} {condition} {job.every}", lambda c=condition: score(variables(), c))
    return results


def changes(
    metric: Metric, results: Results, conditions: Sequence[str], weights: np.ndarray, units: Mapping[str, Bootstrap]
) -> str:
    """Returns a table: a metric of the backbone in percent, and every other arm's change in points with its intervals.

    Args:
      metric: (statistics, weights) ↦ a fraction.
      results: with the arm "backbone".
      conditions: the columns.
      weights: of the images; their number is that of the resamples' items.
      units: name of a row below each arm ↦ its resamples; none for no intervals.
    """
    cells: dict[str, list[str]] = {arm: [] for arm in results}
    ends: dict[tuple[str, str], list[str]] = {(arm, unit): [] for arm in results for unit in units}
    for condition in conditions:
        stats = {arm: (metric, results[arm][condition]) for arm in results}
        whole = {arm: 100 * float(metric(entry, weights)) for arm, (_, entry) in stats.items()}
        drawn = {unit: bootstrap.values(stats) for unit, bootstrap in units.items()}
        for arm in results:
            gain = whole[arm] - whole["backbone"]
            cells[arm].append(f"{whole[arm]:.1f}" if arm == "backbone" else f"{gain:+.1f}")
            for unit, bootstrap in units.items():
                interval = bootstrap.interval(gain, 100 * (drawn[unit][arm] - drawn[unit]["backbone"]))
                ends[arm, unit].append(f"[{interval.low:+.1f}, {interval.high:+.1f}]")
    rows = []
    for arm, values in cells.items():
        rows.append([arm, *values])
        if arm != "backbone":
            rows += [[unit, *ends[arm, unit]] for unit in units]
    return tabulate(rows, ["", *conditions], tablefmt="github", disable_numparse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def command_line(description: str | None, tiny: Mapping[str, object], **defaults: object) -> Parser:
    """Returns the options that every script has.

    Args:
      description: of the script, as it is written.
      tiny: option ↦ its default with --tiny.
      **defaults: `config`, `every` and `resamples`, and others that differ from those here.
    """
    parser = Parser(description, **tiny)
    parser.add_argument("--cache", required=True, help="folder of what is kept")
    parser.add_argument("--config", help="in configs/")
    parser.add_argument("--arms", default=".*", help="regular expression of the arms")
    parser.add_argument("--every", type=int, help="score every n-th test image")
    parser.add_argument("--resamples", type=int, help="of the test images, for the intervals")
    parser.add_argument("--minutes", type=float, default=1e6, help="no new work is begun after these")
    parser.set_defaults(**defaults)
    return parser


def named(parser: Parser, options: argparse.Namespace, arms: Mapping[str, Arm]) -> list[str]:
    """Returns the arms that --arms matches; an error if it matches none."""
    names = [name for name in arms if re.fullmatch(options.arms, name)]
    if not names:
        parser.error(f"--arms={options.arms} matches none of {', '.join(arms)}")
    return names


def configuration(name: str) -> Any:
    """Returns the configuration of a file in configs/, open to new settings."""
    return importlib.import_module(f"configs.{name}").get_config().unlock()
