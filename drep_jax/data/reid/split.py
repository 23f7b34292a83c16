"""Splits of identities into training and test, and of test images into queries and gallery."""

import hashlib
from collections.abc import Collection, Sequence
from fractions import Fraction

from drep_jax.data.reid.listing import Entry, in_order
from drep_jax.errors import ConfigError, DataError


def hashed(identity: str, seed: int) -> int:
    """Returns a hash of an identity's name and the seed, from 0 to 2⁶⁴ − 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode("utf-8", "surrogateescape")).digest()[:8], "big")


def drawn_by_hash(identities: Collection[str], share: Fraction, seed: int, where: str) -> set[str]:
    """Returns the test identities: about that fraction, by a hash of the name.

    So new identities move no old one.

    Raises:
      DataError: when all fall into one part.
    """
    chosen = {identity for identity in identities if hashed(identity, seed) < share * 2**64}
    if not chosen or len(chosen) == len(identities):
        raise DataError(
            f"{where}: all {len(identities)} identities fall into the {'test' if chosen else 'training'} part. Give more "
            "identities, another seed or fraction (the options seed and test), or say which images are train, query and "
            "gallery."
        )
    return chosen


def drawn_exactly(identities: Collection[str], share: Fraction, seed: int) -> set[str]:
    """Returns the test identities of a seeded draw: that fraction, at least one, and not all."""
    ranked = sorted(identities, key=lambda identity: hashed(identity, seed))
    return set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])


def held_out(identities: Collection[str], share: Fraction) -> set[str]:
    """Returns the identities of the validation split: evenly spread, as every tenth for 0.1.

    Where a fraction above 0 comes to none, it is the last one.
    """
    names = in_order(identities)
    chosen = {name for place, name in enumerate(names) if (place + 1) * share // 1 > place * share // 1}
    return chosen or ({names[-1]} if share and len(names) > 1 else set())


def query_and_gallery(entries: Sequence[Entry]) -> list[Entry]:
    """Returns queries, the first image of each identity and camera, then the rest of the gallery.

    The only image of an identity by a camera is also in the gallery, since queries of other cameras
    look for it.
    """
    cameras = {entry.camera for entry in entries}
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.identity, entry.camera), []).append(entry)
    alone_counts = len(cameras) > 1
    queries = [group[0]._replace(query=True, gallery=alone_counts and len(group) == 1) for group in groups.values()]
    firsts = {query.where for query in queries}
    return queries + [entry._replace(gallery=True) for entry in entries if entry.where not in firsts]


def share_of(text: str, name: str) -> Fraction:
    """Returns an option that is a fraction of the identities, from 0 to below 1.

    Raises:
      ConfigError: for anything else.
    """
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share < 1:
        raise ConfigError(f'The option {name}="{text}" is a fraction of the identities: a number from 0 to below 1.')
    return share


def seed_of(text: str) -> int:
    """Returns an option that is a seed.

    Raises:
      ConfigError: for anything but a whole number of at least 0.
    """
    if not text.isdecimal():
        raise ConfigError(f'The option seed="{text}" is a whole number of at least 0.')
    return int(text)
