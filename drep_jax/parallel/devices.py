"""Data parallelism over the devices of all hosts: the only module that names `jax.pmap`.

Every host calls the same functions in the same order, each with its own rows of every batch. The
axis of devices runs over the devices of host 0, then those of host 1, …, so the rows of a batch are
in the same order as on one host.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from drep_jax.errors import ConfigError
from drep_jax.typing import Tree

AXIS = "devices"


LAG = 4
"""Steps until a flag of one host reaches the others; so many steps may be in flight."""


PIECE = 2**22
"""Numbers per message of a broadcast."""


def check_platform() -> None:
    """Starts JAX's devices.

    Raises:
      ConfigError: if it has none of the kind that the variable JAX_PLATFORMS asks for; names the
        kinds that it has.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # "cuda" without its plugin is a bare assertion
        requested = getattr(jax.config, "jax_platforms", None)
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ConfigError(
            f"JAX cannot use the devices of JAX_PLATFORMS={requested or ''}{f': {reason}' if reason else ''}. Install the "
            'JAX of these devices (pip install "jax[cuda12]" or "jax[tpu]"; nvidia-smi must list the GPU), give '
            "JAX_PLATFORMS=cpu to compute on the CPU, or unset it to take what there is."
        ) from error


def device_count() -> int:
    """Returns the number of devices of all hosts."""
    return jax.device_count()


def local_device_count() -> int:
    """Returns the number of this host's devices."""
    return jax.local_device_count()


def host() -> tuple[int, int]:
    """Returns (index, count) of this host, which reads that part of every batch."""
    return jax.process_index(), jax.process_count()


def check_batch(size: int, what: str) -> None:
    """Raises `ConfigError` unless a batch divides evenly among the devices.

    Args:
      size: images per batch, over all devices.
      what: name of the setting, for the message.
    """
    if size < 1 or size % device_count():
        hosts = jax.process_count()
        where = f"{hosts} processes of {local_device_count()} devices" if hosts > 1 else "the local devices"
        raise ConfigError(f"{what}={size} must be a positive multiple of {device_count()}, the number of {where}.")


def replicate(tree: Tree) -> Tree:
    """Returns `tree` on every local device.

    It has the layout of `on_devices`' outputs, so that a second step compiles nothing.
    """
    if not jax.tree_util.tree_leaves(tree):  # pmap refuses an empty tree among several hosts
        return tree
    return _copies()(np.arange(local_device_count()), tree)


@functools.cache
def _copies() -> Callable[..., Any]:
    return jax.pmap(lambda _, same: same, axis_name=AXIS, in_axes=(0, None))


def unreplicate(tree: Tree) -> Tree:
    """Returns copies of the first device's arrays in NumPy.

    A view could share a buffer that is donated later.
    """
    return jax.tree_util.tree_map(lambda leaf: np.array(leaf.addressable_shards[0].data)[0], tree)


def shard(batch: Tree) -> Tree:
    """Splits this host's rows among its devices: (batch, …) to (devices, batch / devices, …)."""
    return jax.tree_util.tree_map(lambda leaf: leaf.reshape(local_device_count(), -1, *leaf.shape[1:]), batch)


def unshard(tree: Tree) -> Tree:
    """Inverse of `shard`, as NumPy arrays."""
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)


