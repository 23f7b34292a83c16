"""Distillation, without labels: the backbone's clean answers are learned on corrupted images.

    minimize the mean of Task.distillation_loss(f(corrupted image; W'), f(clean image; W))

with the frozen backbone's weights W and

| learner | W' | trains |
|---|---|---|
| `distilled` | `fuse` of the frozen backbone and its denoisers | the denoisers |
| `distilled_backbone` | the backbone's own weights | the backbone |

Both start from the backbone, or from the solution of learner `measured`. Batch statistics stay as
they are. The strength of `distilled` is selected on held-out images, as that of `measured` is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse_exact, fuse_variables
from drep_jax.data.augment.random_bits import LEFT_CLEAN, uniform, words
from drep_jax.data.corruptions import corrupt
from drep_jax.data.pairs import PairedSource
from drep_jax.errors import ConfigError
from drep_jax.evaluation.selection import Candidate
from drep_jax.learners.base import Learned, LearnerInputs, direct_maps, keep, train
from drep_jax.learners.label_free import at_chosen_strength
from drep_jax.learners.losses import distillation_objective
from drep_jax.learners.noise import PAIRS, pairs_of
from drep_jax.learners.streams import CORRUPTION_SEED
from drep_jax.run.checkpoints import last_saved
from drep_jax.training.state import TEACHER
from drep_jax.typing import Batch, Config, Tree

START = ("", "measured")
"""Values of `distilled.init_from`."""

DENOISERS, BACKBONE = "distillation", "backbone_distillation"
"""The stages of the two learners."""


def learn_distilled(inputs: LearnerInputs) -> Learned:
    """Trains the denoisers through fusion and selects the strength on held-out images."""
    setup, options = inputs.setup, inputs.config["distilled"]
    start = {"denoise": _measured(inputs)} if options["init_from"] else {}

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        del key
        variables = {**others, "params": params["backbone"]}
        fused = fuse_variables(variables, params["denoise"], setup.sites, setup.schedule, rule="affine", steps=1)
        return distillation_objective(setup, options, fused, params["backbone"], others, batch)

    state, section = _train(inputs, DENOISERS, loss_fn, start)
    candidates = [Candidate("distilled", state.averaged["denoise"])]
    facts = {name: section[name] for name in ("steps", "loss")}
    return at_chosen_strength("distilled", inputs, candidates, section["seconds"], section["images"], {}, **facts)


def learn_distilled_backbone(inputs: LearnerInputs) -> Learned:
    """Trains the backbone itself; its denoisers are zero."""
    setup, options = inputs.setup, inputs.config["distilled"]
    start = {}
    if options["init_from"]:
        params = {"backbone": inputs.variables["params"], "denoise": direct_maps(_measured(inputs))}
        start = {"backbone": fuse_exact(params, setup.sites, setup.schedule)}

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        del key
        student = {**others, "params": params["backbone"]}
        return distillation_objective(setup, options, student, params[TEACHER], others, batch)

    state, section = _train(inputs, BACKBONE, loss_fn, start)
    variables = {**state.others, "params": state.params["backbone"]}
    section |= {"per_site": {}, "optimum": None}
    learned = Learned(direct_maps(init_denoise(setup.sites)), section, variables=variables)
    keep("distilled_backbone", inputs, learned)
    return learned


def _train(inputs: LearnerInputs, stage: str, loss_fn: Any, start: dict[str, Tree]) -> Any:
    config, run = inputs.config, inputs.run
    if config["noise"].startswith(PAIRS):
        setup = dataclasses.replace(inputs.setup, train=PairsInOne(pairs_of(config), sizes=inputs.setup.sizes))
        inputs = LearnerInputs(dataclasses.replace(run, setup=setup), inputs.variables)
    return train(inputs, stage, loss_fn, start=start, prepare_batch=with_corrupted(config))


def _measured(inputs: LearnerInputs) -> Tree:
    """Returns the solution of learner `measured` of this run, at its chosen strength."""
    saved = last_saved(inputs.run, "measured")
    if saved is None or saved.denoise is None:
        raise ConfigError(MEASURED_FIRST)
    return saved.denoise


MEASURED_FIRST = (
    'distilled.init_from="measured" starts from the solution of learner "measured", which has to come before it in this run: '
    "--config.compare=\"('measured',)\"."
)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def with_corrupted(config: Config) -> Callable[[Batch, int], Batch]:
    """Returns the function that adds "corrupted" to a batch: its images under `config.noise`.

    A fraction `distilled.clean_share` of the images, drawn by their positions in the stream, stays
    clean. The noise of a position is drawn anew: an image seen twice has two corrupted versions.
    """
    noise, seed = config["noise"], config["seed"] + CORRUPTION_SEED
    clean_share = config["distilled"]["clean_share"]

    def add(batch: Batch, first_position: int) -> Batch:
        images = batch["image"]
        if noise.startswith(PAIRS):
            images, corrupted = np.split(images, 2, axis=-1)
            corrupted = corrupted.astype(np.float32)
        else:
            corrupted = corrupt(images, first_position + np.arange(len(images)), noise, seed, batch.get("size"))
        left_clean = uniform(words(seed, LEFT_CLEAN, first_position, len(images))[:, 0]) < clean_share
        corrupted[left_clean] = images[left_clean]
        return {**batch, "image": images, "corrupted": corrupted}

    return add


class PairsInOne:
    """Pairs as a source of images of six channels, clean and corrupted, which move as one.

    Attributes:
      name, note, num_classes, class_names: see `drep_jax.data.source.Source`.
    """

    def __init__(self, pairs: PairedSource, *, sizes: bool = False) -> None:
        """Takes the pairs; with `sizes` items say the size of padded ones, as the pairs do."""
        self._sizes = sizes
        self.name, self.note, self.num_classes = pairs.name, pairs.note, pairs.num_classes
        self.class_names: tuple[str, ...] | None = None
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pair = self._pairs[index]
        size = {"size": pair["size"]} if self._sizes and "size" in pair else {}
        return {"image": np.concatenate([pair["clean"], pair["corrupted"]], axis=-1), **size}
