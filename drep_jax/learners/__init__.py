"""Learners: every way to denoisers has the same arguments and returns a `Learned`. One line here adds another."""

from collections.abc import Callable, Mapping
from typing import Any

from drep_jax.errors import lookup
from drep_jax.learners.base import Learned, Task
from drep_jax.learners.label_free import by_algorithm1, by_closed_form, by_measuring, by_wiener, check_measuring
from drep_jax.learners.labelled import (
    EXPLICIT,
    LABELLED,
    by_continuing,
    by_final_feature,
    by_labels,
    by_turns,
    check_labelled,
    train_labelled,
)

__all__ = [
    "CHOOSING",
    "DIRECT",
    "EXPLICIT",
    "LABELLED",
    "LEARNERS",
    "Learned",
    "Task",
    "check_labelled",
    "check_measuring",
    "learn",
    "rule_and_steps",
    "train_labelled",
]

LEARNERS: dict[str, Callable[[Task], Learned]] = {
    "algorithm1": by_algorithm1,
    "closed_form": by_closed_form,
    "wiener": by_wiener,
    "measured": by_measuring,
    "label_augmented": by_labels,
    "alternating": by_turns,
    "continued": by_continuing,
    "final_only": by_final_feature,
}

CHOOSING = ("wiener", "measured")
"""Learners that choose the strength of fusion on held-out images."""

DIRECT = ("wiener", "measured", "continued")
"""Learners whose denoisers are maps given directly, fused by rule "affine"."""


def rule_and_steps(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns by which rule, and in how many steps, a learner's denoisers are fused."""
    if name in DIRECT:
        return {"rule": "affine", "steps": 1}
    return {"rule": config["denoise"]["rule"], "steps": config["denoise"]["steps"]}


def learn(name: str, task: Task) -> Learned:
    """Learns by the learner of that name and keeps the result in `checkpoints/<name>`, from where a later call takes it.

    Raises:
      ConfigError: for an unknown learner.
    """
    return lookup(LEARNERS, name, "learner")(task)
