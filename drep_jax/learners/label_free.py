"""Learners without labels.

| learner | noise at a site | solution | cost |
|---|---|---|---|
| `algorithm1` | isotropic, of the schedule's t | gradient descent (Algorithm 1) | thousands of steps |
| `closed_form` | the same | exact minimum (`core.closed_form`) | one pass for moments |
| `wiener` | isotropic, a fraction of the site's feature power | Wiener filter | one pass for moments |
| `measured` | measured on corrupted images | least squares (`core.measured`) | hundreds of images |
| `measured`, `noise=unpaired:…` | from second moments (`core.unpaired`) | Wiener filter | two passes |

The last two select the strength of fusion, and the noise power or the fraction of clean images, on
held-out images (`drep_jax.evaluation.selection`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from drep_jax.core import closed_form
from drep_jax.core.measured import Progress, measuring
from drep_jax.core.sites import Site
from drep_jax.evaluation.selection import Candidate, choose
from drep_jax.learners.base import (
    Learned,
    LearnerInputs,
    against_optimum,
    direct_maps,
    keep,
    leading_counts,
    noise_predictors,
    selection_of,
    train,
    with_leading,
)
from drep_jax.learners.losses import denoising_objective
from drep_jax.learners.noise import UNPAIRED, unpaired_candidates
from drep_jax.learners.streams import CorruptedImages
from drep_jax.parallel import processes
from drep_jax.progress import bar, pulsing
from drep_jax.run.moments import moment_images
from drep_jax.typing import Config, Tree

# ---------------------------------------------------------------------------------------------------------------------
# The paper's assumption
# ---------------------------------------------------------------------------------------------------------------------


def learn_algorithm1(inputs: LearnerInputs) -> Learned:
    """Trains the denoisers by Algorithm 1 (Eq. 11)."""
    setup, options = inputs.setup, inputs.config["denoise"]
    least = sum(closed_form.expected_losses(inputs.moments, setup.sites, setup.schedule).values())

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return denoising_objective(setup, options, params, others, batch, key)

    def gap(params: Tree) -> dict[str, float]:
        now = closed_form.expected_losses(inputs.moments, setup.sites, setup.schedule, params["denoise"])
        return {"gap": sum(now.values()) - least}

    state, section = train(inputs, "algorithm1", loss_fn, gap)
    denoise = state.averaged["denoise"]
    return Learned(noise_predictors(inputs.config, denoise), {**section, **against_optimum(inputs, denoise)})


def learn_closed_form(inputs: LearnerInputs) -> Learned:
    """Solves for Algorithm 1's minimum."""
    moments, sites = inputs.moments, inputs.setup.sites
    began = time.perf_counter()
    with pulsing("solving", 1, "minimum", shown=inputs.config["progress"]):
        solved = closed_form.closed_form(moments, sites, inputs.setup.schedule)
    seconds = inputs.moment_seconds + time.perf_counter() - began
    section = {
        "steps": 0,
        "seconds": seconds,
        "loss": [],
        "images": moment_images(inputs.run),
        **against_optimum(inputs, solved),
    }
    learned = Learned(noise_predictors(inputs.config, solved), section)
    keep("closed_form", inputs, learned)
    return learned


# ---------------------------------------------------------------------------------------------------------------------
# Noise as large as the features, or as measured
# ---------------------------------------------------------------------------------------------------------------------


def learn_wiener(inputs: LearnerInputs) -> Learned:
    """Solves the Wiener filter of each noise power and selects one on held-out images."""
    ratios, moments, sites = inputs.config["wiener"]["ratios"], inputs.moments, inputs.setup.sites
    began = time.perf_counter()
    candidates = [
        Candidate(f"noise power {ratio:g}", closed_form.wiener_maps(moments, sites, ratio))
        for ratio in bar(ratios, "solving", len(ratios), "noise power", shown=inputs.config["progress"])
    ]
    solving = inputs.moment_seconds + time.perf_counter() - began
    return at_chosen_strength("wiener", inputs, candidates, solving, moment_images(inputs.run), {})


