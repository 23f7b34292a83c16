"""`--help`: the options of a script, then all settings with their values and meanings."""

import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from absl import flags

from drep_jax.run.config import meanings
from drep_jax.run.workdir import flatten

WIDTH = 120


HELP = ("--help", "-h", "-help", "--helpshort")
"""Arguments that ask for help; absl handles --helpfull itself."""


def usage(doc: str, config: Mapping[str, Any] | None, source: str = "") -> str:
    """Returns the help text.

    Args:
      doc: docstring of the script.
      config: the configuration with the values to show; None for a script without one.
      source: path of the configuration file.
    """
    lines = [doc.strip(), "", "Options:"]
    for flag in _project_flags():
        value = "" if flag.boolean else f"={flag.name.upper() if flag.name != 'config' else 'FILE'}"
        lines += _row(f"  --{flag.name}{value}", flag.help or "", 26)
    lines += _row("  --helpfull", "All options, also those of absl and the libraries.", 26)
    if config is not None:
        lines += ["", f"Settings, given as --config.NAME=VALUE; the values are those of {source}:"]
        lines += _settings(flatten(config), meanings())
    return "\n".join(lines)


def _settings(values: Mapping[str, Any], meaning: Mapping[str, str]) -> list[str]:
    """Returns a line for every setting, section by section in the order of the source."""
    lines, last = [], ""
    rank = {name: number for number, name in enumerate(meaning)}

    def order(name: str) -> tuple[bool, int, int]:
        section = name.partition(".")[0]
        return "." in name, rank.get(section, len(rank)), rank.get(name, len(rank))

    for name in sorted(values, key=order):
        section, dot, _ = name.partition(".")
        if dot and section != last:
            lines += ["", *textwrap.wrap(f"{section}: {meaning[section]}" if meaning.get(section) else section, WIDTH)]
            last = section
        text = meaning.get(name, "of this model: docs/models.md" if section == "model" else "")
        lines += _row(f"  {name} = {_shown(values[name])}", text, 42)
    return lines


def _project_flags() -> list[Any]:
    """Returns the options that this project defines, the shared ones first."""
    names = ("drep_jax.cli.app", "drep_jax.parallel.hosts", "__main__", sys.argv[0])
    modules = [name for name in flags.FLAGS.flags_by_module_dict() if name in names]
    defined = [flag for name in sorted(modules, key=lambda n: n != "drep_jax.cli.app") for flag in _flags_of(name)]
    if "config" in flags.FLAGS:  # defined by ml_collections
        defined.insert(0, flags.FLAGS["config"])
    return list({flag.name: flag for flag in defined}.values())


def _flags_of(module: str) -> list[Any]:
    return [flag for flag in flags.FLAGS.flags_by_module_dict()[module] if "." not in flag.name]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else str(value)


def _row(left: str, right: str, column: int) -> list[str]:
    """Returns a row of two columns; a long left column stands on a line of its own."""
    wrapped = textwrap.wrap(" ".join(right.split()), WIDTH - column) or [""]
    if len(left) + 2 > column:
        return [left] + [" " * column + text for text in wrapped if text]
    return [f"{left:<{column}}{wrapped[0]}".rstrip()] + [" " * column + text for text in wrapped[1:]]
