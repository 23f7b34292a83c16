"""DATASET:BACKBONE[:MODE], by which one configuration file stands for every cell of a table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from drep_jax.errors import ConfigError, lookup

MODES: dict[str, dict[str, Any]] = {
    "measured": {"learner": "measured", "compare": ("algorithm1", "closed_form")},
    "label_free": {"learner": "algorithm1", "compare": ("closed_form",)},
    "label_augmented": {"learner": "label_augmented", "compare": ("algorithm1",)},
    "alternating": {"learner": "alternating", "compare": ("label_augmented",)},
    "control": {"learner": "continued", "compare": ()},
}
"""Ways of training ↦ the settings that they are."""

LABELED = ("label_augmented", "alternating", "control")
"""Those with labels, which get a control arm."""


class Choice(NamedTuple):
    """What was chosen: names, and what the tables have under them."""

    dataset_name: str
    dataset: Any
    backbone_name: str
    backbone: Any
    mode_name: str
    mode: dict[str, Any]


def parse_choice(
    text: str,
    file: str,
    datasets: Mapping[str, Any],
    backbones: Mapping[str, Any],
    modes: Mapping[str, dict[str, Any]],
    default: str = "label_free",
) -> Choice:
    """Returns what follows the colon of `--config=FILE:DATASET:BACKBONE[:MODE]`.

    >>> parse_choice("a:b", "configs/x.py", {"a": 1}, {"b": 2}, MODES).mode_name
    'label_free'

    Args:
      text: DATASET:BACKBONE or DATASET:BACKBONE:MODE.
      file: the configuration file, for messages.
      datasets, backbones, modes: the tables.
      default: mode where none is given.

    Raises:
      ConfigError: for a missing backbone, and for unknown names.
    """
    name, _, rest = text.partition(":")
    backbone, _, mode = rest.partition(":")
    dataset = lookup(datasets, name, "data set of this configuration")
    if not backbone:
        raise ConfigError(f"{file} takes DATASET:BACKBONE[:MODE]; got {text!r}, without a backbone.")
    chosen = lookup(backbones, backbone, "backbone of this configuration")
    mode = mode or default
    return Choice(name, dataset, backbone, chosen, mode, lookup(modes, mode, "way of training"))
