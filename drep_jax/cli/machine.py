"""What a machine may lack: a home directory, docstrings, memory, space, permissions."""

import ast
import errno
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax

from drep_jax.files import home
from drep_jax.imports import where_raised

CACHE = "JAX_COMPILATION_CACHE_DIR"

ADVICE: dict[int, str] = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EFBIG, errno.EDQUOT), "Free some space, or write to another disk with --workdir or --out"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Make the place readable and writable for this user"),
    errno.EROFS: "Make the place writable, or write to another disk with --workdir or --out",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Wait until other processes of the machine have closed files",
    errno.ELOOP: "Remove the symbolic link that leads back to itself",
    errno.ENAMETOOLONG: "Choose shorter names",
    errno.ENOMEM: "Free some memory",
    errno.EAGAIN: "Allow more processes and threads (ulimit -u)",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "Check the disk or network file system"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "Check the path"),
}
"""What to do about an error of the operating system, by its number."""


def choose_cache() -> None:
    """Gives compiled programs a folder in the user's home, unless the environment names one.

    Without a home directory nothing is kept: a folder that others can write to would let them
    choose what this user's process runs.
    """
    if os.environ.get(CACHE) is not None:
        return
    if place := home():
        jax.config.update("jax_compilation_cache_dir", os.path.join(place, ".cache", "drep_jax", "xla"))
    else:
        print(
            "Without a home directory, compiled programs are not kept from one command to the next. Set HOME, or name a "
            f"directory for them with {CACHE}.",
            file=sys.stderr,
        )


def allow_promotion() -> None:
    """Lets types of numbers mix as JAX does by default; under the strict mode Optax's schedules fail."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")


def docstring_of(module: Mapping[str, Any]) -> str:
    """Returns a module's docstring, from its file where Python has dropped it (-OO).

    Args:
      module: the names of the module.
    """
    if module["__doc__"] is not None:
        return str(module["__doc__"])
    with open(module["__file__"], encoding="utf-8") as file:
        return ast.get_docstring(ast.parse(file.read())) or ""


def explained(error: Exception) -> str:
    """Returns what failed on this machine and what to do; "" for an error of another kind.

    Args:
      error: of the operating system, of memory, or of JAX.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        reason = (str(error).splitlines() or [""])[0][:300].rstrip(".")
        return (
            f"Out of memory{f': {reason}' if reason else ''}. Take smaller batches (denoise.batch_size, "
            "evaluate.batch_size and those of the stages with labels; accumulate keeps the effective size), bound the "
            "moments with denoise.moment_gib, or see docs/training.md."
        )
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    place = f": {error.filename}" if error.filename is not None else where_raised(error)
    advice = ADVICE.get(error.errno, "Mend that")
    return (
        f"{os.strerror(error.errno)}{place}. {advice}, then give the same command again. Complete files are untouched."
    )
