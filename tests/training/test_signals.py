"""Ctrl-C and SIGTERM: asked once, a stage saves and says so; asked twice, the system ends the process."""

import os
import signal

import pytest

from drep_jax.jobs import train
from drep_jax.training.signals import Interrupted, Terminated, hearing_signals, raising_on_sigterm
from tests.command import TINY, call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_left_to_the_system(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with hearing_signals() as stop:
        assert not stop.raised
        os.kill(os.getpid(), number)
        assert stop.raised and stop.number == number
        assert {signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_training_sigterm_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), raising_on_sigterm(list):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error, status, text",
    [
        (Interrupted("Stopped by SIGTERM in stage control after step 1 of 5", signal.SIGTERM), 75, "To go on: python"),
        (Interrupted("Stopped by Ctrl-C in stage control after step 1 of 5", signal.SIGINT), 130, "To go on: python"),
        (Terminated(), 75, "go on from the last checkpoint: python"),
        (KeyboardInterrupt(), 130, "go on from the last checkpoint: python"),
    ],
)
def test_the_exit_status_says_which_signal_it_was(error, status, text, tmp_path, monkeypatch):
    def stopped(config, directory):
        raise error

    monkeypatch.setattr(train, "run", stopped)
    ended = call("train.py", TINY, f"--workdir={tmp_path}")
    assert ended.status == status and text in ended.messages and "Traceback" not in ended.messages, ended
    assert str(error) in ended.messages
