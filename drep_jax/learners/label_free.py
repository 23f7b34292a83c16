"""Learners without labels.

| learner | noise at a site | solution | cost |
|---|---|---|---|
| `algorithm1` | isotropic, of the schedule's t | gradient descent (Algorithm 1) | thousands of steps |
| `closed_form` | the same | exact minimum (`core.closed_form`) | one pass for moments |
| `wiener` | isotropic, a fraction of the site's feature power | Wiener filter | one pass for moments |
| `measured` | measured on corrupted images | least squares (`core.measured`) | hundreds of images |

The last two select the strength of fusion, and the noise power or the fraction of clean images, on
held-out images (`drep_jax.evaluation.selection`).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from drep_jax.core import closed_form
from drep_jax.core.measured import measuring
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.data.pairs import PairedSource, open_pairs
from drep_jax.errors import DataError
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
from drep_jax.progress import pulsing
from drep_jax.run.moments import moment_images
from drep_jax.run.setup import Setup
from drep_jax.typing import Config, Tree

PAIRS = "pairs:"
CORRUPTION_SEED = 1
"""Added to the run's seed for training noise, so that it differs from the test noise."""


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
    began = time.perf_counter()
    solved = closed_form.closed_form(inputs.moments, inputs.setup.sites, inputs.setup.schedule)
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
    options = inputs.config["wiener"]
    began = time.perf_counter()
    candidates = [
        Candidate(f"noise power {ratio:g}", closed_form.wiener_maps(inputs.moments, inputs.setup.sites, ratio))
        for ratio in options["ratios"]
    ]
    solving = inputs.moment_seconds + time.perf_counter() - began
    return at_chosen_strength("wiener", inputs, candidates, solving, moment_images(inputs.run), {})


def learn_measured(inputs: LearnerInputs) -> Learned:
    """Solves for the measured noise at each site and selects the strength on held-out images."""
    config, setup, options = inputs.config, inputs.setup, inputs.config["measured"]
    batch, corrupted = measuring_images(config, setup)
    clean = batch["image"]
    streams: Any = np.stack([setup.inputs({**batch, "image": x}) for x in (clean, clean, *corrupted)])
    candidates, errors = [], {}
    began = time.perf_counter()
    fitting = {name: options[name] for name in ("ridge", "vectors", "shortcut", "chunk")}
    solve = measuring(setup.backbone, inputs.variables, setup.sites, streams, **fitting)
    fractions, name = options["clean_share"], f"measuring {len(setup.sites)} sites on {len(clean)} images"
    with pulsing(name, len(fractions), "mixture", shown=config["progress"]) as steps:
        for clean_fraction in fractions:
            measured = solve([clean_fraction, *[(1.0 - clean_fraction) / len(corrupted)] * len(corrupted)])
            candidates.append(Candidate(f"clean share {clean_fraction:g}", measured.denoise))
            errors[candidates[-1].label] = {name: list(pair) for name, pair in measured.errors.items()}
            before, after = (sum(pair[i] for pair in measured.errors.values()) / len(measured.errors) for i in (0, 1))
            steps.set_postfix_str(
                f"clean share {clean_fraction:g}: mean error {before:.3f} → {after:.3f}", refresh=False
            )
            steps.update()
    return at_chosen_strength("measured", inputs, candidates, time.perf_counter() - began, len(clean), errors)


def at_chosen_strength(
    name: str,
    inputs: LearnerInputs,
    candidates: Sequence[Candidate],
    seconds: float,
    images: int,
    errors: Mapping[str, Any],
    **facts: Any,
) -> Learned:
    """Returns the candidate, leading sites and strength that do best on held-out images; saves them.

    Args:
      name: of the learner.
      inputs: of the learner.
      candidates: maps given directly, of all sites.
      seconds, images: what learning them took.
      errors: label of a candidate ↦ the report's `per_site`.
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
    fitted = errors.get(candidate.label, {})
    denoisers = direct_maps(shortened[point.candidate].denoise).scaled(point.strength)
    section = {
        "steps": 0,
        "seconds": seconds,
        "loss": [],
        "images": images,
        "per_site": {site: pair for site, pair in fitted.items() if site.partition("[")[0] in fused},
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


def measuring_images(config: Config, setup: Setup) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Returns a batch of training images and `measured.draws` corrupted versions, (n, h, w, c).

    Raises:
      DataError: if there are none.
    """
    options, noise = config["measured"], config["noise"]
    if noise.startswith(PAIRS):
        pairs = pairs_of(config)
        count = min(options["images"] or len(pairs), len(pairs))
        chosen = [pairs[i] for i in range(count)]
        clean = {"image": np.stack([pair["clean"] for pair in chosen])}
        return clean, [np.stack([pair["corrupted"] for pair in chosen]).astype(np.float32)]
    count = min(options["images"] or len(setup.train), len(setup.train))
    if not count:
        raise DataError(f"{setup.train.name} has no training images to measure the noise on.")
    index = np.sort(epoch_order(len(setup.train), config["seed"], 0)[:count])
    clean = read(setup.train, index)
    seeds = [config["seed"] + CORRUPTION_SEED + draw * 7919 for draw in range(options["draws"])]
    return clean, [corrupt(clean["image"], index, noise, seed) for seed in seeds]


def pairs_of(config: Config) -> PairedSource:
    """Opens the pairs of images that `config.noise` names."""
    data = config["data"]
    return open_pairs(config["noise"].removeprefix(PAIRS), tuple(data["image_size"]), data["resize"])
