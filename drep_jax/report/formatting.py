"""Numbers as text for a reader; an unknown number is "–"."""

import math
from collections.abc import Sequence


def decimals_of(n: int) -> int:
    """Returns the number of decimals of a percentage over n items."""
    return 1 if n <= 1000 else 2


def fixed(value: float | None, decimals: int) -> str:
    """Returns a number with so many decimals.

    >>> fixed(2 / 3, 2), fixed(None, 2)
    ('0.67', '–')
    """
    return "–" if value is None else f"{value:.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """Returns a number with its sign, "0.0" if it rounds to zero, "–" for NaN.

    >>> signed(0.26, 1), signed(-0.26, 1), signed(-0.01, 1)
    ('+0.3', '−0.3', '0.0')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "+∞" if value > 0 else "−∞"
    text = f"{value:+.{decimals}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def power(value: float | None) -> str:
    """Returns an error or a bound in scientific notation, such as "2.1e-12"."""
    return "–" if value is None else f"{value:.1e}"


def p_value(value: float | None) -> str:
    """Returns the p-value of a test; "" if none was made."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Returns a fraction as a percentage with three digits.

    >>> percent(0.12345)
    '12.3 %'
    """
    return "–" if value is None else f"{100 * value:.3g} %"


def si(value: float | None) -> str:
    """Returns a count with a metric prefix.

    >>> si(1.25e9), si(640)
    ('1.25 G', '640')
    """
    if value is None:
        return "–"
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def time_steps(times: Sequence[int]) -> str:
    """Returns time steps; of more than four, the first and the last.

    >>> time_steps([3, 2, 1]), time_steps(range(12, 0, -1))
    ('3, 2, 1', '12…1')
    """
    return ", ".join(map(str, times)) if len(times) <= 4 else f"{times[0]}…{times[-1]}"
