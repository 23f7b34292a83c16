"""One run: its configuration, setup, directory and log."""

import dataclasses
from typing import Any

from drep_jax.run.setup import Setup
from drep_jax.typing import Config


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a configuration.

    Attributes:
      config: the complete configuration, as nested mappings.
      setup: images, backbone, sites, schedule, task.
      directory: of the run.
      writer: of its log (`drep_jax.training.logging.MetricWriter`); None in jobs without training.
    """

    config: Config
    setup: Setup
    directory: str
    writer: Any = None

    @property
    def learners(self) -> tuple[str, ...]:
        """Names of the run's learners, the exported one last."""
        others = (name for name in self.config["compare"] if name != self.config["learner"])
        return (*dict.fromkeys(others), self.config["learner"])
