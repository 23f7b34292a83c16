"""The lock of a work directory: one writer or many readers, and whoever dies lets go."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from drep_jax.errors import CheckpointError
from drep_jax.run import lock
from tests.command import TINY, call

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_told_who_is_there(tmp_path):
    with lock.writing(str(tmp_path)):
        with pytest.raises(CheckpointError) as error, lock.writing(str(tmp_path)):
            pass
        for text in (str(tmp_path), f"process {os.getpid()} on {socket.gethostname()}, since 20", "--workdir"):
            assert text in str(error.value)
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), lock.reading(str(tmp_path)):
            pass
    with lock.writing(str(tmp_path)):
        pass


def test_readers_keep_writers_out_and_each_other_in(tmp_path):
    with lock.writing(str(tmp_path)):
        pass
    refused = pytest.raises(CheckpointError, match="in use by a process that reads it")
    with lock.reading(str(tmp_path)), lock.reading(str(tmp_path)), refused, lock.writing(str(tmp_path)):
        pass
    assert os.listdir(tmp_path) == [lock.LOCK]


def test_where_nobody_wrote_there_is_nothing_to_lock(tmp_path):
    with lock.reading(str(tmp_path)):
        assert os.listdir(tmp_path) == []


def test_a_killed_process_lets_go(tmp_path):
    path = tmp_path / lock.LOCK
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="is in use"), lock.writing(str(tmp_path)):
            pass
        other.send_signal(signal.SIGKILL)
    with lock.writing(str(tmp_path)):
        pass


def test_file_systems_without_locks_are_named_and_used(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.writing(str(tmp_path)):
        pass
    assert f"The file system of {tmp_path} has no locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_cannot_be_opened_or_taken_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run" / lock.LOCK).mkdir(parents=True)
    with (
        pytest.raises(CheckpointError, match=r"Cannot open .*lock: Is a directory"),
        lock.writing(str(tmp_path / "run")),
    ):
        pass

    def broken(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(CheckpointError, match=r"Cannot lock .*Input/output error"), lock.writing(str(tmp_path)):
        pass


def test_two_runs_in_one_work_directory_are_refused(tmp_path):
    with lock.writing(str(tmp_path)):
        call("train.py", TINY, f"--workdir={tmp_path}").refused(f"{tmp_path} is in use by process {os.getpid()}")
        call("train.py", TINY, f"--workdir={tmp_path}", "--eval_only").refused("is in use by process")
        call("fuse.py", f"--workdir={tmp_path}").refused("is in use by process")
    assert sorted(os.listdir(tmp_path)) == [lock.LOCK]
