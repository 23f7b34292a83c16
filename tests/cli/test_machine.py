"""What a machine may lack: a home, docstrings, devices, memory, space. No traceback, and no folder called `~`."""

import contextlib
import errno
import os
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from drep_jax import files
from drep_jax.cli import machine
from drep_jax.core import interceptor
from drep_jax.data.folder import list_images, open_folder, split_folders
from drep_jax.data.reid import own_folder
from drep_jax.errors import ConfigError
from drep_jax.jobs import train
from drep_jax.parallel import devices, processes, session
from drep_jax.training.signals import Terminated, raising_on_sigterm
from tests.command import ROOT, TINY, call


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME, and a user that the list of users does not have."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    monkeypatch.chdir(tmp_path)


def test_without_a_home_no_folder_is_called_tilde(homeless, tmp_path, monkeypatch, capsys):
    assert files.home() is None
    monkeypatch.delenv(machine.CACHE, raising=False)
    before = jax.config.jax_compilation_cache_dir
    machine.choose_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert "Without a home directory" in capsys.readouterr().err
    for path in ("~", "~/runs/digits", "~nobody_of_this_name/x"):
        with pytest.raises(ConfigError, match=r"the home directory ~.* is unknown"):
            files.expanded(path)
    call("train.py", TINY, "--workdir=~/run").refused("~/run", "Set HOME")
    call("train.py", TINY, f"--workdir={tmp_path}/run", "--config.data.source=folder:~/photos").refused("~/photos")
    call("fuse.py", "--workdir=~/run").refused("~/run", "Set HOME")
    assert os.listdir(tmp_path) == []


def test_a_home_is_found_in_paths_that_the_shell_leaves_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.home() == str(tmp_path) and files.expanded("~/a") == str(tmp_path / "a")
    assert files.expanded("./~/a") == "./~/a" and files.expanded("") == ""
    call("fuse.py", "--workdir=~/none").refused(f"{tmp_path}/none is no finished run")


def test_help_is_the_same_without_docstrings():
    for script in ("train.py", "fuse.py"):
        names = {"__file__": str(ROOT / script)}
        text = machine.docstring_of({**names, "__doc__": None})
        assert text.startswith(("Learns DenoiseRep", "Fuses the denoisers")) and "Exit status" in text
    assert machine.docstring_of({"__doc__": "given"}) == "given"


def test_an_interceptor_ends_where_flax_leaves_it(monkeypatch):
    """Under `python -O` the assertion that takes it away is not run."""
    stack = nn.module._global_interceptor_stack

    class Left:
        def __init__(self, added):
            stack.push(added)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            return False

    monkeypatch.setattr(nn, "intercept_methods", Left)
    with interceptor.intercepting(lambda call, args, kwargs, context: call(*args, **kwargs) + 1.0):
        assert len(stack) == 1
        assert (
            nn.Dense(1, kernel_init=nn.initializers.zeros).init_with_output(jax.random.key(0), jnp.ones((1, 1)))[0] == 1
        )
    assert len(stack) == 0


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cdua': unknown.")])
def test_devices_that_are_not_there_are_a_message(error, monkeypatch):
    def absent():
        raise error

    monkeypatch.setattr(jax, "local_devices", absent)
    with pytest.raises(ConfigError, match=r"JAX cannot use the devices of JAX_PLATFORMS=.*JAX_PLATFORMS=cpu"):
        devices.check_platform()


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "", "/disk/x"), ["No space left on device: /disk/x", "Free some space"]),
        (OSError(errno.EACCES, "", "/disk/x"), ["Permission denied: /disk/x", "readable and writable"]),
        (OSError(errno.EMFILE, "", "/disk/x"), ["Too many open files", "ulimit -n"]),
        (OSError(errno.EIO, ""), ["Input/output error", "Check the disk"]),
        (OSError(errno.EXDEV, "", "/disk/x"), ["/disk/x", "Complete files are untouched"]),
        (MemoryError(), ["Out of memory", "denoise.batch_size"]),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            ["allocating 9 bytes", "moment_gib"],
        ),
    ],
)
def test_what_the_machine_refuses_is_a_message(error, expected, tmp_path, monkeypatch):
    def failing(config, directory):
        raise error

    monkeypatch.setattr(train, "run", failing)
    call("train.py", TINY, f"--workdir={tmp_path}").refused(*expected)


def test_other_errors_keep_their_traceback():
    assert machine.explained(RuntimeError("a bug")) == "" and machine.explained(OSError("no number")) == ""


def test_a_command_that_was_broken_off_leaves_without_the_interpreters_farewell(monkeypatch):
    """XLA's threads may still compile: destroying what they use was a segmentation fault, 139 instead of 75."""
    ended = []
    monkeypatch.setattr(session.os, "_exit", ended.append)
    assert processes.leave(0) == 0 and ended == []
    for status in (75, 130, 1):
        processes.leave(status)
    assert ended == [75, 130, 1]


def test_a_dropped_sigterm_ends_the_process_later():
    lost, ended = threading.Event(), []

    def otherwise():
        ended.append(75)
        lost.set()

    with raising_on_sigterm(otherwise, grace=0.05):
        with contextlib.suppress(Terminated):  # as a destructor would drop it
            os.kill(os.getpid(), 15)
        assert lost.wait(5)
    assert ended == [75]
    with pytest.raises(Terminated), raising_on_sigterm(otherwise, grace=30):
        os.kill(os.getpid(), 15)
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_links_that_lead_back_are_not_followed(tmp_path):
    root = tmp_path / "images"
    for name in ("train/anna/c1_0.png", "train/anna/c2_1.png", "train/ben/c1_0.png", "train/ben/c2_1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    before = list_images(root / "train")
    (root / "back").symlink_to(root, target_is_directory=True)
    (root / "train" / "up").symlink_to("..", target_is_directory=True)
    (root / "train" / "anna" / "again").symlink_to("../../train", target_is_directory=True)
    (root / "train" / "self.png").symlink_to("self.png")
    images, ignored = list_images(root / "train")
    assert images == before[0] and ignored == before[1] + 3
    assert list(split_folders(root)) == ["train"]
    assert len(list(own_folder._below(root / "train"))) == 4
    (root / "train" / "carl").symlink_to(root / "train" / "ben", target_is_directory=True)  # no loop: followed
    assert len(list_images(root / "train")[0]) == 6
    source = open_folder(str(root), "train", (8, 8), "fill", None)
    assert source.class_names == ("anna", "ben", "carl") and "Ignored" in source.note