def on_devices(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles `function` to run on every device, on its slice of the arguments' first axis."""
    return jax.pmap(function, axis_name=AXIS, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Inside a function given to `on_devices`
# ---------------------------------------------------------------------------------------------------------------------


def device_index() -> Any:
    """Returns the index of this device among those of all hosts."""
    return jax.lax.axis_index(AXIS)


def axis_size() -> int:
    """Returns the number of devices of all hosts."""
    return jax.lax.axis_size(AXIS)


def scattered_total(flat: Any) -> Any:
    """Sums vectors over all devices (reduce-scatter); device i gets the i-th part of the sum."""
    return jax.lax.psum_scatter(flat, AXIS, tiled=True)


def gathered(part: Any) -> Any:
    """Concatenates the vectors of all devices along their first axis."""
    return jax.lax.all_gather(part, AXIS, tiled=True)


def mean(tree: Tree) -> Tree:
    """Returns the mean over the devices of all hosts."""
    return jax.lax.pmean(tree, AXIS)


def total(tree: Tree) -> Tree:
    """Returns the sum over the devices of all hosts."""
    return jax.lax.psum(tree, AXIS)


def exact_total(high: Tree, low: Tree) -> tuple[Tree, Tree]:
    """Returns the sum of high + low over all devices, to the 48 bits that two float32 numbers hold.

    One all-reduce: each device receives its part from all devices, sums it in the order of the
    devices with compensation of the rounding errors, and sends the sum to all. So every host has
    the same bits.

    Args:
      high: float32 arrays.
      low: their rounding errors, likewise.

    Returns:
      The sums, in the same form.
    """
    leaves, form = jax.tree_util.tree_flatten(high)
    shapes = [leaf.shape for leaf in leaves]
    flat = jnp.stack([jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree_util.tree_leaves(t)]) for t in (high, low)])
    devices, size = jax.lax.axis_size(AXIS), flat.shape[1]
    parts = jnp.pad(flat, ((0, 0), (0, -size % devices))).reshape(2, devices, -1)
    local = jax.lax.all_to_all(parts, AXIS, split_axis=1, concat_axis=1, tiled=True)

    def add(number: Any, so_far: Any) -> Any:
        total, lost = so_far
        new = local[0, number]
        after = total + new
        back = after - total
        return after, lost + ((total - (after - back)) + (new - back)) + local[1, number]

    start = (jnp.zeros_like(local[0, 0]), jnp.zeros_like(local[0, 0]))
    sums = jnp.stack(jax.lax.fori_loop(0, devices, add, start))
    everything = jax.lax.all_gather(sums, AXIS, axis=1, tiled=True)[:, :size]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def tree(row: Any) -> Tree:
        parts = [part.reshape(shape) for part, shape in zip(jnp.split(row, ends), shapes, strict=True)]
        return jax.tree_util.tree_unflatten(form, parts)

    return tree(everything[0]), tree(everything[1])


# ---------------------------------------------------------------------------------------------------------------------
# Between hosts
# ---------------------------------------------------------------------------------------------------------------------


def gather(array: np.ndarray) -> np.ndarray:
    """Stacks the arrays of all hosts, which have equal shapes and types: (hosts, …)."""
    array = np.ascontiguousarray(array)
    if jax.process_count() == 1:
        return array[None]
    raw = np.asarray(multihost_utils.process_allgather(array.reshape(-1).view(np.uint8)))
    return raw.reshape(jax.process_count(), -1).view(array.dtype).reshape(jax.process_count(), *array.shape)


def broadcast(content: bytes | None) -> bytes:
    """Returns host 0's bytes on every host."""
    if jax.process_count() == 1:
        return content or b""
    first = jax.process_index() == 0
    size = len(content) if first and content is not None else 0
    size = int(np.frombuffer(multihost_utils.broadcast_one_to_all(_words(size.to_bytes(8, "little"), 2)), np.int64)[0])
    pieces = []
    for start in range(0, size, 4 * PIECE):
        # lengths are powers of two, so that few programs are compiled
        length = min(PIECE, 2 ** max(8, (-(-(size - start) // 4) - 1).bit_length()))
        sent = _words(content[start : start + 4 * length] if first and content is not None else b"", length)
        pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    return b"".join(pieces)[:size]


def _words(content: bytes, length: int) -> np.ndarray:
    return np.frombuffer(content.ljust(4 * length, b"\0"), np.uint32)


class AnyHost:
    """Tells all hosts, in the same call, whether one of them has raised a flag.

    The devices do not wait for it.
    """

    def __init__(self) -> None:
        self._in_flight: collections.deque[Any] = collections.deque()

    def __call__(self, raised: bool, *, last: bool = False) -> bool:
        """Returns the flag on one host.

        Among several, whether any of them had raised it `LAG` calls ago.

        Args:
          raised: this host's flag; once raised, it stays raised.
          last: whether this is the last call, which waits for the current flags of all hosts.
        """
        if jax.process_count() == 1:
            return raised
        self._in_flight.append(_largest()(np.full(local_device_count(), raised, np.float32)))
        if last:
            return bool(unreplicate(self._in_flight.pop()))
        if len(self._in_flight) <= LAG:
            return False
        return bool(unreplicate(self._in_flight.popleft()))


@functools.cache
def _largest() -> Callable[..., Any]:
    return jax.pmap(lambda flag: jax.lax.pmax(flag, AXIS), axis_name=AXIS)
