"""Augmentation of training images, chosen in `config.data`.

Each image's draws depend on its position in the stream alone.

Order: crop, or scale and crop (before the image is fitted), flip, photometric distortion, shift,
RandAugment, erasing, then mixup or cutmix. Labels with geometry follow crops, flips and shifts;
photometric distortion and erasing leave them as they are; RandAugment and mixing are refused with
them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from drep_jax.data.augment.erasing import erase
from drep_jax.data.augment.flip_crop import flip_and_shift, flip_and_shift_transforms
from drep_jax.data.augment.mixing import mix
from drep_jax.data.augment.photometric import photometric
from drep_jax.data.augment.randaugment import STRONGEST, randaugment
from drep_jax.data.columns import Columns, geometric
from drep_jax.data.geometry import Transform
from drep_jax.data.steps import Size
from drep_jax.errors import ConfigError
from drep_jax.typing import Batch


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images; every default is off.

    Attributes:
      flip: horizontal flip with probability 1/2.
      shift: largest shift in pixels, vertical and horizontal, filled with zeros.
      crop_scale: smallest and largest fraction of the area of a random resized crop; () for the
        fitted image as it is.
      crop_ratio: smallest and largest width over height of that crop.
      scale: smallest and largest factor of a random resize with the aspect kept, after which a crop
        of the fitted size is cut out, padded where the image is smaller; () for none.
      scale_base: short and long side that the factor 1 stands for; () for the image's own size.
      cat_max_ratio: with `scale`, a crop in which one class of the label map has this fraction of
        the pixels is drawn again, up to ten times; 1 for any crop.
      mean: color of that padding on the scale 0 to 1, that of the normalization.
      photometric: brightness, contrast, saturation and hue at random.
      randaugment: random operations an image.
      randaugment_magnitude: their strength, from 0 to 30.
      erase: probability that a box of the image becomes noise.
      erase_fill: color of such a box, three numbers from 0 to 1; () for noise.
      mixup, cutmix: parameter a of the Beta(a, a) distributed weight; 0 for neither. For labeled
        stages only.

    Raises:
      ConfigError: for a setting out of range, by name.
    """

    flip: bool = False
    shift: int = 0
    crop_scale: tuple[float, ...] = ()
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    scale: tuple[float, ...] = ()
    scale_base: tuple[float, ...] = ()
    cat_max_ratio: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    photometric: bool = False
    randaugment: int = 0
    randaugment_magnitude: float = 9.0
    erase: float = 0.0
    erase_fill: tuple[float, ...] = ()
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, whole in (("shift", True), ("randaugment", True), ("mixup", False), ("cutmix", False)):
            value = getattr(self, name)
            if not _number(value) or value < 0 or (whole and value != int(value)):
                raise ConfigError(
                    f"data.{name}={value!r}: expected {'a whole' if whole else 'a'} number of at least 0."
                )
        if not _number(self.erase) or not 0 <= self.erase <= 1:
            raise ConfigError(f"data.erase={self.erase!r} is a probability and lies in [0, 1].")
        if self.erase_fill and (
            len(self.erase_fill) != 3 or not all(_number(x) and 0 <= x <= 1 for x in self.erase_fill)
        ):
            raise ConfigError(
                f"data.erase_fill={self.erase_fill!r}: expected three numbers from 0 to 1, such as data.mean, or () for noise."
            )
        if not _number(self.randaugment_magnitude) or not 0 <= self.randaugment_magnitude <= STRONGEST:
            raise ConfigError(
                f"data.randaugment_magnitude={self.randaugment_magnitude!r}: expected a number from 0 to {STRONGEST}."
            )
        for name, bounds, most in (("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, math.inf)):
            if name == "crop_scale" and not bounds:
                continue
            if len(bounds) != 2 or not all(map(_number, bounds)) or not 0 < bounds[0] <= bounds[1] <= most:
                raise ConfigError(
                    f"data.{name}={bounds!r}: expected (smallest, largest), both above 0"
                    f"{'' if most == math.inf else ' and at most 1, or () for no crop'}."
                )

        self._check_scale()

    def _check_scale(self) -> None:
        if not _number(self.cat_max_ratio) or not 0 < self.cat_max_ratio <= 1:
            raise ConfigError(
                f"data.cat_max_ratio={self.cat_max_ratio!r} is a fraction of the pixels and lies in (0, 1]."
            )
        for name, bounds in (("scale", self.scale), ("scale_base", self.scale_base)):
            if bounds and (len(bounds) != 2 or not all(map(_number, bounds)) or not 0 < bounds[0] <= bounds[1]):
                what = "(smallest, largest) factor" if name == "scale" else "(short, long) side in pixels"
                raise ConfigError(f"data.{name}={bounds!r}: expected {what}, both above 0, or () for none.")
        if self.scale and self.crop_scale:
            raise ConfigError("data.scale and data.crop_scale are two ways to crop at random; set one of them to ().")
        for name, default in (("scale_base", ()), ("cat_max_ratio", 1.0)):
            if not self.scale and getattr(self, name) != default:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)!r} is a part of random scaling; set data.scale, too."
                )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that batches have two labels each."""
        return bool(self.mixup or self.cutmix)

    @property
    def slow(self) -> bool:
        """Whether it takes so long that threads pay off even for images in memory."""
        return bool(self.crop_scale or self.scale or self.photometric or self.randaugment)

    @property
    def pad_color(self) -> tuple[int, ...]:
        """Color of padding, levels from 0 to 255, which is 0 once normalized."""
        return tuple(round(255 * level) for level in self.mean)

    @property
    def after_crops(self) -> "Augmentation":
        """What remains to be done once the image is cropped: with `scale`, flips and distortion are done before padding."""
        return dataclasses.replace(self, flip=False, photometric=False) if self.scale else self

    def check_batch(self, size: int, what: str) -> None:
        """Raises `ConfigError` unless a batch, or a host's part, holds whole pairs to mix."""
        if self.mixes and size % 2:
            raise ConfigError(f"{what}={size} must be even: mixup and cutmix mix each image with its neighbor.")

    def check_columns(self, columns: Columns) -> None:
        """Raises `ConfigError` for a setting whose effect labels with geometry cannot follow."""
        followers = ", ".join(f'"{column.name}"' for column in geometric(columns))
        for name in ("randaugment", "mixup", "cutmix"):
            if followers and getattr(self, name):
                why = "moves pixels" if name == "randaugment" else "mixes images"
                raise ConfigError(
                    f"data.{name}={getattr(self, name)!r} {why} in ways that the labels {followers} cannot follow. Set it to "
                    "0; flips, shifts, crops and erasing remain."
                )

    def transforms(
        self, sizes: Sequence[Size], pictures: Sequence[Size], *, seed: int, first_position: int
    ) -> list[Transform]:
        """Returns what flip and shift do to each image of a batch, for its labels to follow.

        Args:
          sizes: (height, width) of each image.
          pictures: the same without padding.
          seed, first_position: as for a call.
        """
        where = {"seed": seed, "first_position": first_position}
        return flip_and_shift_transforms(sizes, pictures, **where, flip=self.flip, shift=self.shift)

    def __call__(self, batch: Batch, *, seed: int, first_position: int) -> Batch:
        """Returns a batch of images, already cropped, augmented as its position in the stream says.

        Args:
          batch: with "image", uint8 (B, H, W, C), and "label" if it is mixed; with "size" flips and
            shifts are those of the picture within its padding.
          seed: of the stage.
          first_position: position of the first image in the endless stream.

        Returns:
          The batch; with "label2" and "share" if it is mixed, see
          `drep_jax.data.augment.mixing.mix`.
        """
        images = batch["image"]
        where = {"seed": seed, "first_position": first_position}
        if self.flip or self.shift:
            images = flip_and_shift(images, **where, flip=self.flip, shift=self.shift, size=batch.get("size"))
        if self.photometric:
            images = photometric(images, **where)
        if self.randaugment:
            images = randaugment(images, **where, count=self.randaugment, magnitude=self.randaugment_magnitude)
        if self.erase:
            images = erase(images, **where, probability=self.erase, fill=self.erase_fill)
        if self.mixes:
            return {**batch, **mix(images, batch["label"], **where, mixup=self.mixup, cutmix=self.cutmix)}
        return {**batch, "image": images}


OFF = Augmentation()


def augmentation_of(data: Mapping[str, Any], *, labeled: bool = True) -> Augmentation:
    """Returns the augmentation of the settings `config.data`.

    Args:
      data: the settings; those that an older configuration lacks are off.
      labeled: whether the stage learns from labels. A stage without labels never mixes images:
        denoisers are to learn what real images look like inside the network, and a mixture's second
        label means nothing to them.

    Raises:
      ConfigError: for a setting out of range, by name.
    """
    fields = [field for field in dataclasses.fields(Augmentation) if field.name in data]
    given: dict[str, Any] = {
        field.name: tuple(data[field.name]) if isinstance(field.default, tuple) else data[field.name]
        for field in fields
    }
    if not given.get("scale"):
        given.pop("mean", None)  # nothing is padded
    augmentation = Augmentation(**given)
    return augmentation if labeled else dataclasses.replace(augmentation, mixup=0.0, cutmix=0.0)
