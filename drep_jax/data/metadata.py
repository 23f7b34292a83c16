"""Columns of a source that need no decoding, such as identity and camera; and its protocol."""

import numpy as np

from drep_jax.data.source import Source
from drep_jax.metrics.protocol import Protocol


def table_of(source: Source, index: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns the columns of a source for re-identification, {name: int32 (n,)}, or {}.

    Args:
      source: the images.
      index: which images; None for all.
    """
    table = getattr(source, "table", {})
    return table if index is None else {name: column[index] for name, column in table.items()}


def protocol_of(source: Source) -> Protocol:
    """Returns how a source is evaluated."""
    return getattr(source, "protocol", Protocol())
