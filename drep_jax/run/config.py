"""`configs/default.py` as data: defaults and new names of settings, for old runs.

Meanings, for `--help`.
"""

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
"""In a checkout, beside the package.

The package alone, installed without the scripts, has no defaults.
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


def new_names() -> dict[str, str]:
    """Returns {old name: new name} of the settings that earlier releases called otherwise."""
    module = _module()
    return module.RENAMED if module else {}


def renamed(config: Mapping[str, Any], keep: Container[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Returns a configuration with current names of settings, and the old names that were in it.

    Args:
      config: nested settings. If both names of a setting are there, the old one counts: the new one
        is the default.
      keep: new names, as "a.b", that count in any case, such as those given on the command line.
    """
    current, old_names = dict(config), []
    for old, new in new_names().items():
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
    print(f'Setting "{old}" is now called "{new_names()[old]}".', file=sys.stderr)


def earlier_values() -> dict[str, Any]:
    """Returns {name: value} of settings whose value in runs without them is not today's default."""
    module = _module()
    return module.EARLIER if module else {}


def completed(config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns an older run's configuration with current names and the values that missing settings had."""
    base = {**(defaults() if base is None else base)}
    for name, value in earlier_values().items():
        section, _, key = name.rpartition(".")
        if isinstance(base.get(section), Mapping):
            base[section] = {**base[section], key: value}
    return _merged(renamed(config)[0], base)


def _merged(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **config}
    return {
        name: _merged(value, base[name])
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        else value
        for name, value in merged.items()
    }


def meanings() -> dict[str, str]:
    """Returns {"a.b": comment} of all settings and sections, in the order of the source.

    "" without a comment.
    """
    if _module() is None:
        return {}
    with open(SOURCE, encoding="utf-8") as file:
        text = file.read()
    comments = _Comments(text)
    dicts: dict[str, ast.Dict] = {}
    meaning: dict[str, str] = {}
    for node in sorted(ast.walk(ast.parse(text)), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], _dict_in(node.value)
            if isinstance(target, ast.Name) and isinstance(value, ast.Dict):
                dicts[target.id] = value  # settings that several sections share
            elif isinstance(target, ast.Attribute):
                meaning[target.attr] = comments.on(node)
                if value is not None:
                    meaning |= dict(_entries(value, f"{target.attr}.", dicts, comments))
    return meaning


class _Comments:
    """The comments of a source file."""

    def __init__(self, text: str) -> None:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        self._lines: dict[int, str] = {}  # comments that are lines of their own
        self._trailing: dict[int, str] = {}  # comments behind code
        for token in tokens:
            behind_code = bool(token.line[: token.start[1]].strip())
            (self._trailing if behind_code else self._lines)[token.start[0]] = token.string.lstrip("# ")

    def on(self, node: ast.stmt | ast.expr) -> str:
        """Returns the comment lines above a node, and the comment on its first or last line."""
        above = itertools.takewhile(lambda line: line in self._lines, range(node.lineno - 1, 0, -1))
        parts = [self._lines[line] for line in above][::-1]
        trailing = self._trailing.get(node.lineno) or self._trailing.get(node.end_lineno or 0)
        return " ".join([*parts, trailing] if trailing else parts)


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
