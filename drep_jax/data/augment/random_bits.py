"""Random numbers of a position in the stream of training images: raw Philox words, by purpose.

Word w of position p under a purpose depends on (seed, purpose, p, w) alone. So batches, hosts,
threads and resuming change nothing. The words are raw because NumPy keeps those the same from one
release to the next.
"""

import numpy as np

# Orders of the images are keyed (seed, epoch), augmentations (seed, one of these): the two never
# have a key in common.
FLIP_AND_SHIFT = 2**64 - 1
CROP = 2**64 - 2
RANDAUGMENT = 2**64 - 3
ERASE = 2**64 - 4
ERASE_FILL = 2**64 - 5
MIX = 2**64 - 6
IDENTITIES = 2**64 - 7  # the order of identities in batches of P x K
RESTS = 2**64 - 8  # identities that rest in a round
INSTANCES = 2**64 - 9  # the order of the images of one identity
LEFT_CLEAN = 2**64 - 10  # which images of a stage that corrupts its images stay clean
SCALE = 2**64 - 11  # random scale and the crops that follow
PHOTOMETRIC = 2**64 - 12

WORDS = 4
"""Words of one step of Philox' counter."""


def words(seed: int, purpose: int, first_position: int, count: int, blocks: int = 1) -> np.ndarray:
    """Returns the words of `count` consecutive positions.

    Args:
      seed: of the stage.
      purpose: one of this module's.
      first_position: of the first image.
      count: number of images.
      blocks: groups of four words a position.

    Returns:
      uint64 (count, 4 · blocks).
    """
    words_of_block = []
    for block in range(blocks):
        counter = np.array([first_position, block, 0, 0], np.uint64)
        generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter)
        words_of_block.append(generator.random_raw(WORDS * count).reshape(count, WORDS))
    return np.concatenate(words_of_block, axis=1)


def noise(seed: int, purpose: int, position: int, size: int) -> np.ndarray:
    """Returns `size` random bytes of one position, uint8."""
    counter = np.array([0, position, 0, 0], np.uint64)
    generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter)
    return np.frombuffer(generator.random_raw(-(-size // 8)).astype("<u8").tobytes(), np.uint8)[:size]


def uniform(raw: np.ndarray) -> np.ndarray:
    """Returns float64 numbers in [0, 1) from words."""
    return (raw >> np.uint64(11)) * 2.0**-53
