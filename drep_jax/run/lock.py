"""The lock of a work directory: one process writes, or any number read, and a process that dies lets go of it."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator

from drep_jax.errors import CheckpointError

LOCK = "lock"
"""Its file. It stays there: the lock is the system's on the open file, and not that the file exists."""


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def writing(workdir: str) -> Iterator[None]:
    """Keeps every other process out of a work directory, which is there and writable, for as long as the block runs.

    Raises:
      CheckpointError: if another process is there; says which, where and since when.
    """
    with _locked(workdir, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as file:
        if file is None:
            yield
            return
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
        }
        _write(file, json.dumps(owner) + "\n")
        try:
            yield
        finally:
            _write(file, "")


@contextlib.contextmanager
def reading(workdir: str) -> Iterator[None]:
    """Keeps writers out of a work directory for as long as the block runs; other readers may come.

    Raises:
      CheckpointError: if a process writes there.
    """
    with _locked(workdir, os.O_RDONLY, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _locked(workdir: str, flags: int, kind: int) -> Iterator[int | None]:
    """Yields the open file of the lock, or None where there can be none."""
    path = os.path.join(workdir, LOCK)
    try:
        file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # nobody has ever written there under a lock
        yield None
        return
    except OSError as error:
        raise CheckpointError(f"Cannot open {path}: {error.strerror}. Choose another --workdir.") from error
    try:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(_occupied(workdir, file)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"Cannot lock {path}: {error.strerror}.") from error
            print(
                f"The file system of {workdir} has no locks ({error.strerror}): see to it yourself that no two runs are in "
                "one work directory.",
                file=sys.stderr,
            )
            yield None
            return
        yield file
    finally:
        os.close(file)


def _write(file: int, text: str) -> None:
    """Replaces what the file holds; a note for others, so a full disk does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)


def _occupied(workdir: str, file: int) -> str:
    """Returns the message for those who come second."""
    try:
        owner = json.loads(os.pread(file, 65536, 0))
        told = "process {pid} on {host}, since {since}: {command}".format(**owner)
    except (ValueError, KeyError, TypeError):
        told = "a process that reads it"
    return f"{workdir} is in use by {told}\nWait for it, stop it (kill -TERM saves first), or choose another --workdir."
