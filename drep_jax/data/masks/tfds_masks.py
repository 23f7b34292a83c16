"""`seg_tfds:NAME[/CONFIG]`: data sets of the TFDS catalog whose masks give the class of each pixel."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

from drep_jax.data.labels import spread
from drep_jax.data.masks.coding import Coding
from drep_jax.data.masks.listing import MaskSet, Pair
from drep_jax.data.masks.looking import LOOKED_AT, look
from drep_jax.data.masks.names import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, CITYSCAPES_IDS
from drep_jax.data.masks.source import MaskSource
from drep_jax.data.splits import SPLITS, plan
from drep_jax.data.steps import Size
from drep_jax.data.tfds_source import FORMAT, instruction, open_builder
from drep_jax.errors import ConfigError, DataError, did_you_mean


class Features(NamedTuple):
    """What a data set of the catalog calls image and mask, and what its masks hold."""

    image: str
    mask: str
    coding: Coding
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] = ()


SETS = {
    "cityscapes": Features(
        "image_left", "segmentation_label", Coding(CITYSCAPES_IDS, None), CITYSCAPES_CLASSES, CITYSCAPES_COLORS
    ),
    "oxford_iiit_pet": Features("image", "segmentation_mask", Coding((1, 2), frozenset({3})), ("pet", "background")),
}
REFUSED = {
    "scene_parse150": "its masks are of instances (annotations_instance of the 2017 challenge), not of the 150 classes. Read "
    "ADEChallengeData2016 from its folder instead: ade20k:DIR",
    "voc": "it has boxes only. Read VOC2012 from its folder instead: voc:DIR",
    "coco": "it has boxes and panoptic masks only. Read COCO-Stuff from its folder instead: coco_stuff:DIR",
}


class _Examples(Sequence[Pair]):
    """The pairs of a TFDS data source, read one by one."""

    def __init__(self, examples: Any, features: Features, name: str) -> None:
        self._examples, self._features, self._name = examples, features, name

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        example = self._examples[index]
        where = f"{self._name} {index}"
        return Pair(
            where, example[self._features.image], example[self._features.mask], f"{where}, image", f"{where}, mask"
        )


def open_seg_tfds(argument: str, split: str, image_size: Size, resize: str, data_dir: str | None) -> MaskSource:
    """Opens `seg_tfds:NAME[/CONFIG]`.

    Raises:
      ConfigError: for a data set without such masks, saying why.
      DataError: when it is not prepared as array_record; nothing is downloaded.
    """
    import tensorflow_datasets as tfds  # takes half a second to import

    name = argument.partition("/")[0]
    if name in REFUSED:
        raise ConfigError(f'"seg_tfds:{argument}" cannot be used: {REFUSED[name]}.')
    if name not in SETS:
        raise ConfigError(
            f'The masks of "{name}" are not known here.{did_you_mean(name, SETS)} Export images and masks to a folder instead: '
            "seg_folder:DIR."
        )
    features = SETS[name]
    builder = open_builder(argument, data_dir)
    title = f"seg_tfds:{builder.info.full_name}"
    absent = [feature for feature in (features.image, features.mask) if feature not in builder.info.features]
    if absent:
        raise DataError(f'{title} has no feature "{absent[0]}". Prepare the configuration that has it.')
    sizes = {kind: info.num_examples for kind, info in builder.info.splits.items() if kind in SPLITS}
    skipped = {feature: tfds.decode.SkipDecoding() for feature in (features.image, features.mask)}
    part = plan(sizes, split, title)
    slice_ = instruction(builder.name, part, sizes[part.stored])
    pairs = _Examples(
        builder.as_data_source(slice_, decoders=skipped, file_format=FORMAT), features, f"{title}, {slice_}"
    )
    listed = MaskSet(title, {part.stored: pairs}, features.coding, features.class_names, features.palette)
    sample = [pairs[place] for place in spread(len(pairs), LOOKED_AT)]
    notes = [part.note, features.coding.words, look(sample, features.coding, features.class_names, image_size, title)]
    return MaskSource(
        pairs,
        listed,
        labeled=True,
        name=title,
        note=" ".join(filter(None, notes)),
        stored=part.stored,
        image_size=image_size,
        resize=resize,
    )
