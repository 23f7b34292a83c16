"""Random numbers of one image's place in the endless stream of training images: raw Philox words, by purpose.

Word w of the position p under a purpose depends on (seed, purpose, p, w) alone, so that batches, hosts, threads and resuming
change nothing. Raw words are used because NumPy promises that those stay the same from one release to the next.
"""

import numpy as np

# Orders of the images are keyed (seed, epoch) and augmentations (seed, one of these), so the two never share numbers.
FLIP_AND_SHIFT = 2**64 - 1


CROP = 2**64 - 2


RANDAUGMENT = 2**64 - 3


ERASE = 2**64 - 4


ERASE_FILL = 2**64 - 5


MIX = 2**64 - 6


IDENTITIES = 2**64 - 7  # the order of identities in batches of P x K


RESTS = 2**64 - 8  # which of them rest in a round


INSTANCES = 2**64 - 9  # the order of the images of one identity


WORDS = 4
"""Words that one step of Philox' counter gives."""


def words(seed: int, purpose: int, first_position: int, count: int, blocks: int = 1) -> np.ndarray:
    """Returns the words of `count` positions in a row.

    Args:
      seed: of the stage.
      purpose: one of this module's.
      first_position: of the first image.
      count: how many images.
      blocks: groups of four words a position.

    Returns:
      uint64 (count, 4 · blocks).
    """
    found = []
    for block in range(blocks):
        counter = np.array([first_position, block, 0, 0], np.uint64)
        generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter)
        found.append(generator.random_raw(WORDS * count).reshape(count, WORDS))
    return np.concatenate(found, axis=1)


def noise(seed: int, purpose: int, position: int, size: int) -> np.ndarray:
    """Returns `size` random bytes of one position, uint8."""
    counter = np.array([0, position, 0, 0], np.uint64)
    generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter)
    return np.frombuffer(generator.random_raw(-(-size // 8)).astype("<u8").tobytes(), np.uint8)[:size]


def uniform(raw: np.ndarray) -> np.ndarray:
    """Returns float64 numbers in [0, 1) from words."""
    return (raw >> np.uint64(11)) * 2.0**-53
