"""A `Setup` of a few lines, for tests of what takes one and needs no configuration."""

import jax
import numpy as np

from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import coverage, find_sites
from drep_jax.data.npz_source import ArraySource
from drep_jax.run.setup import Setup
from drep_jax.tasks import TASKS


def make_setup(backbone, images, *, source=None, task=None, mean=(0.0,) * 3, std=(1.0,) * 3, **changes):
    """Returns the setup of a backbone with its usual sites.

    Args:
      backbone: the Linen module.
      images: a batch as the backbone gets it, (n, h, w, 3).
      source: of all splits; None for eight black images of class 0.
      task: None for the first of the table.
      mean, std: see `Setup`.
      **changes: other fields.
    """
    if source is None:
        black = np.zeros((8, *images.shape[1:3], 3), np.uint8)
        source = ArraySource("black", black, np.zeros(8, np.int32), ("nothing",), None)
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32)
    abstract = jax.eval_shape(backbone.init, jax.random.key(0), one)
    schedule = Schedule()
    sites = find_sites(backbone, one, timesteps=schedule.timesteps)
    given = {
        "backbone": backbone,
        "abstract": abstract,
        "schedule": schedule,
        "sites": sites,
        "covered": coverage(sites, abstract["params"]),
        "train": source,
        "held_out": source,
        "test": source,
        "features": False,
        "mean": mean,
        "std": std,
        "others": (),
        "headless": backbone,
        "task": next(iter(TASKS.values()))({"model": {}, "select": {"weighted": False}}) if task is None else task,
        "side": (),
    }
    return Setup(**{**given, **changes})
