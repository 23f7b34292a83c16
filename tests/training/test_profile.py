"""Traces of training steps."""

import os

import jax
import jax.numpy as jnp
import pytest

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.training.profile import Profile, parse_profile


def steps_of(trace, first, last):
    for number in range(first, last + 1):
        trace.before(number)
        result = jax.jit(jnp.sin)(jnp.float32(number))
        trace.after(number, result)


def traces(place):
    return [os.path.join(folder, name) for folder, _, files in os.walk(place) for name in files]


def test_the_steps_asked_for_are_traced(tmp_path, capsys):
    trace = parse_profile("3:2", str(tmp_path)).of_stage("control", 0, 9)
    steps_of(trace, 1, 3)
    assert trace._on
    steps_of(trace, 4, 9)
    assert not trace._on
    found = [path for path in traces(tmp_path / "profile" / "control") if path.endswith(".xplane.pb")]
    assert len(found) == 1 and os.path.getsize(found[0]) > 1000
    assert "Trace of steps 3 to 4: tensorboard --logdir" in capsys.readouterr().out


def test_a_stage_that_ends_earlier_ends_the_trace(tmp_path):
    trace = Profile(2, 100, str(tmp_path)).of_stage("control", 0, 3)
    steps_of(trace, 1, 3)
    assert not trace._on and traces(tmp_path)
    trace.close()  # again changes nothing


@pytest.mark.parametrize("start, steps, reason", [(0, 4, "has 4 steps"), (7, 20, "goes on from step 7")])
def test_a_stage_without_such_a_step_says_so(start, steps, reason, tmp_path, capsys):
    assert Profile(5, 1, str(tmp_path)).of_stage("control", start, steps) is None
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3", "3:", "0:2", "2:0", "-1:2", "a:b", "1:2:3"])
def test_anything_but_first_and_count_is_refused(text):
    with pytest.raises(ConfigError, match="is not FIRST:COUNT"):
        parse_profile(text, "")


def test_none_is_asked_for_by_nothing():
    assert parse_profile("", "") is None


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Cannot write a trace to .*profile/s: Not a directory"):
        Profile(1, 1, str(tmp_path)).of_stage("s", 0, 2).before(1)
