"""Many processes as one run: joining and leaving, and what they say to each other.

Alone, all of it costs nothing.
"""

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from drep_jax.errors import ConfigError
from drep_jax.parallel import devices, session
from drep_jax.parallel.hosts import Hosts, check
from drep_jax.parallel.session import Session

T = TypeVar("T")

SAME = "drep_jax/same/"

_session: Session | None = None
"""None where this process is the whole run."""


# ---- joining and leaving -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Joins the other processes for as long as the block runs, and prints on process 0 only.

    Alone, it only checks that there are devices.

    Call it before anything touches a device. At the end of the block all processes wait for each
    other. If it ends with an error, the others are told and end, too; then `leave` must be the last
    call of this process.

    Raises:
      ConfigError: for flags that do not fit together, a cluster that does not say who is who, or
        devices that JAX cannot use.
    """
    global _session
    check(hosts)
    if not hosts.several:
        devices.check_platform()
        yield
        return
    joined_run = _session = Session(hosts)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            devices.check_platform()
            with contextlib.nullcontext() if primary() else contextlib.redirect_stdout(nowhere):
                yield
        except BaseException as error:
            joined_run.report(error)
            raise
    joined_run.end()
    _session = None


def leave(status: int) -> int:
    """Returns the status 0 of a finished command; with any other status it ends this process here.

    Threads may still read images, compile or compute where work was broken off, see `end_process`.
    """
    if _session is not None:
        _session.leave(status)
    if status:
        session.end_process(status)
    return status


def alone() -> bool:
    """Returns whether this process is the whole run."""
    return _session is None


def primary() -> bool:
    """Returns whether this is the process that writes files and prints."""
    return _session is None or _session.index == 0


# ---- messages ----------------------------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits until every process is here; on the CPU, so it may take as long as it takes."""
    if _session is not None:
        _session.barrier(name)


def from_primary(make: Callable[[], T]) -> T:
    """Returns what `make()` gives on process 0, on every process; the others do not call it."""
    if _session is None:
        return make()
    content = pickle.dumps(make()) if primary() else None
    barrier("a message")
    return pickle.loads(devices.broadcast(content))  # written by this run's own process 0


def on_primary(make: Callable[[], Any]) -> Any:
    """Returns `make()` on process 0, and elsewhere an object whose methods do nothing."""
    return make() if primary() else _Nothing()


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None


def check_same(name: str, mine: Mapping[str, Any]) -> None:
    """Checks that all processes of the run have the same values.

    Args:
      name: of what is compared, for the message.
      mine: its parts, as plain values.

    Raises:
      ConfigError: on every process; names the process and the parts that differ.
    """
    if _session is None:
        return
    key = f"{SAME}{_session.barriers}/"
    _session.client.key_value_set(f"{key}{_session.index}", json.dumps(mine, default=str))
    barrier(name)
    values = {k: json.loads(text) for k, text in _session.client.key_value_dir_get(key)}
    for index in range(1, _session.count):
        if different := differences(values[f"{key}0"], values[f"{key}{index}"]):
            lines = "\n".join(f"  {line}" for line in different)
            raise ConfigError(
                f"The {name} of {_session.names[index]} is not that of process 0; all processes need the same:\n{lines}"
            )


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns a line for each part that differs between process 0 and another one.

    >>> differences({"seed": 1, "steps": 5}, {"seed": 2, "steps": 5})
    ['seed: 1 on process 0, 2 there']
    """
    absent = "absent"
    return [
        f"{name}: {first.get(name, absent)!r} on process 0, {other.get(name, absent)!r} there"
        for name in sorted(first.keys() | other.keys())
        if first.get(name, absent) != other.get(name, absent)
    ]


def orbax_options() -> dict[str, Any]:
    """Returns options with which Orbax writes and reads in this process alone.

    Else it waits for all at every file.
    """
    if jax.process_count() == 1:
        return {}
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    return {"multiprocessing_options": options}
