"""How a data set for retrieval is evaluated."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a data set is evaluated.

    Attributes:
      cross_camera: whether gallery images of the query's identity and camera are left out (persons, VeRi-776).
      trials: 0 for the split's own queries and gallery; else how many times a gallery of one random image an identity is
        drawn, the other images being the queries (VehicleID).
      seed: of those draws.
    """

    cross_camera: bool = True
    trials: int = 0
    seed: int = 0
