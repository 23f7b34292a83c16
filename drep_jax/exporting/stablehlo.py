"""A network with its weights as one StableHLO file, which runs with JAX (`jax.export`) alone.

from jax import export
network = export.deserialize(bytearray(open("fused.stablehlo", "rb").read()))
logits = network.call(images)  # float32 (batch, height, width, channels), any batch
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import export

from drep_jax.errors import CheckpointError, ConfigError, ExportError, did_you_mean
from drep_jax.exporting.checked_file import Comparison, Network, images_of, symbolic_batch, traced, write_checked
from drep_jax.exporting.statistics import MixedStatistics

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    module: nn.Module | MixedStatistics,
    variables: Any,
    image_size: tuple[int, int],
    path: str,
    *,
    platforms: Sequence[str] = PLATFORMS,
    channels: int = 3,
) -> Comparison:
    """Writes `images ↦ module.apply(variables, images)` for any batch size, and checks the file.

    Args:
      module: an unbound Linen module that is called with the images alone, or one with mixed
        statistics of its BatchNorms.
      variables: its variables, {"params": …, …}; all of them go into the file.
      image_size: (height, width) in pixels.
      path: of the file.
      platforms: to lower the program for. "cuda" and "tpu" need no such device here, and are not
        run here.
      channels: of the images.

    Returns:
      The comparison of the file, read back and run on the CPU, with the live module.

    Raises:
      ExportError: if the module needs a known batch size, the file would be too large, or it
        computes something else. An earlier file stays.
      ConfigError: for an unknown platform.
    """
    for platform in platforms:
        if platform not in (*PLATFORMS, "rocm"):
            raise ConfigError(f'Unknown platform "{platform}".{did_you_mean(platform, (*PLATFORMS, "rocm"))}')
    if not platforms:
        raise ConfigError("An export needs at least one platform.")

    def live(images: Any) -> Any:
        return module.apply(variables, images)

    closed = traced(module, variables, image_size, channels)
    shape = (*image_size, channels)
    try:
        exported = export.export(jax.jit(live), platforms=list(platforms))(images_of((symbolic_batch(), *shape)))
        data = bytes(exported.serialize())
    except Exception as error:
        raise ExportError(f"JAX cannot export {type(module).__name__} for {', '.join(platforms)}: {error}") from error
    return write_checked(path, data, load_stablehlo, live, closed, shape)


def load_stablehlo(path: str) -> Network:
    """Reads a file written by `export_stablehlo`.

    Returns:
      A function of float32 images (batch, height, width, channels), of any batch size.

    Raises:
      CheckpointError: if the file is absent or damaged.
    """
    try:
        with open(path, "rb") as file:
            exported = export.deserialize(bytearray(file.read()))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no complete StableHLO export: {error}") from error
    return jax.jit(exported.call)
