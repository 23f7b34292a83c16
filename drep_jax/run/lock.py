"""The lock of a work directory: one writer or any number of readers.

A process that dies releases it.
"""

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
"""Name of its file, which stays there: locked is the open file, not the name."""


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def writing(workdir: str) -> Iterator[None]:
    """Locks an existing, writable work directory against all other processes while the block runs.

    Raises:
      CheckpointError: if another process has a lock; names the process, its host and its start.
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
    """Locks a work directory against writers while the block runs; other readers are allowed.

    Raises:
      CheckpointError: if a process writes there.
    """
    with _locked(workdir, os.O_RDONLY, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _locked(workdir: str, flags: int, kind: int) -> Iterator[int | None]:
    """Yields the file descriptor of the lock, or None if there can be no lock."""
    path = os.path.join(workdir, LOCK)
    try:
        file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # no writer has ever locked this directory
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
                f"The file system of {workdir} has no locks ({error.strerror}). Make sure that no two runs use this work "
                "directory at the same time.",
                file=sys.stderr,
            )
            yield None
            return
        yield file
    finally:
        os.close(file)


def _write(file: int, text: str) -> None:
    """Replaces the contents of the file, which only inform others: a full disk does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)


def _occupied(workdir: str, file: int) -> str:
    """Returns the message for a process that finds the directory locked."""
    try:
        owner = json.loads(os.pread(file, 65536, 0))
        user = "process {pid} on {host}, since {since}: {command}".format(**owner)
    except (ValueError, KeyError, TypeError):
        user = "a process that reads it"
    return f"{workdir} is in use by {user}\nWait for it, stop it (kill -TERM saves first), or choose another --workdir."
