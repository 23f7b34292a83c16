"""The work directory of a run: locked, with the configuration and a record of every start."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from drep_jax.errors import CheckpointError
from drep_jax.files import write_json
from drep_jax.run import lock
from drep_jax.run.config import announce, completed, earlier_values, renamed
from drep_jax.run.environment import environment
from drep_jax.training.checkpoint import FOLDER as CHECKPOINTS

CONFIG, STARTS = "config.json", "run.json"
"""Names of its files."""


PIXELS = "data.max_megapixels"
"""May be raised on resuming, by a run that has met an image above it; what reads the run later needs it, too."""

FREE = (
    "log_every",
    "checkpoint_every",
    "progress",
    "latency_rounds",
    "profile",
    "wandb.",
    "evaluate.unknown_classes",
    "evaluate.certificate_sizes",
    PIXELS,
)
"""Settings, and sections as `section.`, that may differ on resuming: they do not affect learning."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of a nested configuration.

    >>> flatten({"seed": 0, "data": {"source": "digits", "flip": False}})
    {'seed': 0, 'data.source': 'digits', 'data.flip': False}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextlib.contextmanager
def claimed(workdir: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Makes `workdir` the directory of this run, or checks that it is, and locks it for the block.

    Raises:
      CheckpointError: if it cannot be written, is in use, or holds a run with another
        configuration; names the settings.
    """
    _make_writable(workdir)
    with lock.writing(workdir):
        _settle_config(workdir, config)
        _record_start(workdir)
        yield


def _make_writable(workdir: str) -> None:
    try:
        os.makedirs(workdir, exist_ok=True)
        test_file = os.path.join(workdir, f".write-test{os.getpid()}")
        with open(test_file, "w", encoding="utf-8") as file:
            file.write("x" * 4096)
        os.remove(test_file)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to the work directory {workdir}: {error.strerror}. Choose another --workdir."
        ) from error


def _settle_config(workdir: str, config: Mapping[str, Any]) -> None:
    """Writes the configuration, or compares it with the saved one; see `differences`."""
    path = os.path.join(workdir, CONFIG)
    if not os.path.exists(path):
        write_json(path, config)
        return
    saved = read_config(workdir)
    changed = differences(saved, config, (*FREE, *_newer_settings(path)))
    section, _, name = PIXELS.partition(".")
    if not changed and name in config.get(section, {}) and saved.get(section, {}).get(name) != config[section][name]:
        write_json(path, {**saved, section: {**saved[section], name: config[section][name]}})
    if changed and not _begun(workdir):
        write_json(path, config)  # for example to correct a mistyped path
    elif changed:
        raise CheckpointError(
            f"{workdir} holds a run with another configuration. Choose another --workdir, or delete it:\n{listed(changed)}"
        )


def _newer_settings(path: str) -> Iterator[str]:
    """Yields the settings of `EARLIER` that a saved configuration does not have: its run did not choose them."""
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    for name in earlier_values():
        section, _, key = name.rpartition(".")
        if key not in saved.get(section, {}):
            yield name


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (there, now)} of the settings that differ.

    A missing setting counts as its default, and an old name as the new one.

    Args:
      there, now: configurations.
      free: settings that may differ, and sections as `section.`.
    """
    old, new = (flatten(json.loads(json.dumps(completed(config)))) for config in (there, now))
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(name == f or (f[-1] == "." and name.startswith(f)) for f in free)
    }


def listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns differences as lines of a message.

    >>> listed({"seed": (0, 1)})
    '  seed: 0 there, 1 now'
    """
    return "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())


def _record_start(workdir: str) -> None:
    """Adds this start to the record: the first entry began the run, the others resumed it."""
    path = os.path.join(workdir, STARTS)
    try:
        with open(path, encoding="utf-8") as file:
            starts = json.load(file)["starts"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # the first start, or a damaged file, which must not prevent training
        starts = []
    write_json(path, {"starts": [*starts, environment()]})


def _begun(workdir: str) -> bool:
    """Returns whether the run has saved anything besides its configuration."""
    stages = os.path.join(workdir, CHECKPOINTS)
    saved = os.path.isdir(stages) and any(os.listdir(os.path.join(stages, stage)) for stage in os.listdir(stages))
    return saved or any(os.path.exists(os.path.join(workdir, name)) for name in ("moments.npz", "report.json", "fused"))


def read_config(workdir: str) -> dict[str, Any]:
    """Returns the configuration of a run, with defaults for settings newer than the run.

    Raises:
      CheckpointError: if there is none.
    """
    path = os.path.join(workdir, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            saved, old_names = renamed(json.load(file))
        for name in old_names:
            announce(name)
        return completed(saved)
    except FileNotFoundError as error:
        if any(os.path.exists(os.path.join(workdir, name)) for name in ("drep_jax.json", "fused.safetensors")):
            raise CheckpointError(
                f"{workdir} holds exported weights, which may already be fused, and no run. Give the work directory of the "
                "run that learned the denoisers."
            ) from error
        raise CheckpointError(f"{workdir} is no finished run: it has no {CONFIG}.") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
