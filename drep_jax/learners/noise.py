"""The noise that `config.noise` names: which kind it is, its pairs and images, and solutions without pairs."""

import time
from collections.abc import Mapping
from typing import Any

from drep_jax.core.unpaired import unpaired_maps
from drep_jax.data.corruptions import check_spec, parse_spec
from drep_jax.data.pairs import NoisySource, PairedSource, open_noisy, open_pairs
from drep_jax.errors import ConfigError
from drep_jax.evaluation.selection import Candidate
from drep_jax.learners.base import LearnerInputs
from drep_jax.progress import bar
from drep_jax.run.moments import moment_images, noisy_moments
from drep_jax.run.setup import Setup
from drep_jax.typing import Config

PAIRS, UNPAIRED = "pairs:", "unpaired:"


def noise_sources(config: Config) -> dict[str, Any]:
    """Opens what `config.noise` reads, for the report's `data`: name of the part ↦ source.

    Raises:
      ConfigError, DataError: for a place or an option that cannot be used.
    """
    noise = config["noise"]
    if noise.startswith(PAIRS):
        return {"pairs": pairs_of(config)}
    if noise.startswith(UNPAIRED):
        return {"noisy images": noisy_images_of(config)}
    files = check_spec(noise)
    return {f"noise {number + 1}" if len(files) > 1 else "noise": source for number, source in enumerate(files)}


def check_noise(config: Config, setup: Setup) -> None:
    """Refuses noise that cannot be learned from.

    Raises:
      ConfigError, DataError: naming the setting, or the files.
    """
    noise = config["noise"]
    measured = "measured" in (config["learner"], *config["compare"])
    if noise.startswith((PAIRS, UNPAIRED)):
        if setup.side:
            columns = ", ".join(name for name, _ in setup.side)
            raise ConfigError(
                f"The backbone is given side information ({columns}), which is not known of the images in "
                f"{noise}, so noise cannot be measured on them. Name a corruption in config.noise."
            )
    elif all(part.high == 0 for part in parse_spec(noise)):
        raise ConfigError(f'noise="{noise}" changes no image, so there is nothing to measure.')
    if measured:
        noise_sources(config)


def pairs_of(config: Config) -> PairedSource:
    """Opens the pairs of images that `config.noise` names."""
    data = config["data"]
    return open_pairs(config["noise"].removeprefix(PAIRS), tuple(data["image_size"]), data["resize"])


def noisy_images_of(config: Config) -> NoisySource:
    """Opens the noisy images without clean ones that `config.noise` names."""
    data = config["data"]
    return open_noisy(config["noise"].removeprefix(UNPAIRED), tuple(data["image_size"]), data["resize"])


def unpaired_candidates(inputs: LearnerInputs) -> tuple[list[Candidate], float, int, Mapping[str, Any]]:
    """Solves every site from the moments of clean and of noisy images.

    Returns:
      A candidate for each of `measured.clean_share`; seconds; the number of noisy images; and
      {label of a candidate: {"per_site": {site: expected errors before and after}}}.
    """
    config, source = inputs.config, noisy_images_of(inputs.config)
    clean = inputs.moments
    began = time.perf_counter()
    noisy: Any = noisy_moments(inputs.run, inputs.variables, source)
    candidates, details = [], {}
    fractions = config["measured"]["clean_share"]
    for fraction in bar(fractions, "solving", len(fractions), "clean share", shown=config["progress"]):
        result = unpaired_maps(clean, noisy, inputs.setup.sites, fraction)
        candidates.append(Candidate(f"clean share {fraction:g}", result.denoise))
        details[candidates[-1].label] = {"per_site": {name: list(pair) for name, pair in result.errors.items()}}
    seconds = inputs.moment_seconds + time.perf_counter() - began
    used = min(config["denoise"]["moment_images"] or len(source), len(source))
    return candidates, seconds, min(used, moment_images(inputs.run)), details
