"""Keeps memory that is freed, so that the next step on the CPU need not ask the system for every page again.

XLA takes one block for all temporaries of a program and frees it at the end. glibc gives blocks of
that size back to the system at once, and a fresh block costs a fault for each of its pages: a
quarter of a training step of ViT-S/16.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt` (malloc.h)."""


def keep_freed_memory() -> bool:
    """Tells the C library's allocator to keep what is freed for the next request.

    Call it before memory is used.

    The process then stays at the size of its peak. Other systems than Linux with glibc are left as
    they are.

    Returns:
      Whether the allocator took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    # Large blocks come from the heap, of which there is one for all threads, and the heap does not
    # shrink.
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])
