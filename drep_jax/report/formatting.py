"""Numbers as a person reads them; a number that is not known is "–"."""

import math
from collections.abc import Sequence


def decimals_of(n: int) -> int:
    """Returns the decimals of a percentage that one of n items can change."""
    return 1 if n <= 1000 else 2


def fixed(value: float | None, decimals: int) -> str:
    """Returns a number with that many decimals."""
    return "–" if value is None else f"{value:.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """Returns a number with its sign, but "0.0" for what rounds to zero; "–" for NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "+∞" if value > 0 else "−∞"
    text = f"{value:+.{decimals}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def power(value: float | None) -> str:
    """Returns an error or a bound by its power of ten, such as "2.1e-12"."""
    return "–" if value is None else f"{value:.1e}"


def p_value(value: float | None) -> str:
    """Returns the p of a test; nothing where none was made."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Returns a fraction as a percentage of three digits."""
    return "–" if value is None else f"{100 * value:.3g} %"


def si(value: float | None) -> str:
    """Returns a count with its metric prefix, such as "1.25 G"."""
    if value is None:
        return "–"
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def time_steps(times: Sequence[int]) -> str:
    """Returns time steps; of more than four, the first and the last."""
    return ", ".join(map(str, times)) if len(times) <= 4 else f"{times[0]}…{times[-1]}"
