"""The backbone of a run: fresh variables, or weights read from a file."""

import jax
import jax.numpy as jnp

from drep_jax import weights
from drep_jax.errors import ConfigError
from drep_jax.parallel import processes
from drep_jax.run.setup import Setting, init_options
from drep_jax.run.stages import key_of
from drep_jax.typing import Config, Tree

FOREIGN_ONLY = ("init_format", "init_names", "init_state", "init_grid", "init_allow")
"""Settings that say how a foreign file of weights is read."""


def fresh_variables(config: Config, setting: Setting) -> Tree:
    """Returns the backbone's variables as they are initialized from the seed of the run."""
    return dict(jax.jit(setting.backbone.init)(key_of(config, "init"), jnp.zeros(setting.images.shape)))


def read_weights(config: Config, setting: Setting, path: str, *, allow_fused: bool = False) -> Tree:
    """Reads a backbone's variables from a file of this project or a foreign one.

    Args:
      config, setting: of the run.
      path: of the file, or of an Orbax directory.
      allow_fused: whether a file of ours may hold fused weights.
    """
    if weights.is_native(path):
        if useless := [name for name in FOREIGN_ONLY if config["backbone"][name]]:
            raise ConfigError(
                f"{path} is a file of this project, where {', '.join(f'backbone.{name}' for name in useless)} would change "
                "nothing: they are for foreign files."
            )
        variables = weights.load(path, setting.abstract, allow_fused=allow_fused)
        processes.check_same("backbone", {path: weights.digest(variables)})
        return variables
    foreign = weights.load_foreign(
        path, setting.backbone, setting.abstract, fresh=lambda: fresh_variables(config, setting), **init_options(config)
    )
    print("\n".join(f"  {note}" for note in ("Weights read:", *foreign.notes)))
    processes.check_same("backbone", {path: weights.digest(foreign.variables)})
    return foreign.variables
