"""BatchNorms that mix the statistics of the images at hand with the trained ones: a deployment option.

    μ = (1 − α)·μ_trained + α·μ_images        v = (1 − α)·v_trained + α·v_images

The images' mean and variance of a channel are taken over one image ("image:α", which needs no
batch) or over the batch ("batch:α"; Schneider et al. 2020, Nado et al. 2020). The variables stay as
they are, and so do their certificates; the *program* is another one. Where a denoiser's constant
went into a running mean, the mixture is still the explicit network's: both means contain it.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drep_jax.core.interceptor import intercepting
from drep_jax.errors import ConfigError
from drep_jax.typing import Tree

OVER = ("image", "batch")
"""What the images' statistics are taken over."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Which statistics are mixed, and how.

    Attributes:
      over: "image" or "batch".
      alpha: α, the weight of the images' statistics; 0 for the trained ones alone.

    >>> Statistics.parse("image:0.1")
    Statistics(over='image', alpha=0.1)
    """

    over: str
    alpha: float

    @classmethod
    def parse(cls, text: str) -> "Statistics":
        """Reads "image:α" or "batch:α".

        Raises:
          ConfigError: for anything else, or an α outside 0…1.
        """
        match = re.fullmatch(rf"({'|'.join(OVER)}):([0-9.eE+-]+)", text)
        try:
            alpha = float(match[2]) if match else -1.0
        except ValueError:
            alpha = -1.0
        if match is None or not 0.0 <= alpha <= 1.0:
            raise ConfigError(
                f'Statistics "{text}" are neither "image:α" nor "batch:α" with α from 0 (trained) to 1, as in image:0.1.'
            )
        return cls(match[1], alpha)

    def __str__(self) -> str:
        return f"{self.over}:{self.alpha:g}"


@dataclasses.dataclass(frozen=True)
class MixedStatistics:
    """A network whose BatchNorms mix statistics; it is applied like the module itself.

    Attributes:
      module: any unbound Linen module with `nn.BatchNorm`s.
      statistics: what is mixed.
      mask: (batch,), false for images that are padding; None if there are none.
      axis_name: mapped axis over which a batch is divided, or None.
    """

    module: nn.Module
    statistics: Statistics
    mask: Any = None
    axis_name: str | None = None

    def apply(self, variables: Tree, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Applies the module, see `flax.linen.Module.apply`.

        Raises:
          ConfigError: if no BatchNorm has statistics to mix.
        """
        mixed = []
        inside = False  # a BatchNorm that is called here with mixed statistics

        def mix(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            nonlocal inside
            norm: Any = context.module
            if inside or context.method_name != "__call__" or not isinstance(norm, nn.BatchNorm):
                return next_fun(*args, **kwargs)
            inputs = _Inputs(norm, args, kwargs)
            axes = self._axes(norm, inputs.x, images.shape[0])
            if not inputs.running or not axes:
                return next_fun(*args, **kwargs)
            mixed.append(norm.path)
            inside = True
            try:
                return self._normalized(norm, inputs.x, axes)
            finally:
                inside = False

        with intercepting(mix):
            outputs = self.module.apply(variables, images, *args, **kwargs)
        if not mixed:
            raise ConfigError(
                f"{type(self.module).__name__} has no BatchNorm whose statistics {self.statistics} could mix; those over "
                '"image" need feature maps, not vectors.'
            )
        return outputs

    def _axes(self, norm: nn.BatchNorm, x: Any, batch: Any) -> tuple[int, ...]:
        """Returns the axes that are averaged over; () where an image has one position only."""
        features = (norm.axis,) if isinstance(norm.axis, int) else tuple(norm.axis)
        features = tuple(axis % x.ndim for axis in features)
        axes = tuple(axis for axis in range(x.ndim) if axis not in features)
        by_image = self.statistics.over == "image"
        if (by_image or self.mask is not None) and (0 not in axes or x.shape[0] != batch):
            raise ConfigError(
                f"{'/'.join(norm.path)}: the first axis of its input {tuple(x.shape)} is not the batch of {batch} images, so "
                f"statistics {self.statistics} cannot be told apart by image."
            )
        if not by_image:
            return axes
        inside = tuple(axis for axis in axes if axis != 0)
        return inside if any(x.shape[axis] != 1 for axis in inside) else ()

    def _normalized(self, norm: Any, x: Any, axes: tuple[int, ...]) -> Any:
        """Returns what the BatchNorm makes of x with mixed statistics."""
        own = norm.variables
        trained = own["batch_stats"]
        plain = norm.clone(parent=None, name=None, use_running_average=None, axis_name=None)
        mean, var = self._moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes)

        def run(x: Any, mean: Any, var: Any) -> Any:
            alpha = self.statistics.alpha
            moments = {
                name: (1.0 - alpha) * trained[name] + alpha * value.astype(trained[name].dtype)
                for name, value in (("mean", mean), ("var", var))
            }
            variables = {**own, "batch_stats": {**trained, **moments}}
            return plain.apply(variables, x, use_running_average=True)

        if self.statistics.over == "batch":
            return run(x, mean, var)
        return jax.vmap(lambda x, mean, var: run(x[None], mean, var)[0])(x, mean, var)

    def _moments(self, x: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
        """Returns mean and variance over the axes; in a divided batch, over all of its parts."""
        if self.statistics.over == "image" or (self.mask is None and self.axis_name is None):
            return x.mean(axes), x.var(axes)
        mask = jnp.ones(x.shape[0], bool) if self.mask is None else self.mask
        mask = mask.reshape((-1,) + (1,) * (x.ndim - 1))
        count = jnp.sum(jnp.broadcast_to(mask, x.shape).astype(x.dtype), axes)
        total = self._total(count)
        mean = self._total(jnp.sum(jnp.where(mask, x, 0), axes)) / jnp.maximum(total, 1)
        centered = x - jnp.expand_dims(mean, axes)
        return mean, self._total(jnp.sum(jnp.where(mask, centered**2, 0), axes)) / jnp.maximum(total, 1)

    def _total(self, value: Any) -> Any:
        return value if self.axis_name is None else jax.lax.psum(value, self.axis_name)


class _Inputs:
    """The arguments of a call of a BatchNorm."""

    def __init__(self, norm: nn.BatchNorm, args: Any, kwargs: Any) -> None:
        self.x = args[0] if args else kwargs["x"]
        called = args[1] if len(args) > 1 else kwargs.get("use_running_average")
        self.running = bool(norm.use_running_average if called is None else called)
