"""The patch-wise PCA that l-DAE's latent space is: z = V (x − μ) / s for each patch x.

V has the first d eigenvectors of the patches' covariance as rows, Eq. 3 of the paper. Scales s are
the standard deviations that noise is measured in: one for all latents, one for each (whitening) or
none. `decode(encode(x))` is the orthogonal projection of x on the span of V, whatever the scales.
"""

import dataclasses
import hashlib
import os
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Float

from drep_jax.errors import CheckpointError, ConfigError, DataError
from drep_jax.files import whole
from drep_jax.typing import AnyArray

SCALES = ("global", "whiten", "none")
"""One standard deviation for all latents, the root of their mean variance; one for each; or 1."""

CONSTANT = 1e-10
"""Variance, relative to the largest, below which a direction is constant."""
_FIELDS = ("mean", "basis", "variance", "deviation")


@dataclasses.dataclass(frozen=True)
class PatchPCA:
    """Basis, mean and scale of the patches of normalized images; a patch is (rows, columns, channels) in one vector.

    Attributes:
      mean: μ, (D,); zeros if patches are not centered.
      basis: all D directions as rows, orthonormal, by falling variance.
      variance: of the patches along them, (D,).
      deviation: s of each direction, (D,); those beyond d have the last latent's.
      components: d, the number of latents.
      patch: (height, width) in pixels.
      count: number of patches that it was computed from.
    """

    mean: Float[np.ndarray, " numbers"]
    basis: Float[np.ndarray, "numbers numbers"]
    variance: Float[np.ndarray, " numbers"]
    deviation: Float[np.ndarray, " numbers"]
    components: int
    patch: tuple[int, int]
    count: int = 0

    @property
    def numbers(self) -> int:
        """D, the numbers in a patch."""
        return len(self.mean)

    @property
    def channels(self) -> int:
        """Color channels of a patch."""
        return self.numbers // (self.patch[0] * self.patch[1])

    @property
    def directions(self) -> Float[np.ndarray, "components numbers"]:
        """V, the first d directions."""
        return self.basis[: self.components]

    @property
    def scale(self) -> Float[np.ndarray, " components"]:
        """s of the latents."""
        return self.deviation[: self.components]

    @property
    def kept(self) -> float:
        """The fraction of the variance that the latents hold."""
        return float(self.variance[: self.components].sum() / self.variance.sum())

    def encode(self, patches: Float[AnyArray, "*lead numbers"]) -> Any:
        """Returns the latents z = V (x − μ) / s."""
        latents = (patches - _row(self.mean, patches)) @ _matrix(self.directions.T, patches)
        return latents / _row(self.scale, patches)

    def decode(self, latents: Float[AnyArray, "*lead components"]) -> Any:
        """Returns the patches Vᵀ (s z) + μ."""
        patches = (latents * _row(self.scale, latents)) @ _matrix(self.directions, latents)
        return patches + _row(self.mean, latents)

    def residual(self, difference: Float[AnyArray, "*lead numbers"]) -> Any:
        """Returns a difference of patches along all D directions, in units of their scales."""
        return (difference @ _matrix(self.basis.T, difference)) / _row(self.deviation, difference)

    def digest(self) -> str:
        """Returns an identifier of these numbers."""
        parts = [np.ascontiguousarray(getattr(self, name), np.float64).tobytes() for name in _FIELDS]
        text = f"{self.components} {self.patch}".encode()
        return hashlib.sha256(b"".join([text, *parts])).hexdigest()[:16]


def _matrix(value: np.ndarray, like: Any) -> np.ndarray:
    return value.astype(like.dtype)


