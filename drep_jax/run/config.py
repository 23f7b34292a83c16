"""`configs/default.py` as data: the default of every setting and what its comment says, for old runs and for `--help`."""

import ast
import functools
import importlib.util
import io
import itertools
import os
import pathlib
import sys
import tokenize
from collections.abc import Container, Iterator, Mapping
from typing import Any

SOURCE = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "default.py")
"""In a checkout, beside the package. The package alone, installed without the scripts, has no defaults."""

RENAMED = {
    "retrieval.lonely": "retrieval.singletons",
    "retrieval.shown": "retrieval.examples",
    "retrieval.noisy": "retrieval.corrupted",
    "retrieval.interval": "retrieval.bootstrap_unit",
    "retrieval.weighting": "retrieval.aggregate",
    "retrieval.centre_rate": "retrieval.center_lr",
    "retrieval.centre_weight": "retrieval.center_weight",
}
"""Settings with another name than in earlier releases, old to new; a setting stays in its section.

Saved runs, configuration files and command lines may go on using the old names.
"""


@functools.cache
def _module() -> Any:
    spec = importlib.util.spec_from_file_location("drep_jax_default_settings", SOURCE)
    if spec is None or spec.loader is None or not os.path.isfile(SOURCE):
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defaults() -> dict[str, Any]:
    """Returns the default settings, as nested dicts."""
    module = _module()
    return module.get_default().to_dict() if module else {}


def renamed(config: Mapping[str, Any], keep: Container[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Returns a configuration with today's names of all settings, and the old names that were in it.

    Args:
      config: nested settings. An old name overrides the new one beside it, which then is only the default.
      keep: new names, as "a.b", whose values stay even so, such as those given on the command line.

    >>> renamed({"retrieval": {"lonely": "drop", "margin": 0.3}})
    ({'retrieval': {'margin': 0.3, 'singletons': 'drop'}}, ['retrieval.lonely'])
    """
    current, old_names = dict(config), []
    for old, new in RENAMED.items():
        section, _, key = old.rpartition(".")
        settings = current.get(section)
        if isinstance(settings, Mapping) and key in settings:
            old_names.append(old)
            current[section] = {name: value for name, value in settings.items() if name != key}
            if new not in keep:
                current[section][new.rpartition(".")[2]] = settings[key]
    return current, old_names


@functools.cache
def announce(old: str) -> None:
    """Prints the new name of a setting, once a process."""
    print(f'Setting "{old}" is now called "{RENAMED[old]}".', file=sys.stderr)


def completed(config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the configuration of an older run in today's form: settings renamed, and missing ones at their defaults."""
    return _merged(renamed(config)[0], defaults() if base is None else base)


def _merged(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **config}
    return {
        name: _merged(value, base[name])
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        else value
        for name, value in merged.items()
    }


def meanings() -> dict[str, str]:
    """Returns {"a.b": comment} of all settings and sections in the order of the source; "" where there is no comment."""
    if _module() is None:
        return {}
    with open(SOURCE, encoding="utf-8") as file:
        text = file.read()
    comments = _Comments(text)
    dicts: dict[str, ast.Dict] = {}
    found: dict[str, str] = {}
    for node in sorted(ast.walk(ast.parse(text)), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], _dict_in(node.value)
            if isinstance(target, ast.Name) and isinstance(value, ast.Dict):
                dicts[target.id] = value  # settings that several sections share
            elif isinstance(target, ast.Attribute):
                found[target.attr] = comments.on(node)
                if value is not None:
                    found |= dict(_entries(value, f"{target.attr}.", dicts, comments))
    return found


class _Comments:
    """The comments of a source file."""

    def __init__(self, text: str) -> None:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        alone = [not token.line[: token.start[1]].strip() for token in tokens]
        self._above, self._beside = (
            {t.start[0]: t.string.lstrip("# ") for t, own in zip(tokens, alone, strict=True) if own is kind}
            for kind in (True, False)
        )

    def on(self, node: ast.stmt | ast.expr) -> str:
        """Returns what the lines just above a node and the comment on its first or last line say."""
        above = itertools.takewhile(lambda line: line in self._above, range(node.lineno - 1, 0, -1))
        parts = [self._above[line] for line in above][::-1]
        beside = self._beside.get(node.lineno) or self._beside.get(node.end_lineno or 0)
        return " ".join([*parts, beside] if beside else parts)


def _dict_in(node: ast.expr) -> ast.expr | None:
    """Returns the dict in `{…}` or `ConfigDict({…})`, or the name of one in `ConfigDict(name)`."""
    if isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    return node if isinstance(node, ast.Dict | ast.Name) else None


def _entries(
    node: ast.expr, prefix: str, dicts: Mapping[str, ast.Dict], comments: "_Comments"
) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Name):
        node = dicts.get(node.id, ast.Dict([], []))
    if not isinstance(node, ast.Dict):
        return
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:  # **shared
            yield from _entries(value, prefix, dicts, comments)
        elif isinstance(key, ast.Constant):
            name = f"{prefix}{key.value!s}"
            yield name, comments.on(value)
            if (inner := _dict_in(value)) is not None:
                yield from _entries(inner, f"{name}.", dicts, comments)
