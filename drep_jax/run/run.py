"""One run: what belongs together in every job."""

import dataclasses
from typing import Any

from drep_jax.run.setup import Setup
from drep_jax.typing import Config


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration, what it works on, and where.

    Attributes:
      config: complete, as nested mappings.
      setup: images, backbone, sites, schedule, task.
      directory: the run's own.
      writer: of its log (`drep_jax.training.logging.MetricWriter`); None in jobs that train nothing.
    """

    config: Config
    setup: Setup
    directory: str
    writer: Any = None

    @property
    def learners(self) -> tuple[str, ...]:
        """Names of the learners of the run, the exported one last."""
        others = (name for name in self.config["compare"] if name != self.config["learner"])
        return (*dict.fromkeys(others), self.config["learner"])
