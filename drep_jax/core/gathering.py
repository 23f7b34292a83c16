"""Sums over the images at a cut, all calls of a site's layer together (measured noise)."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.calls import shares_of
from drep_jax.core.chunks import Round
from drep_jax.core.layers import Layer
from drep_jax.core.regression import Form, Sums, chunk_sums, form_of, joined, of_all_hosts, positions_in, weighted
from drep_jax.core.shrinkage import folds_for
from drep_jax.core.sites import Site
from drep_jax.core.stretches import Call, Cut
from drep_jax.core.walk import Walk
from drep_jax.errors import DataError
from drep_jax.parallel import devices


class Gathering:
    """What takes the sums of a site, for any weights of the streams."""

    def __init__(self, count: tuple[int, int], vectors: int, *, by_fold: bool) -> None:
        """Starts with no program compiled.

        Args:
          count: numbers of streams and of images.
          vectors: see `drep_jax.core.measured.measuring`.
          by_fold: whether the sums over each fold are wanted, too.
        """
        self._count, self._vectors, self._wants_folds = count, vectors, by_fold
        self._programs: dict[Any, Callable[..., Any]] = {}

    def forms(self, cut: Cut, site: Site, layer: Layer, chunk: int) -> list[tuple[Form, Fraction]]:
        """Returns the form of the sums of each call at a cut, with the call's weight; these sum to 1.

        Args:
          cut, site, layer: where, with the site's first layer.
          chunk: images that are computed at once.
        """
        inputs = [jax.ShapeDtypeStruct(call.x.aval.shape, call.x.aval.dtype) for call in cut.calls]
        positions = [positions_in(site, layer, x, self._count[0] * chunk) for x in inputs]
        shares = shares_of(site, positions)
        corrupted = self._count[1] * (self._count[0] - 1)
        pairs = zip(positions, shares, strict=True)
        return [(form_of(site, layer, n, share, corrupted, self._vectors), share) for n, share in pairs]

    def bytes(self, call: Call, form: Form, chunk: int) -> int:
        """Returns the bytes that the feature vectors of a chunk take on a device."""
        vectors = self._count[0] * chunk * form.picks * form.groups
        return 4 * vectors * (2 * form.width + (form.columns if call.chain else 0))

    def sums(
        self,
        walk: Walk,
        number: int,
        calls: Sequence[tuple[Call, Form, Fraction]],
        part: int,
        matrix: np.ndarray | None,
        weights: np.ndarray,
    ) -> tuple[Sums, list[Sums]]:
        """Returns the sums of a site over the images of all hosts, and over each fold of them.

        Args:
          walk: of the images.
          number: of the cut.
          calls: of the layer, with the form of their sums and their weights.
          part: index of the site among those of the layer.
          matrix: K, or None for I.
          weights: of the corrupted streams.
        """
        kernel = None if matrix is None else jnp.asarray(matrix, jnp.float32)
        mixture = jnp.asarray(weights, jnp.float32)
        chains = [_read_by_chain(call, walk.fixed) for call, *_ in calls]
        whole: Sums | None = None
        folds: list[Sums] = []
        for members in _folds(walk.rounds, calls[0][1].width):
            sums: Sums | None = None  # of one fold at a time: those of a wide site are large
            for round_number in members:
                value_of = walk.values_at(round_number, number)
                index, mask = walk.rounds[round_number].mine()
                for (call, form, share), chain in zip(calls, chains, strict=True):
                    other = () if call.chain is None else (value_of(call.other),)
                    valid = tuple(value_of(v) for v in call.valid[part : part + 1])
                    inputs = (value_of(call.x), other, chain, kernel, mixture, index.astype(np.int32), mask, valid)
                    leaves = [np.asarray(leaf) for leaf in self._program(call, form)(*inputs)]
                    for device in range(len(mask)):
                        sums = joined(sums, weighted(Sums(*(leaf[device] for leaf in leaves)), share))
            if sums is not None:
                sums = of_all_hosts(sums)
                whole = joined(whole, sums)
                if self._wants_folds:
                    folds.append(sums._replace(square=sums.square.astype("f4"), cross=sums.cross.astype("f4")))
        if whole is None:
            raise DataError("There are no images to measure on.")
        return whole, folds

    def _program(self, call: Call, form: Form) -> Callable[..., Any]:
        """Returns (x, q, what L reads, K, weights, index, mask, what counts) ↦ `Sums`, on all devices."""
        streams = self._count[0]

        def run(x: Any, other: Any, fixed: Any, matrix: Any, weights: Any, index: Any, mask: Any, valid: Any) -> Any:
            delta = None
            if call.chain is not None:
                (q,) = other
                by_stream = q.reshape(streams, -1, *q.shape[1:])
                delta = call.correction(fixed, (by_stream[:1] - by_stream).reshape(q.shape))
                delta = delta[delta.shape[0] // streams :]
            return chunk_sums(form, x, matrix, delta, weights, index, mask, *valid)

        key = (form, call.chain and call.chain.key, call.sign, call.y.aval.str_short(), bool(call.valid))
        if key not in self._programs:
            self._programs[key] = devices.on_devices(run, in_axes=(0, 0, None, None, None, 0, 0, 0))
        return self._programs[key]


def _read_by_chain(call: Call, fixed: Mapping[Any, Any]) -> tuple[Any, ...]:
    return () if call.chain is None else tuple(jnp.asarray(fixed[v]) for v in call.chain.fixed)


def _folds(rounds: Sequence[Round], width: int) -> Iterator[list[int]]:
    """Yields the indices of the rounds of each fold on which a site so wide is judged."""
    pairs = sorted((images.fold % folds_for(width), index) for index, images in enumerate(rounds))
    for _, members in itertools.groupby(pairs, lambda pair: pair[0]):
        yield [index for _, index in members]
