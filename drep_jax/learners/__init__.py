"""Learners of denoisers, as rows of one table: `LearnerInputs` ↦ `Learned`."""

from drep_jax.core.denoisers import Denoisers
from drep_jax.errors import lookup
from drep_jax.learners.base import Learned, Learner, LearnerInputs, direct_maps, noise_predictors
from drep_jax.learners.distilled import BACKBONE, DENOISERS, learn_distilled, learn_distilled_backbone
from drep_jax.learners.label_free import (
    learn_algorithm1,
    learn_closed_form,
    learn_measured,
    learn_wiener,
)
from drep_jax.learners.labeled import (
    learn_alternating,
    learn_continued,
    learn_final_only,
    learn_label_augmented,
    train_labeled,
)
from drep_jax.typing import Config, Tree

__all__ = [
    "LEARNERS",
    "Learned",
    "Learner",
    "LearnerInputs",
    "denoisers_of",
    "learn",
    "train_labeled",
]

LEARNERS: dict[str, Learner] = {
    "algorithm1": Learner(learn_algorithm1),
    "closed_form": Learner(learn_closed_form),
    "wiener": Learner(learn_wiener, chooses=True, direct=True),
    "measured": Learner(learn_measured, chooses=True, direct=True),
    "label_augmented": Learner(learn_label_augmented, labeled=True),
    "alternating": Learner(learn_alternating, labeled=True),
    "continued": Learner(learn_continued, labeled=True, direct=True, stage="control"),
    "distilled": Learner(learn_distilled, chooses=True, direct=True, stage=DENOISERS, distills=True),
    "distilled_backbone": Learner(learn_distilled_backbone, direct=True, stage=BACKBONE, distills=True),
    "final_only": Learner(learn_final_only, explicit=True),
}
"""Name in `config.learner` and `config.compare` ↦ learner."""


def denoisers_of(name: str, config: Config, tree: Tree) -> Denoisers:
    """Returns a learner's saved `denoise` subtree with the rule and the number of steps by which it is fused."""
    return direct_maps(tree) if LEARNERS[name].direct else noise_predictors(config, tree)


def learn(name: str, inputs: LearnerInputs) -> Learned:
    """Runs a learner and saves the result in `checkpoints/<name>`, from which a later call resumes.

    Args:
      name: of the learner.
      inputs: the run, its backbone and moments.

    Raises:
      ConfigError: for an unknown learner.
    """
    return lookup(LEARNERS, name, "learner").learn(inputs)
