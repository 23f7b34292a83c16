"""What l-DAE learns: noise in the latents of patches, and the prediction of what they were (the paper's Eq. 4).

    z_t = γ_t z + σ_t ε,   ε ~ N(0, I);   loss = λ_t Σ_i w_i r_i²,   λ_t = γ_t² / (γ_t² + σ_t²)

r is the difference of target and prediction along all PCA directions, in units of their scales; w
is 1 for the d latents and `residual_weight` for the other directions. Its rows of Table 3 are other
values of these options. Predicted noise has λ = 1.

| schedule | γ² | σ |
|---|---|---|
| `linear` (l-DAE) | 1 | linear from 0 to `max_sigma` |
| `single` | 1 | √(1/3) |
| `variance` | linear from 1 to 0 | √(1 − γ²) |
| `ddpm` | Π(1 − β), β linear from 1e-4 to 0.02 | √(1 − γ²) |
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.models.patch_pca import PatchPCA

SCHEDULES = ("linear", "single", "variance", "ddpm")
CHOICES = {
    "schedule": SCHEDULES,
    "predict": ("clean", "noise"),
    "inputs": ("image", "latent"),
    "outputs": ("image", "projection", "latent"),
    "noise": ("latent", "pixels", "mask", "none"),
}
"""The options that are words, and their values."""
SINGLE = math.sqrt(1 / 3)
"""σ of the single level."""


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The task of a denoising autoencoder.

    Attributes:
      pca: basis and scales of the latents; of pixels for a classical denoising autoencoder.
      schedule: a name of `SCHEDULES`.
      max_sigma: largest σ of schedule linear, √2 in the paper.
      timesteps: number of levels; t is a whole number from 0 on.
      predict: "clean" patches or the "noise".
      inputs: the noisy "image", by the inverse PCA, or the "latent".
      outputs: the "image", its "projection" on the latents' directions, or the "latent".
      noise: in the "latent"; in "pixels", for which `pca` is a basis of pixels; "mask" hides whole
        patches in place of noise and counts only these; "none", a plain autoencoder.
      residual_weight: w of the directions beyond the latents.
      mask_ratio: probability that a patch is hidden.
    """

    pca: PatchPCA
    schedule: str = "linear"
    max_sigma: float = math.sqrt(2)
    timesteps: int = 1000
    predict: str = "clean"
    inputs: str = "image"
    outputs: str = "image"
    noise: str = "latent"
    residual_weight: float = 0.1
    mask_ratio: float = 0.6

    def __post_init__(self) -> None:
        """Refuses values that cannot be.

        Raises:
          ConfigError: naming the setting.
        """
        for name, values in CHOICES.items():
            if (value := getattr(self, name)) not in values:
                raise ConfigError(f'pretrain.{name}="{value}" is unknown.{did_you_mean(str(value), values)}')
        if not (math.isfinite(self.max_sigma) and self.max_sigma > 0):
            raise ConfigError(f"pretrain.max_sigma={self.max_sigma} is a standard deviation, above 0.")
        if self.timesteps < 2:
            raise ConfigError(f"pretrain.timesteps={self.timesteps} must be at least 2.")
        if not 0 <= self.residual_weight <= 1:
            raise ConfigError(f"pretrain.residual_weight={self.residual_weight} lies in [0, 1].")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"pretrain.mask_ratio={self.mask_ratio} is a probability above 0 and below 1.")
        if self.predict == "noise" and self.noise in ("mask", "none"):
            raise ConfigError(f'pretrain.predict="noise", but with pretrain.noise="{self.noise}" there is no noise.')

    @property
    def input_width(self) -> int:
        """Numbers of a patch that the network takes."""
        return self.pca.components if self.inputs == "latent" else self.pca.numbers

    @property
    def output_width(self) -> int:
        """Numbers of a patch that the network returns."""
        return self.pca.components if self.outputs == "latent" else self.pca.numbers

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns γ and σ of every t, both (timesteps,)."""
        steps = np.arange(self.timesteps)
        if self.schedule in ("linear", "single"):
            sigma = self.max_sigma * steps / (self.timesteps - 1)
            return np.ones(len(steps)), sigma if self.schedule == "linear" else np.full(len(steps), SINGLE)
        square: np.ndarray
        if self.schedule == "variance":
            square = 1 - (steps + 1) / self.timesteps
        else:
            square = np.cumprod(1 - np.linspace(1e-4, 0.02, self.timesteps))
        return np.sqrt(square), np.sqrt(1 - square)

    def check_time(self, t: int) -> None:
        """Raises ConfigError unless t is a step of the schedule."""
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.timesteps:
            raise ConfigError(
                f"pretrain.t={t} is outside the schedule, whose time steps are 0 to {self.timesteps - 1}."
            )

    def corrupted(
        self, patches: Float[Array, "batch patches numbers"], t: Int[Array, " batch"], keys: Any
    ) -> tuple[Float[Array, "batch patches inputs"], Any]:
        """Returns the network's inputs at time steps t, and the noise or mask in them.

        Args:
          patches: of normalized images.
          t: time step of each image.
          keys: (batch,) of the noise, one for each image.
        """
        latents = self.pca.encode(patches)
        if self.noise == "none":
            return self._input(latents), jnp.zeros_like(latents)
        if self.noise == "mask":
            count = (patches.shape[1], 1)
            hidden = jax.vmap(lambda key: jax.random.bernoulli(key, self.mask_ratio, count))(keys)
            return self._input(jnp.where(hidden, 0.0, latents)), hidden
        gamma, sigma = (jnp.asarray(each, patches.dtype)[t][:, None, None] for each in self.levels())
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], latents.dtype))(keys)
        return self._input(gamma * latents + sigma * noise), noise

    def clean_input(self, patches: Float[Array, "batch patches numbers"], t: int) -> Any:
        """Returns the network's inputs for images without noise, scaled as at time step t."""
        return self._input(self.gain(t) * self.pca.encode(patches))

    def gain(self, t: int) -> float:
        """γ_t; 1 where no noise is added."""
        return float(self.levels()[0][t]) if self.noise in ("latent", "pixels") else 1.0

    def _input(self, latents: Any) -> Any:
        return latents if self.inputs == "latent" else self.pca.decode(latents)

    def loss(
        self,
        prediction: Float[Array, "batch patches outputs"],
        patches: Float[Array, "batch patches numbers"],
        t: Int[Array, " batch"],
        noise: Any,
    ) -> Float[Array, ""]:
        """Returns the mean of λ_t Σ w_i r_i² over patches and images.

        Args:
          prediction: of the network.
          patches: without noise.
          t: time steps.
          noise: of `corrupted`.
        """
        squares = jnp.square(self._difference(prediction, patches, noise))
        if self.outputs == "image":
            weights = np.where(np.arange(self.pca.numbers) < self.pca.components, 1.0, self.residual_weight)
            squares = squares * jnp.asarray(weights, squares.dtype)[None, None]
        by_patch = squares.sum(axis=-1)
        if self.noise == "mask":
            hidden = noise[..., 0].astype(by_patch.dtype)
            return jnp.sum(by_patch * hidden) / jnp.maximum(hidden.sum(), 1.0)
        return jnp.mean(by_patch.mean(axis=-1) * self._weight(t, by_patch.dtype))

    def _difference(self, prediction: Any, patches: Any, noise: Any) -> Any:
        """Returns target − prediction along the latents or, for images, along all directions."""
        latents = noise if self.predict == "noise" else self.pca.encode(patches)
        if self.outputs == "latent":
            return latents - prediction
        if self.outputs == "projection":  # compared along the latents, all that a projection has
            return latents - self.pca.encode(prediction)
        if self.predict == "noise":
            patches = self.pca.decode(latents)
        return self.pca.residual(patches - prediction)

    def _weight(self, t: Any, dtype: Any) -> Any:
        if self.predict == "noise" or self.noise == "none":
            return jnp.ones(t.shape, dtype)
        gamma, sigma = self.levels()
        return jnp.asarray(gamma**2 / (gamma**2 + sigma**2), dtype)[t]

    def restored(self, prediction: Any, noisy: Any, t: Any) -> Any:
        """Returns the patches that a prediction stands for.

        Args:
          prediction: of the network.
          noisy: the network's inputs.
          t: time steps.
        """
        if self.predict == "clean":
            return self.pca.decode(prediction) if self.outputs == "latent" else prediction
        gamma, sigma = (jnp.asarray(each, prediction.dtype)[t][:, None, None] for each in self.levels())
        noise = prediction if self.outputs == "latent" else self.pca.encode(prediction)
        latents = noisy if self.inputs == "latent" else self.pca.encode(noisy)
        return self.pca.decode((latents - sigma * noise) / jnp.maximum(gamma, 1e-3))
