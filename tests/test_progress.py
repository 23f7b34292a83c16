"""Bars: they iterate over everything, and one whose step is long is drawn while the step runs."""

import time

from drep_jax import progress


def test_a_bar_yields_everything_and_is_silent_when_not_shown(capsys):
    assert list(progress.bar(range(5), "work", 5, "step", shown=False)) == list(range(5))
    assert capsys.readouterr().err == ""
    assert list(progress.bar(range(5), "work", 5, "step", shown=True, delay=0.0)) == list(range(5))
    assert "work: 100%" in capsys.readouterr().err


def test_a_long_step_shows_that_time_passes(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PULSE", 0.02)
    with progress.pulsing("solving", 2, "mixture", shown=True) as steps:
        time.sleep(1.3)
        steps.update()
    lines = capsys.readouterr().err.split("\r")
    assert any("00:01" in line and " 0/2 " in line for line in lines), "drawn again before the first step has ended"
    assert " 1/2 " in lines[-1]


def test_a_silent_pulse_draws_nothing_and_ends_its_thread(capsys):
    with progress.pulsing("solving", 1, "mixture", shown=False) as steps:
        steps.update()
    assert capsys.readouterr().err == ""
