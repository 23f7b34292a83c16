"""Bars: they iterate over everything, and one whose step is long is drawn while the step runs."""

import threading

from drep_jax import progress


def test_a_bar_yields_everything_and_is_silent_when_not_shown(capsys, monkeypatch):
    assert list(progress.bar(range(5), "work", 5, "step", shown=False)) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    assert list(progress.bar(range(5), "work", 5, "step", shown=True)) == list(range(5))
    assert "work: 100%" in capsys.readouterr().err


class Clock:
    """Seconds that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_steps_appear_when_they_last_and_show_what_was_done(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    steps = progress.Steps("solving", 4, "site", shown=True)
    clock.now += 1.9
    steps.update(text="first")
    assert capsys.readouterr().err == "", "what is quick stays silent"
    clock.now += 1.0
    steps.draw()
    assert "solving:  25%" in (line := capsys.readouterr().err) and " 1/4 " in line and "first" in line
    steps.update(3, "last")
    steps.close()
    assert " 4/4 " in (line := capsys.readouterr().err) and "last" in line and line.endswith("\n")


def test_a_long_step_is_drawn_while_it_runs(capsys, monkeypatch):
    drawn = threading.Event()
    monkeypatch.setattr(progress, "PULSE", 0.01)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    draw = progress.Steps.draw
    monkeypatch.setattr(progress.Steps, "draw", lambda steps: (draw(steps), drawn.set()))
    with progress.pulsing("solving", 2, "mixture", shown=True) as steps:
        assert drawn.wait(30.0), "drawn again before the first step has ended"
        assert " 0/2 " in capsys.readouterr().err
        steps.update()
        assert " 1/2 " in capsys.readouterr().err
    assert " 2/2 " in capsys.readouterr().err, "what ends without an error is done"


def test_a_silent_pulse_draws_nothing_and_ends_its_thread(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    before = threading.active_count()
    with progress.pulsing("solving", 1, "mixture", shown=False) as steps:
        steps.update()
    assert capsys.readouterr().err == "" and threading.active_count() == before
