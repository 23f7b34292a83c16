"""Noise schedule and reverse-step triples (Eq. 5, Eq. 7 and DDIM), all in float64.

A reverse step at time t is the map `x̂ = scale·x − gain·D(x) + sigma·z` with the denoiser D and `z ~ N(0, I)`. A *rule*
says which three numbers it uses; everything else in this package only ever sees the triples.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from drep_jax.errors import ConfigError, lookup


class ReverseStep(NamedTuple):
    """The triple of one reverse step, `x̂ = scale·x − gain·D(x) + sigma·z`."""

    scale: float
    gain: float
    sigma: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear schedule `β_t`, t = 1…T, from `beta_start` to `beta_end`; `α_t = 1 − β_t`, `ᾱ_t = Π_{s≤t} α_s`, `ᾱ_0 = 1`.

    The paper trains with T = 1000 and leaves the end point open; DDPM (Ho et al., 2020) uses 0.02, the authors' released
    code 0.002, which is the default here.

    Raises:
      ConfigError: unless T ≥ 1 and 0 < beta_start ≤ beta_end < 1.

    >>> round(Schedule(timesteps=1000, beta_end=0.02).alpha_bar(1000), 8)
    4.036e-05
    """

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.002

    def __post_init__(self) -> None:
        if isinstance(self.timesteps, bool) or not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ConfigError(f"Schedule.timesteps must be a whole number of at least 1, got {self.timesteps!r}.")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ConfigError(
                "A schedule needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start!r}, beta_end={self.beta_end!r}."
            )

    @functools.cached_property
    def betas(self) -> Float[np.ndarray, "T"]:
        """β_1…β_T."""
        return np.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=np.float64)

    @functools.cached_property
    def alpha_bars(self) -> Float[np.ndarray, "T+1"]:
        """ᾱ_0…ᾱ_T, so that entry t is ᾱ_t."""
        return np.concatenate([[1.0], np.cumprod(1.0 - self.betas)])

    def check(self, t: int) -> int:
        """Returns `t`, or raises `ConfigError` when it is no time step of this schedule."""
        number = isinstance(t, numbers.Real) and not isinstance(t, bool)
        if not number or not 1 <= t <= self.timesteps or int(t) != t:
            raise ConfigError(f"Time step t={t!r} lies outside 1…{self.timesteps} of this schedule.")
        return int(t)

    def beta(self, t: int) -> float:
        """β_t."""
        return float(self.betas[self.check(t) - 1])

    def alpha(self, t: int) -> float:
        """α_t = 1 − β_t."""
        return 1.0 - self.beta(t)

    def alpha_bar(self, t: int) -> float:
        """ᾱ_t; t = 0 is allowed and gives 1."""
        return float(self.alpha_bars[0 if t == 0 else self.check(t)])

    def c1(self, t: int) -> float:
        """C1(t) = (1 − α_t) / (√α_t · √(1 − ᾱ_t)), the gain on the predicted noise (Eq. 5)."""
        return self.beta(t) / math.sqrt(self.alpha(t) * (1.0 - self.alpha_bar(t)))

    def posterior_variance(self, t: int) -> float:
        """σ_t² = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · β_t (DDPM, Eq. 7)."""
        return (1.0 - self.alpha_bar(t - 1)) / (1.0 - self.alpha_bar(t)) * self.beta(t)


def _ddpm(schedule: Schedule, t: int) -> ReverseStep:
    return ReverseStep(1.0 / math.sqrt(schedule.alpha(t)), schedule.c1(t), math.sqrt(schedule.posterior_variance(t)))


def _paper(schedule: Schedule, t: int) -> ReverseStep:
    return ReverseStep(1.0, schedule.c1(t), schedule.posterior_variance(t))


def _ddim(schedule: Schedule, t: int, r: int | None = None) -> ReverseStep:
    r = t - 1 if r is None else r
    if not 0 <= r < t:
        raise ConfigError(f"Rule ddim goes from t={t} down to r with 0 <= r < t, got r={r}.")
    at, ar = schedule.alpha_bar(t), schedule.alpha_bar(r)
    return ReverseStep(math.sqrt(ar / at), math.sqrt(ar * (1.0 - at) / at) - math.sqrt(1.0 - ar), 0.0)


def _affine(schedule: Schedule, t: int) -> ReverseStep:
    del schedule, t
    return ReverseStep(1.0, 1.0, 0.0)


RULES: dict[str, Callable[..., ReverseStep]] = {"ddpm": _ddpm, "paper": _paper, "ddim": _ddim, "affine": _affine}


def _parse(rule: str) -> tuple[str, dict[str, int]]:
    name, colon, target = rule.partition(":")
    lookup(RULES, name, "reverse-step rule")
    if not colon:
        return name, {}
    if name != "ddim" or not target.isdecimal():
        raise ConfigError(f'Rule "{rule}" is not understood: only ddim takes a target, as in "ddim:0".')
    return name, {"r": int(target)}


def reverse_step(schedule: Schedule, t: int, rule: str = "ddpm") -> ReverseStep:
    """Returns the triple (scale, gain, sigma) of one reverse step at time t.

    | rule | scale | gain | sigma |
    |---|---|---|---|
    | `ddpm` (Eq. 5) | 1/√α_t | C1(t) | σ_t |
    | `paper` (Eq. 7 as printed) | 1 | C1(t) | σ_t² |
    | `ddim` (t to t − 1), `ddim:r` (t to r; r = 0 is the clean estimate) | √(ᾱ_r/ᾱ_t) | √(ᾱ_r(1−ᾱ_t)/ᾱ_t) − √(1−ᾱ_r) | 0 |
    | `affine` (the denoiser *is* I − A of a given map A) | 1 | 1 | 0 |

    Raises:
      ConfigError: for an unknown rule, t outside 1…T, or r outside 0…t − 1.
    """
    name, options = _parse(rule)
    return RULES[name](schedule, schedule.check(t), **options)


def reverse_steps(schedule: Schedule, t: int, steps: int = 1, rule: str = "ddpm") -> Float[np.ndarray, "steps 3"]:
    """Returns the triples of `steps` consecutive reverse steps at t, t − 1, …, t − steps + 1, largest t first.

    Raises:
      ConfigError: when a step would leave 1…T, or when a rule that is a single jump (`affine`, `ddim:r`) is given
        more than one step.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ConfigError(f"The number of steps must be a whole number of at least 1, got {steps!r}.")
    name, options = _parse(rule)
    if steps > 1 and (name == "affine" or options):
        raise ConfigError(f'Rule "{rule}" is one single step; it cannot be taken {steps} times.')
    if t - steps + 1 < 1:
        raise ConfigError(f"{steps} steps down from t={t} would end below t=1.")
    return np.array([reverse_step(schedule, t - j, rule) for j in range(steps)], dtype=np.float64)
