"""What waits between sites: how much of it, and that its memory goes back to the system."""

import ml_dtypes
import numpy as np
import pytest

from drep_jax.core.chunks import PAGES, Waiting, apart
from tests.conftest import resident


def arrays(*sizes):
    return {str(number): np.full(size, number, np.int8) for number, size in enumerate(sizes)}


def test_a_round_waits_only_if_it_fits_instead_of_what_is_held_of_it():
    waiting = Waiting(10)
    assert waiting.put(0, 0, 6, arrays(6)) and waiting.used == 6
    assert not waiting.put(1, 0, 5, arrays(5))
    assert waiting.get(1) == (-1, {}) and waiting.used == 6
    assert waiting.put(0, 3, 10, arrays(6, 4)) and waiting.used == 10
    cut, held = waiting.get(0)
    assert cut == 3 and {name: value.tolist() for name, value in held.items()} == {"0": [0] * 6, "1": [1] * 4}
    assert waiting.earliest(1) == 3 and waiting.earliest(2) == -1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("size", [0, 3, PAGES])
def test_what_waits_is_a_copy_with_the_same_bits(size, dtype):
    value = np.arange(size).astype(dtype).reshape(-1, 1)
    for spare in ([], [np.zeros((1, size), dtype)], [np.zeros(value.nbytes, np.int8)]):
        copy = apart(value, spare)
        assert copy.shape == value.shape and copy.dtype == value.dtype and copy.tobytes() == value.tobytes()
        assert copy.flags.writeable and not np.shares_memory(copy, value) and not spare


def test_memory_is_used_again_only_where_nobody_reads_it():
    """Of the old values one goes on as it is, one is what a new value looks at, and one can be overwritten."""
    waiting = Waiting(100)
    waiting.put(0, 0, 24, arrays(8, 8, 8))
    _, old = waiting.get(0)
    seen = {"0": old["0"], "new": np.arange(8, dtype=np.int8), "view": old["1"][:]}
    waiting.put(0, 1, 24, seen)
    _, held = waiting.get(0)
    assert held["0"] is old["0"] and np.shares_memory(held["new"], old["2"])
    assert held["new"].tolist() == list(range(8)) and held["view"].tolist() == [1] * 8
    assert not np.shares_memory(held["view"], old["1"])


@pytest.mark.skipif(not resident(), reason="the system does not say how much memory a process has")
def test_memory_of_what_is_dropped_goes_back_whatever_lies_between():
    """glibc's heap keeps every second block of these until the others are freed, once it has seen a larger one freed."""
    np.ones(30 * 2**20, np.uint8)
    value = np.ones(PAGES // 4, np.float32)
    before = resident()
    held = [apart(value, []) for _ in range(128)]
    full = resident() - before
    assert full > 0.9 * len(held) * PAGES / 2**30
    held = held[::2]
    assert resident() - before < 0.6 * full
    assert all((one == 1).all() for one in held)
