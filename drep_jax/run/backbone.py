"""The backbone of a run: fresh variables, or weights read from a file."""

from typing import Any

import jax
import jax.numpy as jnp

from drep_jax import weights
from drep_jax.errors import ConfigError
from drep_jax.files import expanded
from drep_jax.parallel import processes
from drep_jax.run.run import Run
from drep_jax.run.stages import key_of
from drep_jax.typing import Config, Tree

FOREIGN_ONLY = ("init_format", "init_names", "init_state", "init_grid", "init_channels", "init_allow")
"""Settings that say how a foreign file of weights is read."""


def fresh_variables(run: Run) -> Tree:
    """Returns the backbone's variables initialized from the run's seed."""
    return dict(jax.jit(run.setup.backbone.init)(key_of(run.config, "init"), jnp.zeros(run.setup.images.shape)))


def read_weights(run: Run, path: str, *, allow_fused: bool = False) -> Tree:
    """Reads the backbone's variables from a file of this project or a foreign one.

    Args:
      run: the run of the backbone.
      path: of the file, or of an Orbax directory.
      allow_fused: whether a file of this project may hold fused weights.

    Raises:
      ConfigError: for settings that do not apply to the file.
      CheckpointError: if the file does not fit the backbone.
    """
    path = expanded(path)
    if weights.is_native(path):
        if useless := [name for name in FOREIGN_ONLY if run.config["backbone"][name]]:
            raise ConfigError(
                f"{path} is a file of this project, where {', '.join(f'backbone.{name}' for name in useless)} would change "
                "nothing: they are for foreign files."
            )
        variables = weights.load(path, run.setup.abstract, allow_fused=allow_fused)
        processes.check_same("backbone", {path: weights.digest(variables)})
        return variables
    foreign = weights.load_foreign(
        path, run.setup.backbone, run.setup.abstract, fresh=lambda: fresh_variables(run), **init_options(run.config)
    )
    print("\n".join(f"  {note}" for note in ("Weights read:", *foreign.notes)))
    processes.check_same("backbone", {path: weights.digest(foreign.variables)})
    return foreign.variables


def init_options(config: Config) -> dict[str, Any]:
    """Returns the options of `drep_jax.weights.load_foreign` from a configuration."""
    backbone = config["backbone"]
    return {
        "format_name": backbone["init_format"],
        "names": expanded(backbone["init_names"]),
        "state": backbone["init_state"] or None,
        "allow": tuple(backbone["init_allow"]),
        "grid": tuple(backbone["init_grid"]) or None,
        "input_channels": backbone["init_channels"],
    }
