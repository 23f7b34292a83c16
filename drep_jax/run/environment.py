"""The environment of a run: versions, revision of the source, devices, processor and memory."""

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from typing import Any

import jax

PACKAGES = ("jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "ml_collections")


def environment() -> dict[str, Any]:
    """Returns versions, devices, hardware, command and source revision, as JSON values."""
    from drep_jax import __version__

    device = jax.local_devices()[0]
    return {
        "drep_jax": __version__,
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{device.platform} {device.device_kind}",
        "device_count": jax.device_count(),
        "hardware": hardware(),
        "command": shlex.join(["python", *sys.argv]),
        "git_revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """Returns this host's name, processor, cores, memory (GiB) and accelerators."""
    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in accelerators]
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "accelerators": [
            {"name": device.device_kind, "usable_memory_gib": round(limit / 2**30, 1) if limit else None}
            for device, limit in zip(accelerators, limits, strict=True)
        ],
        "processes": jax.process_count(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = re.search(r"^model name\s*: (.+)$", file.read(), re.MULTILINE)
    except OSError:  # not Linux
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):  # unknown on this system
        return None


def revision() -> str | None:
    """Returns the commit of the source, with `-dirty` if files have changed since.

    None outside a repository.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    commit = _git(here, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else commit


def _git(place: str, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", place, *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
