"""The schedule against an independent loop, and the identities its reverse steps must satisfy."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from drep_jax.core.schedule import RULES, Schedule, reverse_step, reverse_steps
from drep_jax.errors import ConfigError
from tests import shapes

schedules = st.builds(
    lambda timesteps, start, factor: Schedule(timesteps, start, min(0.5, start * factor)),
    st.integers(2, 300),
    st.floats(1e-5, 1e-2),
    st.floats(1.0, 50.0),
)


def naive_alpha_bar(schedule, t):
    product = 1.0
    for s in range(1, t + 1):
        slope = (schedule.beta_end - schedule.beta_start) / max(schedule.timesteps - 1, 1)
        product *= 1.0 - (schedule.beta_start + (s - 1) * slope)
    return product


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(schedules, st.data())
def test_numbers_equal_an_independent_loop(schedule, data):
    t = data.draw(st.integers(1, schedule.timesteps))
    before, now = naive_alpha_bar(schedule, t - 1), naive_alpha_bar(schedule, t)
    beta = 1.0 - now / before
    np.testing.assert_allclose(schedule.alpha_bar(t), now, rtol=1e-12)
    np.testing.assert_allclose(schedule.beta(t), beta, rtol=1e-9)
    np.testing.assert_allclose(schedule.c1(t), beta / (math.sqrt(now / before) * math.sqrt(1 - now)), rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_variance(t), (1 - before) / (1 - now) * beta, rtol=1e-7, atol=1e-15)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(schedules, st.data())
def test_ddpm_step_is_the_posterior_mean(schedule, data):
    """DDPM's posterior mean with the x0 that a noise estimate implies equals Eq. 5 without its noise."""
    t = data.draw(st.integers(1, schedule.timesteps))
    x, noise = data.draw(st.floats(-3, 3)), data.draw(st.floats(-3, 3))
    bar, before, beta, alpha = schedule.alpha_bar(t), schedule.alpha_bar(t - 1), schedule.beta(t), schedule.alpha(t)
    clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
    mean = (math.sqrt(before) * beta * clean + math.sqrt(alpha) * (1 - before) * x) / (1 - bar)
    step = reverse_step(schedule, t, "ddpm")
    np.testing.assert_allclose(step.scale * x - step.gain * noise, mean, rtol=1e-7, atol=1e-9)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(schedules, st.data())
def test_ddim_with_the_true_noise_walks_the_forward_process_back(schedule, data):
    t = data.draw(st.integers(1, schedule.timesteps))
    r = data.draw(st.integers(0, t - 1))
    clean, noise = data.draw(st.floats(-3, 3)), data.draw(st.floats(-3, 3))

    def forward(s):
        return math.sqrt(schedule.alpha_bar(s)) * clean + math.sqrt(1 - schedule.alpha_bar(s)) * noise

    step = reverse_step(schedule, t, f"ddim:{r}")
    np.testing.assert_allclose(step.scale * forward(t) - step.gain * noise, forward(r), rtol=1e-9, atol=1e-9)
    assert reverse_step(schedule, t, "ddim") == reverse_step(schedule, t, f"ddim:{t - 1}")


def test_rules_differ_as_the_paper_prints_them():
    schedule = Schedule(beta_end=0.02)
    ddpm, paper = reverse_step(schedule, 10, "ddpm"), reverse_step(schedule, 10, "paper")
    assert paper.scale == 1.0
    assert ddpm.scale == 1 / math.sqrt(schedule.alpha(10)) > 1.0
    assert ddpm.gain == paper.gain == schedule.c1(10)
    np.testing.assert_allclose(ddpm.sigma**2, paper.sigma)
    assert reverse_step(schedule, 10, "affine") == (1.0, 1.0, 0.0)
    assert reverse_step(schedule, 1, "ddpm").sigma == 0.0


def test_alpha_bar_falls_from_one():
    bars = Schedule().alpha_bars
    assert bars[0] == 1.0
    assert np.all(np.diff(bars) < 0)


def test_steps_go_down_from_the_largest():
    schedule = Schedule()
    rows = reverse_steps(schedule, 7, 3, "ddpm")
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, [reverse_step(schedule, t, "ddpm") for t in (7, 6, 5)])


@pytest.mark.parametrize("t", [0, -1, 1001, 1.5, True, math.nan, math.inf, None, "3"])
def test_time_outside_the_schedule_is_refused(t):
    with shapes.unchecked(), pytest.raises(ConfigError, match=r"1…1000"):
        reverse_step(Schedule(), t, "ddpm")


@pytest.mark.parametrize(
    "arguments",
    [(0,), (1.5,), (True,), (10, 0.0), (10, 0.02, 0.01), (10, 0.1, 1.0), (10, -0.1, 0.1), (10, math.nan, 0.1)],
)
def test_impossible_schedules_are_refused(arguments):
    with shapes.unchecked(), pytest.raises(ConfigError):
        Schedule(*arguments)


def test_unknown_rule_names_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "ddpm"'):
        reverse_step(Schedule(), 3, "dppm")
    assert set(RULES) == {"ddpm", "paper", "ddim", "affine"}


@pytest.mark.parametrize("rule", ["ddpm:1", "ddim:x", "ddim:3", "ddim:-1"])
def test_malformed_targets_are_refused(rule):
    with pytest.raises(ConfigError):
        reverse_step(Schedule(), 3, rule)


@pytest.mark.parametrize(
    ("t", "steps", "rule"), [(2, 3, "ddpm"), (5, 0, "ddpm"), (5, 2, "affine"), (5, 2, "ddim:0"), (5, 1.5, "ddpm")]
)
def test_impossible_numbers_of_steps_are_refused(t, steps, rule):
    with shapes.unchecked(), pytest.raises(ConfigError):
        reverse_steps(Schedule(), t, steps, rule)
