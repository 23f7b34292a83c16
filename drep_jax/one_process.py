"""Orbax as used by one process of a run alone: it would otherwise wait for all of them at every file."""

from typing import Any

import jax
import orbax.checkpoint as ocp


def orbax_options() -> dict[str, Any]:
    """Returns the options that make Orbax's checkpointers wait for no other process."""
    if jax.process_count() == 1:
        return {}
    which = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=which, active_processes={which}, barrier_sync_key_prefix=f"process{which}"
    )
    return {"multiprocessing_options": options}