def learn_measured(inputs: LearnerInputs) -> Learned:
    """Solves for the measured noise at each site and selects the strength on held-out images."""
    config, setup, options = inputs.config, inputs.setup, inputs.config["measured"]
    if config["noise"].startswith(UNPAIRED):
        return at_chosen_strength("measured", inputs, *unpaired_candidates(inputs))
    began = time.perf_counter()
    images = CorruptedImages(config, setup)
    solve = measuring(
        setup.backbone,
        inputs.variables,
        setup.sites,
        images,
        ridge=options["ridge"] or None,
        memory_gib=_memory_left(options, images, setup.sites),
        outputs=False,
        say=_say,
        **{name: options[name] for name in ("vectors", "shortcut", "chunk")},
    )
    candidates, details = [], {}
    for clean_fraction in options["clean_share"]:
        label = f"clean share {clean_fraction:g}"
        weights = [clean_fraction, *[(1.0 - clean_fraction) / images.corrupted] * images.corrupted]
        total = sum(site.stack or 1 for site in setup.sites)
        with pulsing(f"measuring, {label}", total, "site", shown=config["progress"]) as sites:

            def watch(progress: Progress, sites: Any = sites) -> None:
                held_out = "" if progress.held_out is None else f" (held out {progress.held_out:.3f})"
                text = f"{progress.name}: error {progress.before:.3f} → {progress.after:.3f}{held_out}"
                sites.update(text=text)

            measured = solve(weights, watch)
        candidates.append(Candidate(label, measured.denoise))
        details[label] = {
            "per_site": {name: list(pair) for name, pair in measured.errors.items()},
            "held_out": dict(measured.held_out),
            "left_alone": list(measured.left_alone),
        }
        if measured.left_alone:
            names = ", ".join(measured.left_alone[:6]) + (", …" if len(measured.left_alone) > 6 else "")
            _say(
                f"{label}: {len(measured.left_alone)} of {len(measured.errors)} sites are left as they are, because no change "
                f"holds on images it was not fitted to ({names})."
            )
    return at_chosen_strength("measured", inputs, candidates, time.perf_counter() - began, images.shape[1], details)


def _memory_left(options: Config, images: CorruptedImages, sites: Sequence[Site]) -> float:
    """Returns the GiB of `measured.memory_gib` that images in memory and denoisers of other clean shares leave."""
    denoisers = 4 * sum(math.prod(site.denoiser_shape) for site in sites)
    waiting = (len(options["clean_share"]) - 1) * denoisers + (images.bytes if images.resident else 0)
    return max(0.0, options["memory_gib"] - waiting / 2**30)


def _say(text: str) -> None:
    if processes.primary():
        print(text, flush=True)


def _of_sites(entry: Any, sites: set[str]) -> Any:
    """Returns the part of {site: …} or [site, …] that belongs to some sites; site[copy] belongs to site."""
    if isinstance(entry, Mapping):
        return {name: value for name, value in entry.items() if name.partition("[")[0] in sites}
    return [name for name in entry if name.partition("[")[0] in sites]


def at_chosen_strength(
    name: str,
    inputs: LearnerInputs,
    candidates: Sequence[Candidate],
    seconds: float,
    images: int,
    details: Mapping[str, Mapping[str, Any]],
    **facts: Any,
) -> Learned:
    """Returns the candidate, leading sites and strength that do best on held-out images; saves them.

    Args:
      name: of the learner.
      inputs: of the learner.
      candidates: maps given directly, of all sites.
      seconds, images: what learning them took.
      details: label of a candidate ↦ entries of the report's section by site: {site: …} or [site, …].
      **facts: further entries of the report's section.
    """
    sites = inputs.setup.sites
    counts = leading_counts(len(sites), inputs.config["select"]["leading"])
    grid = [(candidate, count) for candidate in candidates for count in counts]
    shortened = [with_leading(candidate, sites, count) for candidate, count in grid]
    choice = choose(inputs.setup, inputs.variables, shortened, selection_of(inputs.config))
    point = choice.points[choice.chosen]
    candidate, count = grid[point.candidate]
    fused = {site.name for site in sites[:count]} if choice.chosen else set()
    fitted = {name: _of_sites(entry, fused) for name, entry in details.get(candidate.label, {}).items()}
    denoisers = direct_maps(shortened[point.candidate].denoise).scaled(point.strength)
    section = {
        "steps": 0,
        "seconds": seconds,
        "loss": [],
        "images": images,
        "per_site": {},
        **fitted,
        "optimum": None,
        "chosen": {
            "label": point.label,
            "strength": point.strength,
            "sites": len(fused),
            "criterion": choice.criterion,
        },
        "selection_images": choice.images,
        "selection_seconds": choice.seconds,
        **facts,
    }
    learned = Learned(denoisers, section, choice)
    keep(name, inputs, learned)
    return learned
