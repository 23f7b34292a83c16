"""train.py and fuse.py as a user runs them, in this process or in one of their own, and what their runs leave behind."""

import contextlib
import io
import os
import pathlib
import resource
import runpy
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
from absl import app, flags

import drep_jax.data.loader  # noqa: F401  (grain defines flags when it is first imported; `call` would remove them)
from drep_jax.parallel import session
from drep_jax.run.run import Run

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = f"--config={ROOT / 'tests' / 'tiny_config.py'}"


@contextlib.contextmanager
def whole_reports(drawn=True):
    """Jobs inside draw their plots, if so, and time their networks, which the other jobs of the tests do not."""
    from drep_jax import report
    from drep_jax.jobs import findings, train
    from drep_jax.report import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PLOTS", plots.PLOTS if drawn else {})
        patch.setattr(train, "measure_cost", findings.measure_cost)
        yield


class Finished(NamedTuple):
    """A finished run, see the fixture of that name."""

    config: dict[str, Any]
    directory: str
    report: dict[str, Any]
    setup: Any
    variables: Any
    denoise: Any
    backbone: str

    @property
    def run(self):
        """The run as jobs take it."""
        return Run(self.config, self.setup, self.directory)


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    messages: str

    def refused(self, *expected):
        """Checks that bad input was answered by one message without a traceback that holds all of `expected`."""
        assert self.status == 1, (self.status, self.output, self.messages)
        assert self.messages.count("Error: ") == 1 and "Traceback" not in self.messages, self.messages
        for text in expected:
            assert text in self.messages, self.messages


def call(script, *arguments):
    """Runs a script in this process, with fresh flags."""
    app.define_help_flags()
    known, argv = set(flags.FLAGS), sys.argv
    output, messages = io.StringIO(), io.StringIO()
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(messages),
            mock.patch.object(session, "end_process", sys.exit),  # which would end the tests
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return Ended(end.value.code or 0, output.getvalue(), messages.getvalue())


def start(script, *arguments, devices=8, before=""):
    """Runs a script in a process of its own, after the statements `before`, which may damage or interrupt it."""
    code = f"import runpy, sys\nsys.argv = sys.argv[1:]\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, the system refuses to write more than `size` bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def same_bits(one, two):
    """Whether two trees have the same structure, types and bits."""
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (one, two)]
    if [path for path, _ in leaves[0]] != [path for path, _ in leaves[1]]:
        return False
    arrays = [[np.asarray(leaf) for _, leaf in side] for side in leaves]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(*arrays, strict=True))


def largest_difference(one, two):
    """The largest absolute difference of two trees' numbers."""
    differences = jax.tree_util.tree_map(lambda a, b: np.abs(np.asarray(a, np.float64) - np.asarray(b)).max(), one, two)
    return max(jax.tree_util.tree_leaves(differences))
