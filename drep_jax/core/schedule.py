"""The noise schedule and the numbers of a reverse step (Eq. 5, Eq. 7 and DDIM), all in float64.

A reverse step at time t is the map x̂ = scale·x − gain·D(x) + sigma·z, with the denoiser D and
z ~ N(0, I). A *rule* chooses the triple (scale, gain, sigma). The rest of the package sees only
triples.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from drep_jax.errors import ConfigError, lookup


class ReverseStep(NamedTuple):
    """The triple of one reverse step, x̂ = scale·x − gain·D(x) + sigma·z."""

    scale: float
    gain: float
    sigma: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear noise schedule β_1…β_T.

    α_t = 1 − β_t,  ᾱ_t = Π_{s≤t} α_s,  ᾱ_0 = 1.

    The paper trains with T = 1000 and does not state the end of the schedule. DDPM (Ho et al.,
    2020) ends at 0.02. The authors' released code ends at 0.002, which is the default.

    Attributes:
      timesteps: T.
      beta_start: β_1.
      beta_end: β_T.

    Raises:
      ConfigError: unless T ≥ 1 and 0 < beta_start ≤ beta_end < 1.

    >>> schedule = Schedule(timesteps=1000, beta_end=0.02)
    >>> round(schedule.alpha_bar(1000), 8)
    4.036e-05
    >>> [round(float(bar), 6) for bar in schedule.alpha_bars[:3]]
    [1.0, 0.9999, 0.99978]
    """

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.002

    def __post_init__(self) -> None:
        if not (_is_whole(self.timesteps) and isinstance(self.timesteps, int) and self.timesteps >= 1):
            raise ConfigError(f"Schedule.timesteps must be a whole number of at least 1, got {self.timesteps!r}.")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ConfigError(
                "A schedule needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start!r}, beta_end={self.beta_end!r}."
            )

    @functools.cached_property
    def betas(self) -> Float[np.ndarray, "{self.timesteps}"]:
        """β_1…β_T."""
        return np.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=np.float64)

    @functools.cached_property
    def alpha_bars(self) -> Float[np.ndarray, "{self.timesteps}+1"]:
        """ᾱ_0…ᾱ_T; entry t is ᾱ_t."""
        return np.concatenate([[1.0], np.cumprod(1.0 - self.betas)])

    def check(self, t: Any) -> int:
        """Returns `t` as an int.

        Raises:
          ConfigError: unless t is a whole number in 1…T.
        """
        if not _is_whole(t) or not 1 <= t <= self.timesteps:
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


def _is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number; True and False are none."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and int(value) == value


# ---------------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------------


def _ddpm(schedule: Schedule, t: int) -> ReverseStep:
    return ReverseStep(1.0 / math.sqrt(schedule.alpha(t)), schedule.c1(t), math.sqrt(schedule.posterior_variance(t)))


def _paper(schedule: Schedule, t: int) -> ReverseStep:
    return ReverseStep(1.0, schedule.c1(t), schedule.posterior_variance(t))


def _ddim(schedule: Schedule, t: int, r: int | None = None) -> ReverseStep:
    r = t - 1 if r is None else r
    if not 0 <= r < t:
        raise ConfigError(f"Rule ddim goes from t={t} down to r with 0 <= r < t, got r={r}.")
    bar_t, bar_r = schedule.alpha_bar(t), schedule.alpha_bar(r)
    gain = math.sqrt(bar_r * (1.0 - bar_t) / bar_t) - math.sqrt(1.0 - bar_r)
    return ReverseStep(math.sqrt(bar_r / bar_t), gain, 0.0)


def _affine(schedule: Schedule, t: int) -> ReverseStep:
    del schedule, t
    return ReverseStep(1.0, 1.0, 0.0)


RULES: dict[str, Callable[..., ReverseStep]] = {"ddpm": _ddpm, "paper": _paper, "ddim": _ddim, "affine": _affine}


def parse_rule(rule: str) -> tuple[str, dict[str, int]]:
    """Splits a rule into its name in `RULES` and its options.

    Raises:
      ConfigError: for an unknown rule, naming the nearest one, or a target that no rule takes.

    >>> parse_rule("ddim:5")
    ('ddim', {'r': 5})
    """
    name, colon, target = rule.partition(":")
    lookup(RULES, name, "reverse-step rule")
    if not colon:
        return name, {}
    if name != "ddim" or not target.isdecimal():
        raise ConfigError(f'Rule "{rule}" is not understood: only ddim takes a target, as in "ddim:0".')
    return name, {"r": int(target)}


def is_single_step(rule: str) -> bool:
    """Returns whether a rule is one jump that cannot be repeated: `affine` and `ddim:r`.

    >>> is_single_step("ddim:0"), is_single_step("ddpm")
    (True, False)
    """
    name, options = parse_rule(rule)
    return name == "affine" or bool(options)


def reverse_step(schedule: Schedule, t: int, rule: str = "ddpm") -> ReverseStep:
    """Returns the triple (scale, gain, sigma) of one reverse step at time t.

    | rule | scale | gain | sigma |
    |---|---|---|---|
    | `ddpm` (Eq. 5) | 1/√α_t | C1(t) | σ_t |
    | `paper` (Eq. 7 as printed) | 1 | C1(t) | σ_t² |
    | `ddim` (t to t − 1), `ddim:r` (t to r) | √(ᾱ_r/ᾱ_t) | √(ᾱ_r(1−ᾱ_t)/ᾱ_t) − √(1−ᾱ_r) | 0 |
    | `affine` (the denoiser *is* I − A of a given map A) | 1 | 1 | 0 |

    `ddim:0` jumps to the clean estimate.

    Args:
      schedule: β_1…β_T.
      t: time step, 1…T.
      rule: a row of the table.

    Raises:
      ConfigError: for an unknown rule, t outside 1…T, or r outside 0…t − 1.

    >>> step = reverse_step(Schedule(beta_end=0.02), 10, "ddpm")
    >>> [round(number, 6) for number in step]
    [1.00014, 0.006417, 0.015433]
    """
    name, options = parse_rule(rule)
    return RULES[name](schedule, schedule.check(t), **options)


def reverse_steps(schedule: Schedule, t: int, steps: int = 1, rule: str = "ddpm") -> Float[np.ndarray, "{steps} 3"]:
    """Returns the triples of `steps` reverse steps at t, t − 1, …, t − steps + 1, largest t first.

    Args:
      schedule: β_1…β_T.
      t: time step of the first step, 1…T.
      steps: number of steps.
      rule: see `reverse_step`.

    Returns:
      (scale, gain, sigma) of each step, float64.

    Raises:
      ConfigError: if a step leaves 1…T, or a rule that is a single jump is given more than one.

    >>> reverse_steps(Schedule(), t=3, steps=2).round(5)
    array([[1.00005, 0.00594, 0.00828],
           [1.00005, 0.00717, 0.0071 ]])
    """
    if not _is_whole(steps) or steps < 1:
        raise ConfigError(f"The number of steps must be a whole number of at least 1, got {steps!r}.")
    if steps > 1 and is_single_step(rule):
        raise ConfigError(f'Rule "{rule}" is one single step; it cannot be taken {steps} times.')
    if t - steps + 1 < 1:
        raise ConfigError(f"{steps} steps down from t={t} would end below t=1.")
    return np.array([reverse_step(schedule, t - j, rule) for j in range(steps)], dtype=np.float64)
