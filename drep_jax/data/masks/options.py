"""Options of sources with masks: which stored values are ignored, yes and no."""

import re

from drep_jax.errors import ConfigError

NONE = "none"


def ignored_values(text: str) -> tuple[int, ...]:
    """Returns the stored values of the option `ignore`: numbers separated by commas, or none.

    Raises:
      ConfigError: for anything else.

    >>> ignored_values("0,255"), ignored_values("none")
    ((0, 255), ())
    """
    if text == NONE:
        return ()
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text) or max(map(int, text.split(","))) > 255:
        raise ConfigError(f'The option ignore={text} is stored values from 0 to 255, as in ignore=0,255, or "none".')
    return tuple(map(int, text.split(",")))


def yes(text: str, name: str) -> bool:
    """Returns whether an option is on.

    Raises:
      ConfigError: unless it is yes or no.
    """
    if text not in ("yes", "no"):
        raise ConfigError(f"The option {name}={text} is yes or no.")
    return text == "yes"
