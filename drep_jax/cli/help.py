"""`--help`: a script's own options first, then every setting with its value and meaning, read from `configs/default.py`."""

import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from absl import flags

from drep_jax.run.config import meanings
from drep_jax.run.workdir import flatten

WIDTH = 120


ASKED = ("--help", "-h", "-help", "--helpshort")
"""What asks for it; absl's --helpfull is left to absl."""


def usage(doc: str, config: Mapping[str, Any] | None, source: str = "") -> str:
    """Returns the whole text.

    Args:
      doc: of the script.
      config: the configuration whose values are shown; None of a script that has none.
      source: its file.
    """
    lines = [doc.strip(), "", "Options:"]
    for flag in _own_flags():
        value = "" if flag.boolean else f"={flag.name.upper() if flag.name != 'config' else 'FILE'}"
        lines += _row(f"  --{flag.name}{value}", flag.help or "", 26)
    lines += _row("  --helpfull", "The options of absl and of the libraries, too.", 26)
    if config is not None:
        lines += ["", f"Settings, given as --config.NAME=VALUE; the values are those of {source}:"]
        lines += _settings(flatten(config), meanings())
    return "\n".join(lines)


def _settings(values: Mapping[str, Any], meaning: Mapping[str, str]) -> list[str]:
    """Returns a line for every setting, in the order of the source; those of a section stay together."""
    lines, last = [], ""
    place = {name: number for number, name in enumerate(meaning)}

    def order(name: str) -> tuple[bool, int, int]:
        section = name.partition(".")[0]
        return "." in name, place.get(section, len(place)), place.get(name, len(place))

    for name in sorted(values, key=order):
        section, dot, _ = name.partition(".")
        if dot and section != last:
            lines += ["", *textwrap.wrap(f"{section}: {meaning[section]}" if meaning.get(section) else section, WIDTH)]
            last = section
        text = meaning.get(name, "of this model: docs/models.md" if section == "model" else "")
        lines += _row(f"  {name} = {_shown(values[name])}", text, 42)
    return lines


def _own_flags() -> list[Any]:
    """Returns the options that this project defines, those that the scripts share first."""
    names = ("drep_jax.cli.app", "drep_jax.parallel.hosts", "__main__", sys.argv[0])
    ours = [name for name in flags.FLAGS.flags_by_module_dict() if name in names]
    found = [flag for name in sorted(ours, key=lambda n: n != "drep_jax.cli.app") for flag in _flags_of(name)]
    if "config" in flags.FLAGS:  # ml_collections defines it in its own name
        found.insert(0, flags.FLAGS["config"])
    return list({flag.name: flag for flag in found}.values())


def _flags_of(module: str) -> list[Any]:
    return [flag for flag in flags.FLAGS.flags_by_module_dict()[module] if "." not in flag.name]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else str(value)


def _row(left: str, right: str, column: int) -> list[str]:
    """Returns a line of two columns, or two lines where the left one is too long."""
    wrapped = textwrap.wrap(" ".join(right.split()), WIDTH - column) or [""]
    if len(left) + 2 > column:
        return [left] + [" " * column + text for text in wrapped if text]
    return [f"{left:<{column}}{wrapped[0]}".rstrip()] + [" " * column + text for text in wrapped[1:]]
