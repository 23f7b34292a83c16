"""Options of a data source, behind its path: `NAME:PATH?option=value&option=value`."""

from collections.abc import Sequence
from urllib.parse import parse_qsl

from drep_jax.errors import ConfigError, did_you_mean


def parsed(kind: str, argument: str, known: Sequence[str] | None = None) -> tuple[str, dict[str, str]]:
    """Returns the path and the options of what follows the colon; a `+` in them is a plus.

    Args:
      kind: of the source, for messages.
      argument: what follows the colon.
      known: names of the options that the source has; None where only its files tell.

    Raises:
      ConfigError: for an empty path, and for options that are unknown, empty or given twice.

    >>> parsed("npz", "mine.npz?channels=0,1,2", ["channels"])
    ('mine.npz', {'channels': '0,1,2'})
    """
    path, mark, query = argument.partition("?")
    if not path:
        raise ConfigError(f'The data source "{kind}" needs a place: "{kind}:DIR".')
    try:
        pairs = parse_qsl(query.replace("+", "%2B"), strict_parsing=True, keep_blank_values=True) if mark else []
        if not all(name and value for name, value in pairs):
            raise ValueError("an option without a name or a value")
    except ValueError as error:
        example = f"?{known[-1]}=…&…" if known else "?option=value&…"
        raise ConfigError(f'"{kind}:{argument}": expected options as in "{example}" behind the path.') from error
    options = dict(pairs)
    for name, _ in pairs:
        if known is not None and name not in known:
            raise ConfigError(f'The data source "{kind}" has no option "{name}".{did_you_mean(name, known)}')
    if len(options) < len(pairs):
        raise ConfigError(f'"{kind}:{argument}" gives an option twice.')
    return path, options
