"""The work directory of a run: made writable-checked, with its configuration and a record of what made it."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import flax
import jax

from drep_jax.errors import CheckpointError

CONFIG = "config.json"
FREE = ("log_every", "checkpoint_every", "progress", "latency_rounds")
"""Settings that may differ when a run is resumed: they change nothing that is learned."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of a nested configuration."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def claim(workdir: str, config: Mapping[str, Any]) -> None:
    """Makes `workdir` the place of this run, or checks that it already is.

    Raises:
      CheckpointError: if it cannot be written, or holds a run with another configuration; names the settings.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
        probe = os.path.join(workdir, ".write-test")
        with open(probe, "w", encoding="utf-8") as file:
            file.write("x" * 4096)
        os.remove(probe)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to the work directory {workdir}: {error.strerror}. Choose another --workdir."
        ) from error
    path = os.path.join(workdir, CONFIG)
    if not os.path.exists(path):
        write_json(path, config)
        return
    old, new = flatten(read_config(workdir)), flatten(json.loads(json.dumps(config)))
    changed = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n) and n not in FREE]
    if changed and not _begun(workdir):
        write_json(path, config)  # such as a path that was mistyped the first time
    elif changed:
        lines = "\n".join(f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed)
        raise CheckpointError(
            f"{workdir} holds a run with another configuration. Choose another --workdir, or delete it:\n{lines}"
        )


def _begun(workdir: str) -> bool:
    """Returns whether a work directory holds anything that its configuration has made."""
    stages = os.path.join(workdir, "checkpoints")
    saved = os.path.isdir(stages) and any(os.listdir(os.path.join(stages, stage)) for stage in os.listdir(stages))
    return saved or any(os.path.exists(os.path.join(workdir, name)) for name in ("moments.npz", "report.json", "fused"))


def read_config(workdir: str) -> dict[str, Any]:
    """Returns the configuration of a run.

    Raises:
      CheckpointError: if there is none.
    """
    path = os.path.join(workdir, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        if any(os.path.exists(os.path.join(workdir, name)) for name in ("drep_jax.json", "fused.safetensors")):
            raise CheckpointError(
                f"{workdir} holds exported weights, which may already be fused, and not a run. Give the work directory of "
                "the run that learned the denoisers."
            ) from error
        raise CheckpointError(f"{workdir} is no finished run: there is no {CONFIG} in it.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def write_json(path: str, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


def environment() -> dict[str, Any]:
    """Returns versions, devices, command and source revision, for the report."""
    from drep_jax import __version__

    here = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", here, "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    device = jax.local_devices()[0]
    return {
        "drep_jax": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} {device.device_kind}",
        "device_count": jax.device_count(),
        "command": shlex.join(["python", *sys.argv]),
        "git_revision": revision or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
