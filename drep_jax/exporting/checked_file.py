"""Writes an exported network only if the file, read back, computes what the live module computes.

Both run on the same random images at several batch sizes. The error is max |reloaded − live|. Its
bound is a fraction of max |live|, which depends on the coarsest floating type of the network.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend import core

from drep_jax.core.jaxpr import bodies
from drep_jax.errors import ExportError
from drep_jax.exporting.statistics import MixedStatistics
from drep_jax.files import replacing
from drep_jax.typing import Tree

Network = Callable[[Any], Tree]

BATCHES = (1, 3)
"""Batch sizes that every export is tried with."""

LARGEST_FILE = 2**31 - 2**20
"""Bytes. Both formats are single messages with signed 32-bit offsets.

A MiB is left for the program.
"""

TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Allowed max |Δ| / max |live|, by the coarsest type in the network.

Another program sums in another order.
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outputs of the reloaded file against those of the live module.

    Attributes:
      batches: batch sizes tried.
      error: max |reloaded − live| over all batches.
      bound: the allowed error, `tolerance` · max |live|.
      tolerance: relative, from `TOLERANCES`.
      dtype: the coarsest type the network computes in.
    """

    batches: tuple[int, ...]
    error: float
    bound: float
    tolerance: float
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the error is a finite number within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batches))
        return (
            f"reloaded against live at batch sizes {sizes}: max |Δ| {self.error:.1e}, "
            f"allowed {self.bound:.1e} ({self.tolerance:.0e} of the largest output, computed in {self.dtype})"
        )


def traced(
    module: nn.Module | MixedStatistics, variables: Tree, image_size: tuple[int, int], channels: int
) -> core.ClosedJaxpr:
    """Returns the equations of `x ↦ module.apply(variables, x)` for images of any batch size.

    Weights are constants.

    Raises:
      ExportError: if the module cannot be traced with an unknown batch size, or its weights are too
        large for a file.
    """
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree_util.tree_leaves(variables))
    if size > LARGEST_FILE:
        raise ExportError(
            f"The weights take {size:,} bytes and one file holds at most {LARGEST_FILE:,}. Store them in a narrower type, "
            "or write the weights alone (safetensors, Orbax)."
        )

    def apply(images: Any) -> Tree:
        return module.apply(variables, images)

    # A module that fails at any batch size fails here, with its own error.
    jax.eval_shape(apply, images_of((2, *image_size, channels)))
    try:
        return jax.make_jaxpr(apply)(images_of((symbolic_batch(), *image_size, channels)))
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} runs at a batch size of 2 but not at an unknown one, which an exported file needs: "
            f"{_first_line(error)} Code must not turn x.shape[0] into a number; reshape with -1 for the batch, and take "
            "sizes from the other axes."
        ) from error


def symbolic_batch() -> Any:
    """Returns the unknown batch size, called "batch" in the file."""
    return export.symbolic_shape("batch")[0]


def images_of(shape: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """Returns shape and type of a batch of float32 images."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)


def write_checked(
    path: str,
    data: bytes,
    reload: Callable[[str], Network],
    live: Network,
    closed: core.ClosedJaxpr,
    image_shape: tuple[int, ...],
) -> Comparison:
    """Writes a file, if the network read back from it computes what `live` does.

    Args:
      path: of the file; an earlier one stays if anything fails.
      data: contents of the file.
      reload: path ↦ network, the function that a user would call.
      live: the module with its variables.
      closed: its equations, which tell the type it computes in.
      image_shape: (height, width, channels).

    Raises:
      ExportError: if the two differ by more than the bound, or by NaN.
    """
    if len(data) > LARGEST_FILE:
        raise ExportError(f"{path} would take {len(data):,} bytes, and one file holds at most {LARGEST_FILE:,}.")
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
        try:
            comparison = compare(reload(temporary), live, closed, image_shape)
        except Exception as error:
            raise ExportError(f"Not writing {path}: the file cannot be read back and run. {error}") from error
        if not comparison.passed:
            raise ExportError(
                f"Not writing {path}: the exported network differs from the live one: {comparison}. This is a fault of "
                "the exporter for this network, not of the weights."
            )
    return comparison


def compare(reloaded: Network, live: Network, closed: core.ClosedJaxpr, image_shape: tuple[int, ...]) -> Comparison:
    """Runs both networks on random images at every batch size in `BATCHES`, on the CPU.

    Raises:
      ExportError: if they return different shapes.
    """
    error = largest = 0.0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        run = jax.jit(live)
        for batch in BATCHES:
            images = np.random.default_rng(batch).normal(size=(batch, *image_shape)).astype(np.float32)
            pairs = zip(*(jax.tree_util.tree_leaves(f(images)) for f in (reloaded, run)), strict=True)
            for got, expected in ([np.asarray(leaf).astype(np.float64) for leaf in pair] for pair in pairs):
                if got.shape != expected.shape:
                    raise ExportError(
                        f"The exported network returns {got.shape} where the live one returns {expected.shape}."
                    )
                error = float(np.maximum(error, np.abs(got - expected).max()))  # NaN stays
                largest = max(largest, float(np.abs(expected).max()))
    dtype = coarsest(closed)
    tolerance = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    return Comparison(BATCHES, error, tolerance * largest, tolerance, dtype)


def coarsest(closed: core.ClosedJaxpr) -> str:
    """Returns the floating type with the largest rounding error among the equations' results."""
    dtypes = {aval.dtype for aval in _results(closed.jaxpr) if jnp.issubdtype(aval.dtype, jnp.floating)}
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps)).name if dtypes else "float32"


def _results(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars if hasattr(var.aval, "dtype"))
        for body in bodies(eqn):
            yield from _results(body)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200] + "."
