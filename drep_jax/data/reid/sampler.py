"""Batches of P identities with K images each (Hermans et al., 2017), as an order of the images.

The order depends on (seed, epoch) alone.

In a round every identity takes part once, except (number
of identities) mod P that rest. Those are the next ones of an endless cycle through a fixed random
order, so that identities take part equally often, to within one. An identity of n images brings all
of them K // n times, and K mod n more: at its u-th time the u-th group of an endless stream of
permutations, without repeats in a group. So its images are used equally often, and repeat as rarely
as possible.
"""

import math
from collections.abc import Sequence

import numpy as np

from drep_jax.data.augment.random_bits import IDENTITIES, INSTANCES, RESTS
from drep_jax.data.reid.listing import counted, few
from drep_jax.errors import ConfigError, DataError

SINGLETONS = ("refuse", "drop")


def identity_order(
    labels: np.ndarray,
    identities: int,
    instances: int,
    seed: int,
    epoch: int,
    *,
    singletons: str = "refuse",
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Returns the images of one epoch: blocks of P·K, each of P identities with K images each.

    Args:
      labels: identity of every image, whole numbers from 0, (n,).
      identities: P, identities a block.
      instances: K, images an identity.
      seed: of the order, at least 0.
      epoch: from 0.
      singletons: what to do with singletons, identities of one image: "refuse" or "drop".
      names: of the identities, for messages.

    Returns:
      int32 (epoch_length,): indices of images; the K of an identity are consecutive.

    Raises:
      ConfigError: for P or K below 2, and for more identities a block than there are.
      DataError: for singletons, where they are refused.
    """
    members = _members(labels, identities, instances, singletons, names)
    taking = len(members) // identities * identities
    rounds = _rounds(sum(map(len, members.values())), taking * instances)
    order = []
    for turn in range(epoch * rounds, (epoch + 1) * rounds):
        for identity, times in _taking_part(list(members), identities, seed, turn):
            images = members[identity]
            order.append(images[_group(len(images), instances, seed, identity, times)])
    return np.concatenate(order).astype(np.int32)


def epoch_length(
    labels: np.ndarray,
    identities: int,
    instances: int,
    *,
    singletons: str = "refuse",
    names: Sequence[str] | None = None,
) -> int:
    """Returns the images an epoch: whole rounds, as near to the number of images as can be.

    Args and Raises: as for `identity_order`.
    """
    members = _members(labels, identities, instances, singletons, names)
    block = len(members) // identities * identities * instances
    return _rounds(sum(map(len, members.values())), block) * block


def _rounds(images: int, size: int) -> int:
    return max(1, round(images / size))


def _members(
    labels: np.ndarray, identities: int, instances: int, singletons: str, names: Sequence[str] | None
) -> dict[int, np.ndarray]:
    """Returns the images of every identity that takes part."""
    if identities < 2 or instances < 2:
        raise ConfigError(
            f"Batches of P identities with K images each need P and K of at least 2, so that there are other identities and "
            f"other images of the same one; got P={identities} and K={instances}."
        )
    if singletons not in SINGLETONS:
        raise ConfigError(f'Identities of one image are left out ("drop") or refused ("refuse"); got "{singletons}".')
    by_label = np.argsort(labels, kind="stable")
    distinct, starts = np.unique(np.asarray(labels)[by_label], return_index=True)
    members = dict(zip(map(int, distinct), np.split(by_label, starts[1:]), strict=True)) if len(labels) else {}
    alone = [label for label, images in members.items() if len(images) == 1]
    if alone and singletons == "refuse":
        first = few([names[label] if names is not None else str(label) for label in alone])
        raise DataError(
            f"{counted(len(alone), 'identity has', 'identities have')} one image only, and so no second image to learn "
            f'from: {first}. Give more images, or leave them out with the setting singletons="drop".'
        )
    members = {label: images for label, images in members.items() if len(images) > 1}
    if len(members) < identities:
        raise ConfigError(
            f"Batches of P={identities} identities need as many, but there are {len(members)} with two images or more."
        )
    return members


def _taking_part(labels: list[int], identities: int, seed: int, turn: int) -> list[tuple[int, int]]:
    """Returns the identities of a round in order, each with its number of rounds before."""
    count = len(labels)
    resting = count % identities
    cycle = np.argsort(_words(seed, RESTS, 0, 0, count), kind="stable")
    places = np.empty(count, np.int64)
    places[cycle] = np.arange(count)
    # The identity at a place of the cycle has rested once for each number below turn · resting that
    # is its place modulo count.
    rested_before = -(-(turn * resting - places) // count)
    rests = -(-((turn + 1) * resting - places) // count) > rested_before
    shuffled = np.argsort(_words(seed, IDENTITIES, turn, 0, count), kind="stable")
    return [(labels[i], turn - int(rested_before[i])) for i in shuffled if not rests[i]]


def _group(images: int, instances: int, seed: int, identity: int, times: int) -> np.ndarray:
    """Returns the ranks of the images that an identity brings the `times`-th time, (instances,)."""
    more = instances % images
    whole = np.tile(np.arange(images), instances // images)
    if not more:
        return whole
    # After this number of groups the stream is at the end of a permutation; what follows depends on
    # nothing before.
    groups = images // math.gcd(images, more)
    chapter, place = divmod(times, groups)
    words = _words(seed, INSTANCES, chapter, identity, groups * more)
    stream: list[int] = []
    for permutation in np.argsort(words.reshape(-1, images), axis=1, kind="stable").tolist():
        cut = stream[len(stream) - len(stream) % more :]  # of a group that is not full yet: no image twice
        fresh = [image for image in permutation if image not in cut]
        missing = (more - len(cut)) % more
        ahead = set(fresh[:missing])
        stream += fresh[:missing] + [image for image in permutation if image not in ahead]
    return np.concatenate([whole, stream[place * more : (place + 1) * more]]).astype(np.int64)


def _words(seed: int, purpose: int, turn: int, identity: int, count: int) -> np.ndarray:
    counter = np.array([0, turn, identity, 0], np.uint64)
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter).random_raw(count)
