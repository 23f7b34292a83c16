"""Python modules that a user names on the command line: by a dotted name, or by the path of a file."""

import importlib
import importlib.util
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from drep_jax.errors import ConfigError, did_you_mean

SUFFIX = ".py"

_FILES: dict[str, tuple[int, ModuleType]] = {}
"""{path: (time of its last change, module)} of the files that were imported."""


def import_module(name: str) -> ModuleType:
    """Imports a module.

    Args:
      name: a dotted name, sought on Python's path and then in the current directory, or a path that
        ends with ".py". A file is executed again only if it has changed.

    Raises:
      ConfigError: if there is no such module, or an error is raised while it is imported.
    """
    if name.endswith(SUFFIX):
        return _import_file(name)
    directory = os.getcwd()
    _search(directory)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            wanted = "" if name == error.name else f' (for "{name}")'
            raise ConfigError(
                f'There is no Python module "{error.name}"{wanted}. Python\'s path and the current directory, '
                f"{directory}, were searched: set PYTHONPATH to the directory that holds it, or give the path of its file."
            ) from error
        raise _not_imported(name, error) from error
    except Exception as error:
        raise _not_imported(name, error) from error


def _import_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = (
            [os.path.join(os.path.dirname(path), file) for file in os.listdir(folder)] if os.path.isdir(folder) else []
        )
        hint = did_you_mean(path, [file for file in near if file.endswith(SUFFIX)])
        raise ConfigError(f"There is no file {path} (current directory: {os.getcwd()}).{hint}")
    place, changed = os.path.realpath(path), os.stat(path).st_mtime_ns
    if place in _FILES and _FILES[place][0] == changed:
        return _FILES[place][1]
    name = f"drep_jax_user{len(_FILES)}_{os.path.splitext(os.path.basename(path))[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be read as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    _search(os.path.dirname(place))  # for what the file imports from beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _not_imported(path, error) from error
    _FILES[place] = (changed, module)
    return module


def _search(directory: str) -> None:
    """Adds a directory to Python's path, behind all others, so that it hides nothing that is installed."""
    if directory not in sys.path:
        sys.path.append(directory)


def import_attribute(module: str, name: str) -> Any:
    """Returns an attribute of a module, see `import_module`.

    Raises:
      ConfigError: if it cannot be imported, or has no such attribute.
    """
    imported = import_module(module)
    if not hasattr(imported, name):
        public = [known for known in vars(imported) if not known.startswith("_")]
        raise ConfigError(f'{module} ({imported.__file__}) has no "{name}".{did_you_mean(name, public)}')
    return getattr(imported, name)


def where_raised(error: BaseException) -> str:
    """Returns `, raised at FILE:LINE` for the innermost line of an error's traceback outside installed packages."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(("<", _HERE))
    ]
    return f", raised at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


_HERE = os.path.dirname(os.path.abspath(__file__))


def _not_imported(name: str, error: Exception) -> ConfigError:
    return ConfigError(f'"{name}" cannot be imported: {type(error).__name__}: {error}{where_raised(error)}.')
