"""Selects the best of a grid of isotropic denoisers for a finished run, on held-out images.

The denoisers are solved from the run's moments; nothing is trained. Until the selection, only
held-out images are read (and the training images once, if the run has no moments). Then the test
images are scored once, for the selected point alone.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from drep_jax import files, report
from drep_jax.core.certificate import Certificate
from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.recipes import Grid, make_grid, solve
from drep_jax.data.corruptions import CLEAN
from drep_jax.errors import ConfigError
from drep_jax.evaluation.selection import Candidate, Choice, Point, choose
from drep_jax.jobs.fuse import fuse_and_export, load_run
from drep_jax.jobs.scores import compared, placebo_of, scores_of
from drep_jax.jobs.scoring_checks import check_scoring
from drep_jax.learners.base import direct_maps, selection_of
from drep_jax.parallel import processes
from drep_jax.progress import pulsing
from drep_jax.report.formatting import fixed
from drep_jax.report.lines import NO_METRICS
from drep_jax.run.environment import environment
from drep_jax.run.export import Output
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.trees import check_finite
from drep_jax.typing import Config, Tree

FILE = "sweep.json"
"""Name of the result in the output directory."""


SHOWN = 15
"""Points in the table on the console, beside the backbone and the selected one."""


ARM = "swept"
"""Name of the selected network among the arms."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
      choice: all points with their scores, and the selected one.
      grid: the recipes; that of point i is `grid.recipes[choice.points[i].candidate]`.
      certificate: of the selected weights.
      metrics: the selected network on the test images, as in the report; {} without labels.
      paths: of the files written.
    """

    choice: Choice
    grid: Grid
    certificate: Certificate
    metrics: dict[str, Any]
    paths: list[str]


def sweep(
    directory: str,
    output: Output,
    *,
    rule: str | None = None,
    steps: int | None = None,
    time_scale: float | None = None,
    beta_end: float | None = None,
    strength: float | None = None,
    images: int | None = None,
) -> Swept:
    """Scores the run's grid on held-out images; fuses, certifies, writes and tests the best point.

    Args:
      directory: of the finished run; its settings `sweep` and `select` define the grid and the
        selection.
      output: what to write, and where; `sweep.json` is written to the same directory.
      rule, steps, time_scale, strength: each narrows the grid to this value; strength 0 stays in
        it.
      beta_end: another end of the noise schedule.
      images: number of held-out images; 0 for all, None for the run's own `select.images`.

    Raises:
      DrepError: its subclasses name the setting or file that cannot be used.
    """
    if images is not None and images < 0:
        raise ConfigError(f"The number of held-out images must be 0 (all of them) or more, got {images}.")
    run, variables, _ = load_run(directory)
    config, setup = run.config, run.setup
    data = check_scoring(config, setup)
    check_finite(variables, "Refusing to fuse")
    if beta_end is not None:
        learned_at = config["denoise"]
        setup = setup.respaced(steps=learned_at["steps"], time_scale=learned_at["time_scale"], beta_end=beta_end)
    options = _narrowed(config["sweep"], rule=rule, steps=steps, scale=time_scale, strength=strength)
    settings = {name: options[name] for name in ("rules", "steps", "scales", "strengths")}
    grid = make_grid(setup.sites, setup.schedule, **settings)
    if grid.dropped:
        print(f"Left out, since they do not fit in the schedule: {'; '.join(grid.dropped)}.")
    if processes.primary():
        print("\n".join(report.data_lines({"data": data})), flush=True)
    began = time.perf_counter()
    moments = run_moments(run, variables)
    with pulsing("solving", 1, "grid", shown=config["progress"]):
        trees = solve(grid.recipes, moments, setup.sites, setup.schedule)
    candidates = [Candidate(recipe.label, tree) for recipe, tree in zip(grid.recipes, trees, strict=True)]
    solving = time.perf_counter() - began
    print(f"{len(candidates)} maps a site solved from the run's moments in {solving:.1f} s.", flush=True)
    count = config["select"]["images"] if images is None else images
    selection = selection_of(config, strengths=options["strengths"], images=count)
    choice = choose(setup, variables, candidates, selection)
    print(f"\n{table(choice, selection.max_clean_loss)}\n")

    point = choice.points[choice.chosen]
    recipe = grid.recipes[point.candidate]
    if recipe.ratio is None:
        setup = setup.respaced(steps=recipe.steps, time_scale=recipe.scale)
    solved = direct_maps(trees[point.candidate]).scaled(point.strength)
    denoisers = solved if choice.chosen else direct_maps(init_denoise(setup.sites))
    recorded = {"rule": recipe.rule, "steps": recipe.steps, "strength": point.strength}
    run = dataclasses.replace(run, setup=setup)
    certificate, paths = fuse_and_export(run, variables, denoisers, output, recorded)
    metrics = tested(run, variables, denoisers, choice)
    lines = [report.verdict(condition, entry, ARM) for condition, entry in metrics.items()]
    print("\n".join(["On the test images, looked at once:", *lines]) if lines else NO_METRICS)
    swept = Swept(choice, grid, certificate, metrics, paths)
    if processes.primary():
        content = to_json(swept, directory, solving, selection.max_clean_loss)
        files.write_json(os.path.join(output.directory, FILE), content)
    return swept


def _narrowed(
    options: Config, *, rule: str | None, steps: int | None, scale: float | None, strength: float | None
) -> dict[str, Any]:
    requested = {
        "rules": None if rule is None else (rule,),
        "steps": None if steps is None else (steps,),
        "scales": None if scale is None else (scale,),
        "strengths": None if strength is None else (0.0, strength),
    }
    return {**options, **{name: value for name, value in requested.items() if value is not None}}


def tested(run: Run, variables: Tree, denoisers: Denoisers, choice: Choice) -> dict[str, Any]:
    """Returns test metrics of backbone, placebo and selected network; {} without labels."""
    config, setup = run.config, run.setup
    if setup.test is None:
        return {}
    placebo = placebo_of(run, variables, denoisers)
    arms = {"baseline": variables}
    for name, maps in (("placebo", placebo), (ARM, denoisers)):
        arms[name] = fuse_variables_exact(variables, maps, setup.sites, setup.schedule)
    results = scores_of(config, setup, setup.test, arms, choice.conditions)
    return compared(config, setup, results, ["placebo"])


def table(choice: Choice, max_clean_loss: float) -> str:
    """Returns a text table of the best points, the backbone and the selected point."""
    finite = [number for number in range(len(choice.points)) if math.isfinite(_mean(choice.scores(number)))]
    finite.sort(key=lambda number: -_mean(choice.scores(number)))
    rows_shown = dict.fromkeys([*finite[:SHOWN], *(n for n in finite if n in (0, choice.chosen))])
    labeled = choice.criterion != "agreement"
    rows = []
    for number in rows_shown:
        point, scores = choice.points[number], choice.scores(number)
        lost = choice.scores(0)[CLEAN] - scores[CLEAN]
        note = "chosen" if number == choice.chosen else "unchanged" if number == 0 else ""
        if lost > max_clean_loss + 1e-9:
            note = f"loses {lost:.2f} on clean"
        cells = [*scores.values(), _mean(scores), *([_mean(point.agreement)] if labeled else [])]
        rows.append([point.label, f"{point.strength:g}", *(fixed(value, 1) for value in cells), note])
    headers = ["recipe", "strength", *choice.conditions, "mean", *(["agreement"] if labeled else []), ""]
    align = ["left", "right", *["right"] * (len(headers) - 3), "left"]
    lines = [
        f"{len(choice.points)} points on {choice.images} held-out images in {choice.seconds:.1f} s, by {choice.criterion} (%), "
        f"losing at most {max_clean_loss:g} points on clean images:",
        "",
        tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=align),
    ]
    if overflowed := [_named(point) for number, point in enumerate(choice.points) if number not in finite]:
        lines += ["", f"Overflow (not finite, never chosen): {'; '.join(overflowed)}."]
    if choice.chosen == 0:
        lines += ["", "Nothing in the grid is better than the unchanged backbone, so that is what is written."]
    return "\n".join(lines)


def to_json(swept: Swept, directory: str, solving: float, max_clean_loss: float) -> dict[str, Any]:
    """Returns the content of `sweep.json`; numbers that are not finite become null."""
    choice = swept.choice
    points = []
    for number, point in enumerate(choice.points):
        recipe = dataclasses.asdict(swept.grid.recipes[point.candidate]) if number else {}
        overflow = not math.isfinite(_mean(choice.scores(number)))
        points.append({**recipe, **dataclasses.asdict(point), "overflow": overflow})
    content = {
        "run": os.path.abspath(directory),
        "criterion": choice.criterion,
        "max_clean_loss": max_clean_loss,
        "images": choice.images,
        "seconds": {"solving": solving, "scoring": choice.seconds},
        "chosen": choice.chosen,
        "points": points,
        "dropped": swept.grid.dropped,
        "front": choice.front(),
        "metrics": swept.metrics,
        "certificate": swept.certificate.to_json(),
        "environment": environment(),
    }
    return report.plain(content, "sweep")


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _named(point: Point) -> str:
    return f"{point.label} at {point.strength:g}"
