"""Evaluation protocols of retrieval data sets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The evaluation protocol of a data set.

    Attributes:
      cross_camera: whether gallery images with the query's identity and camera are excluded (person
        data sets, VeRi-776).
      trials: number of random galleries with one image per identity; the other images are the
        queries (VehicleID). 0 uses the queries and gallery of the split.
      seed: of the random galleries.
    """

    cross_camera: bool = True
    trials: int = 0
    seed: int = 0
