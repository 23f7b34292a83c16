"""Images on their way through a network that is fused site by site (measured noise)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Shaped

from drep_jax.core.chunks import Round, Streams, Waiting
from drep_jax.core.interpreter import tree_of
from drep_jax.core.order import Place
from drep_jax.core.stretches import Network, Stretch
from drep_jax.parallel import devices
from drep_jax.typing import AnyArray

Leaves = tuple[AnyArray, ...]
"""A layer's parameters in the order in which its equation reads them."""


AHEAD = -1
"""Stands for the number of the stretch that looks ahead at the cut where the images are."""


class Walk:
    """The images of all rounds, each as far as it has come.

    Attributes:
      rounds, fixed: as given.
    """

    def __init__(
        self,
        network: Network,
        images: Streams,
        rounds: Sequence[Round],
        fixed: Mapping[Any, Any],
        limit: float,
        programs: dict[str, Callable[..., Any]],
    ) -> None:
        """Starts at the images.

        Args:
          network: the network, cut at its sites.
          images: clean and corrupted ones.
          rounds: their division.
          fixed: values of what does not depend on images, by variable.
          limit: bytes of features that may wait between sites.
          programs: compiled stretches by key; new ones are added.
        """
        self._network, self._images, self.rounds, self.fixed = network, images, rounds, fixed
        self._waiting, self._programs = Waiting(limit), programs
        self._placed: dict[int, tuple[Any, Any]] = {}
        self._fused: dict[Place, Leaves] = {}

    def _program(self, stretch: Stretch) -> Callable[..., Any]:
        """Returns (live, fixed, ((clean leaves, fused leaves) of each layer)) ↦ outputs, on all devices."""
        streams = self._images.shape[0]

        def run(live: Any, fixed: Any, leaves: Any) -> Any:
            def apply(index: int, x: Any) -> Any:
                layer, rows = self._network.layers[stretch.places[index][0]], x.shape[0] // streams
                clean, fused = map(tree_of, leaves[index])
                return jnp.concatenate([layer(clean, x[:rows]), layer(fused, x[rows:])])

            return stretch.run(live, fixed, apply)

        if stretch.key not in self._programs:
            self._programs[stretch.key] = devices.on_devices(run, in_axes=(0, None, None))
        return self._programs[stretch.key]

    def advance(self, round_number: int, cut: int) -> Mapping[Any, Any]:
        """Returns what is alive at a cut of a round's images, by variable, and lets it wait if it may."""
        network = self._network
        base, values = self._waiting.get(round_number)
        if base < 0:
            values = self._take(round_number)
        for number in range(base + 1, cut + 1):
            stretch = network.stretches[number]
            program, (fixed, leaves) = self._program(stretch), self._parameters(number, stretch)
            live = network.cuts[number].live if number < len(network.cuts) else network.outputs
            outs = program(tuple(values[v] for v in stretch.live), fixed, leaves) if stretch.outputs else ()
            values = {**values, **dict(zip(stretch.outputs, outs, strict=True))}
            values = {v: values[v] for v in live if not isinstance(v, core.Literal) and v in values}
        resident = (
            self._images.resident and network.image in values and set(values) <= {network.image, *network.arguments}
        )
        if base < cut < len(network.cuts) and not resident:
            size = sum(value.nbytes for value in values.values())
            self._waiting.put(round_number, cut, size, values)
        return values

    def values_at(self, round_number: int, cut: int) -> Callable[[Any], Any]:
        """Returns variable ↦ value of a round's images, for what solving at a cut needs, one a device."""
        values = dict(self.advance(round_number, cut))
        ahead = self._network.cuts[cut].ahead
        if ahead is not None:
            fixed, leaves = self._parameters(AHEAD, ahead)
            outs = self._program(ahead)(tuple(values[v] for v in ahead.live), fixed, leaves)
            values |= dict(zip(ahead.outputs, outs, strict=True))

        def value_of(var: Any) -> Any:
            if var in values:
                return values[var]
            value = np.asarray(var.val if isinstance(var, core.Literal) else self.fixed[var])
            return np.broadcast_to(value, (len(self.rounds[round_number].mine()[0]), *value.shape))

        return value_of

    def fuse(self, layers: Mapping[Place, Leaves]) -> None:
        """Takes the fused parameters of layers, and drops those of stretches that all images have behind them."""
        self._fused |= {place: tuple(map(jnp.asarray, leaves)) for place, leaves in layers.items()}
        earliest = self._waiting.earliest(len(self.rounds))
        self._placed = {number: placed for number, placed in self._placed.items() if number > earliest}

    def _take(self, round_number: int) -> dict[Any, np.ndarray]:
        """Returns the images of a round, (devices, streams · chunk, *image_shape), and what goes with them, by variable."""
        index, _ = self.rounds[round_number].mine()
        images = self._images.take(index.reshape(-1))
        given = self._images.arguments(index.reshape(-1))

        def arranged(rows: np.ndarray) -> np.ndarray:
            rows = rows.reshape(len(images), *index.shape, *rows.shape[2:])
            return np.moveaxis(rows, 0, 1).reshape(len(index), -1, *rows.shape[3:])

        beside = [np.broadcast_to(given[name], (len(images), *given[name].shape)) for name in sorted(given)]
        variables = (self._network.image, *self._network.arguments)
        return dict(zip(variables, map(arranged, (images, *beside)), strict=True))

    def _parameters(self, number: int, stretch: Stretch) -> tuple[Any, Any]:
        """Returns what a stretch reads of parameters: fixed values, and its layers' leaves, clean and fused.

        Layers that are not solved yet, which are only looked ahead at, are as they are.
        """
        if number not in self._placed:
            values = self.fixed
            leaves = []
            for place in stretch.places:
                clean = tuple(jnp.asarray(values[v]) for v in self._network.leaves[place])
                leaves.append((clean, self._fused.get(place, clean)))
            self._placed[number] = (tuple(jnp.asarray(values[v]) for v in stretch.fixed), tuple(leaves))
        return self._placed[number]

    def outputs(self) -> Shaped[np.ndarray, "streams images *output"]:
        """Returns the backbone's outputs for all images of every stream."""
        network = self._network
        streams, images = self._images.shape[:2]
        result = np.zeros(0)
        output = network.outputs[0]
        for round_number, chunk in enumerate(self.rounds):
            values = self.advance(round_number, len(network.cuts))
            index, _ = chunk.mine()
            if isinstance(output, core.Literal) or output not in values:  # it does not depend on the images
                value = np.asarray(output.val if isinstance(output, core.Literal) else self.fixed[output])
                here = np.broadcast_to(value, (len(index), *value.shape))
            else:
                here = np.asarray(values[output])
            gathered = devices.gather(here).reshape(len(chunk.index), streams, chunk.index.shape[1], *here.shape[2:])
            if not result.size:
                result = np.zeros((streams, images, *gathered.shape[3:]), here.dtype)
            counted = chunk.mask > 0
            result[:, chunk.index[counted]] = np.moveaxis(gathered, 1, 0)[:, counted]
        return result
