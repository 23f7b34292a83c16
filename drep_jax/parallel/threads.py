"""Threads of the linear algebra on the host (NumPy's and SciPy's BLAS)."""

import contextlib
import functools

import scipy.linalg  # its own BLAS has to be loaded to be found  # noqa: F401
import threadpoolctl

WIDE = 1024
"""Width of matrices from which threads are worth their waiting.

OpenBLAS's threads wait by spinning. On a busy machine a factorization of a few milliseconds then
costs ten times its processor time.
"""


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def blas_threads_for(width: int) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which products and factors of matrices so wide run on one thread, if that is better."""
    return contextlib.nullcontext() if width > WIDE else _blas().limit(limits=1, user_api="blas")
