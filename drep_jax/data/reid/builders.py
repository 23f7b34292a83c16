"""TFDS builders of the data sets for re-identification, from the originals, without TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from drep_jax.data.reid import READERS
from drep_jax.data.reid.listing import Entry, Listed, checked

FORMAT = tfds.core.FileFormat.ARRAY_RECORD


class ReidBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Train, query and gallery images of one data set, in the order in which its folder is read.

    An image that is both a query and in the gallery is in the split query, with both flags; if all
    are, there is no split gallery.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The unpacked data set, in the folders in which it is published."
    OPTION: ClassVar[str | None] = None
    """The reader's option that the configuration's name is the value of."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "identity": tfds.features.Text(),
            "camera": np.int32,
            "view": np.int32,
            "query": np.int32,
            "gallery": np.int32,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # the folder and the prepared set give the same images in the same order
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        options = {self.OPTION: self.builder_config.name} if self.OPTION else {}
        listed = checked(READERS[self.name].read(dl_manager.manual_dir, options))
        self.info.metadata.update(described(listed))
        parts = {
            "train": listed.train,
            "query": [entry for entry in listed.test if entry.query],
            "gallery": [entry for entry in listed.test if not entry.query],
        }
        # TFDS refuses empty splits. The gallery is empty where all its images are queries, too, as
        # in VehicleID.
        return {name: self._generate_examples(entries) for name, entries in parts.items() if entries}

    def _generate_examples(self, entries: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, entry in enumerate(entries):
            yield number, _example(entry)


def described(listed: Listed) -> dict[str, Any]:
    """Returns what a reader knows of a data set besides its images, as JSON."""
    return {
        "title": listed.title,
        "cameras": listed.cameras,
        "cross_camera": listed.protocol.cross_camera,
        "trials": listed.protocol.trials,
        "one_numbering": listed.one_numbering,
        "published": {part: list(counts) for part, counts in listed.published.items()},
        "remarks": list(listed.remarks),
    }


def _example(entry: Entry) -> dict[str, Any]:
    stored = entry.image() if callable(entry.image) else entry.image
    return {
        "image": io.BytesIO(stored) if isinstance(stored, bytes) else stored,
        "identity": entry.identity,
        "camera": entry.camera,
        "view": entry.view,
        "query": int(entry.query),
        "gallery": int(entry.gallery),
    }


class Market1501(ReidBuilder):
    """Market-1501."""


class Duke(ReidBuilder):
    """DukeMTMC-reID."""


class Msmt17(ReidBuilder):
    """MSMT17, of the version that is in the folder."""


class Cuhk03(ReidBuilder):
    """CUHK03 in the new protocol."""

    OPTION = "boxes"
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="labeled", description="boxes drawn by hand"),
        tfds.core.BuilderConfig(name="detected", description="boxes of a detector"),
    ]


class Vehicleid(ReidBuilder):
    """VehicleID, with one of its test lists."""

    OPTION = "size"
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=size, description=f"{size} vehicles for test") for size in ("800", "1600", "2400")
    ]


class Veri(ReidBuilder):
    """VeRi-776."""


BUILDERS: dict[str, type[ReidBuilder]] = {
    builder.name: builder for builder in (Market1501, Duke, Msmt17, Cuhk03, Vehicleid, Veri)
}
