"""The `DenoiseRep` module: a backbone and its `denoise` subtree as one Flax module."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Int

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.denoisers import check_params, init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.typing import AnyArray, Tree


class DenoiseRep(nn.Module):
    """A backbone with a denoiser before every selected layer.

    Its parameters are {"backbone": the backbone's own tree, "denoise": the `denoise` subtree}.
    Calling it takes the explicit path (Eq. 5); the method `denoising_losses` returns the losses of
    Algorithm 1. `drep_jax.fuse(params, sites, schedule)` returns weights with which the plain
    backbone computes the same. Other collections of the backbone (batch statistics) keep their
    names; they are read, not updated.

    Attributes:
      backbone: any Linen module.
      sites: from `find_sites`.
      schedule: the noise schedule.
      rule: reverse-step rule, see `drep_jax.core.schedule.reverse_step`.
      steps: reverse steps at each site; None for the number the sites were given.
    """

    backbone: nn.Module
    sites: tuple[Site, ...]
    schedule: Schedule = Schedule()
    rule: str = "ddpm"
    steps: int | None = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the explicit path."""
        backbone, variables, denoise = self._parts(*args, **kwargs)
        return explicit_apply(
            backbone, variables, denoise, self.sites, self.schedule, *args, rule=self.rule, steps=self.steps, **kwargs
        )

    @nn.compact
    def denoising_losses(
        self, key: jax.Array, index: Int[AnyArray, " batch"], *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """Returns `algorithm1_losses` of this module's own parameters.

        Args:
          key: of the step.
          index: global index of each example, (batch,).
          *args, **kwargs: for the backbone; `loss` and `tokens` as in `algorithm1_losses`.
        """
        options = {name: kwargs.pop(name) for name in ("loss", "tokens") if name in kwargs}
        backbone, variables, denoise = self._parts(*args, **kwargs)
        return algorithm1_losses(
            backbone, variables, denoise, self.sites, self.schedule, key, index, *args, **options, **kwargs
        )

    def _parts(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tree, Tree]:
        if self.is_initializing():
            self.backbone(*args, **kwargs)  # as a submodule: its variables are made at its own paths
            denoise = self.param("denoise", lambda _: init_denoise(self.sites))
        else:
            denoise = self.get_variable("params", "denoise")
        variables = self.backbone.variables
        subtrees = {"backbone": variables.get("params"), "denoise": denoise}
        check_params({name: tree for name, tree in subtrees.items() if tree is not None}, self.sites)
        return self.backbone.clone(parent=None), variables, denoise