def _row(value: np.ndarray, like: Any) -> np.ndarray:
    """Returns a vector with the type and the rank of an array whose last axis it is along."""
    return value.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def patch_pca(
    count: int,
    mean: Float[np.ndarray, " numbers"],
    covariance: Float[np.ndarray, "numbers numbers"],
    *,
    components: int,
    patch: tuple[int, int],
    scale: str = "global",
    center: bool = True,
) -> PatchPCA:
    """Returns the PCA of patches from their moments.

    Args:
      count: number of patches.
      mean, covariance: of the patches of normalized images, (rows, columns, channels) in one vector.
      components: d.
      patch: (height, width).
      scale: a name of `SCALES`.
      center: whether to subtract the mean patch.

    Raises:
      ConfigError: for d outside 1 … D, or an unknown scale.
      DataError: for fewer patches than numbers in one, or images that do not vary in d directions.
    """
    check_components(components, patch, numbers := covariance.shape[-1])
    if scale not in SCALES:
        raise ConfigError(f'pretrain.scale="{scale}": expected one of {", ".join(SCALES)}.')
    if count < numbers:
        raise DataError(
            f"A PCA of patches of {numbers} numbers needs at least that many patches, and there are {count}: give "
            "more images, or smaller patches."
        )
    variance, vectors = np.linalg.eigh(covariance.astype(np.float64))
    variance, basis = np.maximum(variance[::-1], 0.0), vectors[:, ::-1].T
    varying = int(np.sum(variance > CONSTANT * max(variance[0], np.finfo(np.float32).tiny)))
    if varying < components:
        raise DataError(
            f"The patches of the training images vary in {varying} of {numbers} directions, fewer than the "
            f"{components} of pretrain.components: constant or gray images, or a smaller number of components is meant."
        )
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    basis = basis * np.where(largest < 0, -1.0, 1.0)
    origin = mean.astype(np.float64) if center else np.zeros(numbers)
    return PatchPCA(
        mean=origin,
        basis=np.ascontiguousarray(basis),
        variance=variance,
        deviation=_deviation(variance, components, scale),
        components=components,
        patch=patch,
        count=count,
    )


def pixel_basis(pca: PatchPCA) -> PatchPCA:
    """Returns pixels in place of components: the basis of a classical denoising autoencoder, with the same mean.

    Its one scale is the root of the pixels' mean variance.
    """
    numbers, total = pca.numbers, float(pca.variance.mean())
    return dataclasses.replace(
        pca,
        basis=np.eye(numbers),
        variance=np.full(numbers, total),
        deviation=np.full(numbers, np.sqrt(total)),
        components=numbers,
    )


def check_components(components: int, patch: tuple[int, int], numbers: int) -> None:
    """Raises ConfigError unless 1 ≤ d ≤ D."""
    if isinstance(components, bool) or not isinstance(components, int) or not 1 <= components <= numbers:
        raise ConfigError(
            f"pretrain.components={components}: a patch of {patch[0]}×{patch[1]} pixels has {numbers} numbers, so the PCA "
            f"keeps between 1 and {numbers} of them."
        )


def _deviation(variance: np.ndarray, components: int, scale: str) -> np.ndarray:
    if scale == "none":
        return np.ones(len(variance))
    if scale == "global":
        return np.full(len(variance), np.sqrt(variance[:components].mean()))
    deviation = np.sqrt(variance)
    deviation[components:] = deviation[components - 1]
    return deviation


def save_pca(path: str, pca: PatchPCA, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes a PCA with the normalization of the images that it is of, whole or not at all."""
    arrays: dict[str, Any] = {name: getattr(pca, name) for name in _FIELDS}
    numbers: dict[str, Any] = {"components": pca.components, "patch": pca.patch, "count": pca.count}
    with whole(path, "wb") as file:
        np.savez(file, **arrays, **numbers, image_mean=mean, image_std=std)


def load_pca(path: str) -> tuple[PatchPCA, np.ndarray, np.ndarray]:
    """Returns a saved PCA, and mean and standard deviation that the images were normalized with.

    Raises:
      CheckpointError: if there is none, or the file is no PCA.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"There is no PCA of patches {path}; a run with pre-training writes pca.npz.")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in _FIELDS}
            patch = tuple(int(side) for side in file["patch"])
            pca = PatchPCA(**arrays, components=int(file["components"]), patch=patch, count=int(file["count"]))  # type: ignore[arg-type]
            return pca, file["image_mean"], file["image_std"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no PCA of patches that a run with pre-training has written: {error}."
        ) from error
