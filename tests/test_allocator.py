"""The benchmarks' allocator setting: freed memory is used again without a fault for each page."""

import platform
import subprocess
import sys

import pytest

from benchmarks import allocator

FAULTS = """
import resource, sys
from benchmarks.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * 50_000_000  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(kept, touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_second_block_of_the_same_size_costs_no_page_faults():
    kept, faults = _run("keep")
    assert kept == "True"
    assert int(faults) < 100
    _, faults = _run("plain")
    assert int(faults) > 20  # few if the system has huge pages


def _run(how):
    return subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    ).stdout.split()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
