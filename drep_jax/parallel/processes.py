"""Orbax as used by one process of a run alone: it would otherwise wait for all of them at every file."""

import atexit
import contextlib
import ctypes
import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import flags
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge

from drep_jax.errors import ConfigError
from drep_jax.parallel import devices


def orbax_options() -> dict[str, Any]:
    """Returns the options that make Orbax's checkpointers wait for no other process."""
    if jax.process_count() == 1:
        return {}
    which = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=which, active_processes={which}, barrier_sync_key_prefix=f"process{which}"
    )
    return {"multiprocessing_options": options}


T = TypeVar("T")


EXIT_PEER = 4
"""Exit status of a process that ends because another one did."""


GRACE = 3.0
"""Seconds that a process has to find an error by itself that another one has told of."""


LONG = 7 * 24 * 3600 * 1000
"""Milliseconds that processes wait for each other; that one of them is gone is noticed otherwise."""


ALIVE, ENDED, SAME = "drep_jax/alive/", "drep_jax/ended/", "drep_jax/same/"


class Hosts(NamedTuple):
    """How this process finds the others.

    Attributes:
      distributed: whether a cluster's own settings say what is not given.
      coordinator_address: HOST:PORT of process 0.
      num_processes, process_id: how many there are, and which one this is.
      heartbeat: seconds of silence after which a process counts as dead.
      join_timeout: seconds in which all processes must have been started.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat: float = 60.0
    join_timeout: int = 300

    @property
    def several(self) -> bool:
        """Whether there is anything to join."""
        return self.distributed or (self.num_processes or 1) > 1


def define_flags() -> Callable[[], Hosts]:
    """Defines the flags of a run over several processes; returns a function that gives what was asked for."""
    several = flags.DEFINE_bool(
        "distributed", False, "Join the processes of a TPU pod slice, SLURM or Open MPI job, which say who they are."
    )
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for all processes.")
    count = flags.DEFINE_integer("num_processes", None, "How many processes make up this run.")
    which = flags.DEFINE_integer("process_id", None, "Which of them this is: 0, 1, …")
    heartbeat = flags.DEFINE_float("heartbeat", 60.0, "Seconds of silence after which another process counts as dead.")
    timeout = flags.DEFINE_integer("join_timeout", 300, "Seconds in which all processes must have been started.")

    def given() -> Hosts:
        return Hosts(several.value, address.value, count.value, which.value, heartbeat.value, timeout.value)

    return given


def check(hosts: Hosts) -> None:
    """Raises `ConfigError`, naming the flag, unless the flags fit together."""
    count, which, address = hosts.num_processes, hosts.process_id, hosts.coordinator_address
    if count is not None and count < 1:
        raise ConfigError(f"--num_processes={count} must be at least 1.")
    if which is not None and (which < 0 or (count is not None and which >= count)):
        many = "0, 1, …" if count is None else f"0…{count - 1}, because --num_processes={count}"
        raise ConfigError(f"--process_id={which} must be one of {many}.")
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise ConfigError(f"--coordinator_address={address} must be HOST:PORT, such as 10.0.0.1:1234.")
    if not hosts.heartbeat >= 1:
        raise ConfigError(f"--heartbeat={hosts.heartbeat:g} is in seconds and at least 1.")
    if hosts.join_timeout < 1:
        raise ConfigError(f"--join_timeout={hosts.join_timeout} is in seconds and at least 1.")
    if hosts.distributed:
        return
    given = {"--coordinator_address": address, "--num_processes": count, "--process_id": which}
    absent = [name for name, value in given.items() if value is None]
    if absent and len(absent) < len(given):
        there = " and ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ConfigError(
            f"{there} alone does not say which run to join: give {' and '.join(absent)} too, or --distributed where the "
            "cluster knows (TPU pod slices, SLURM, Open MPI)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Joining and leaving
# ---------------------------------------------------------------------------------------------------------------------

_session: "_Session | None" = None


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Joins the other processes for as long as the block runs, and prints on process 0 only; alone, it does nothing.

    Call it before anything touches a device. At the end of the block all processes wait for each other. If it ends with an
    error, the others are told and end, too; then `leave` must be the last call of this process.

    Raises:
      ConfigError: for flags that do not fit together, or a cluster that does not say who is who.
    """
    global _session
    check(hosts)
    if not hosts.several:
        yield
        return
    session = _session = _Session(hosts)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with contextlib.nullcontext() if primary() else contextlib.redirect_stdout(nowhere):
                yield
        except BaseException as error:
            session.tell(error)
            raise
    session.end()
    _session = None


def leave(status: int) -> int:
    """Returns the exit status; after an error it ends the process here, for JAX would wait for those that no longer come."""
    if _session is None:
        return status
    if primary():
        time.sleep(2 * _session.interval)  # the others read the reason from this process
    return _end(status)


def alone() -> bool:
    """Whether this process is the whole run."""
    return _session is None


def primary() -> bool:
    """Whether this is the process that writes files and prints."""
    return _session is None or _session.which == 0


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Session:
    """One process among several, with a thread that tells the others that it lives and notices when one does not."""

    def __init__(self, hosts: Hosts) -> None:
        if xla_bridge.backends_are_initialized():
            raise ConfigError("Processes must join before a device is used; this one has used its devices already.")
        self.hosts = hosts
        self.interval = min(2.0, hosts.heartbeat / 4)
        self.number = 0  # of what all processes have waited for
        self._done = threading.Event()
        self._joining = True
        self._handler: Any = None
        self._hear_aborts()
        by_hand = not hosts.distributed
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
        try:
            jax.distributed.initialize(
                hosts.coordinator_address,
                hosts.num_processes,
                hosts.process_id,
                cluster_detection_method="deactivate" if by_hand else None,
                initialization_timeout=hosts.join_timeout,
                # Ours is to come first, since it has a message; and a process that ends with an error does not wait long.
                heartbeat_timeout_seconds=int(2 * hosts.heartbeat) + 10,
                shutdown_timeout_seconds=10,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "--distributed found no cluster that says who this process is (TPU pod slice, SLURM, Open MPI): "
                f"{error} Give --coordinator_address, --num_processes and --process_id."
            ) from error
        self._joining = False
        state = jax_distributed.global_state
        self.client: Any = state.client
        self.address = str(state.coordinator_address)
        self.which, self.count = state.process_id, state.num_processes
        self.names = {
            which: f"process {which} of {self.count}" + (f" on {host}" if host else "")
            for which, host in enumerate(self._introduce())
        }
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def _introduce(self) -> list[str]:
        self.client.key_value_set(f"drep_jax/host/{self.which}", socket.gethostname())
        self.client.wait_at_barrier("drep_jax/introduced", 1000 * self.hosts.join_timeout)
        found = dict(self.client.key_value_dir_get("drep_jax/host/"))
        return [found.get(f"drep_jax/host/{which}", "") for which in range(self.count)]

    def end(self) -> None:
        """Waits for all processes, and takes leave of them."""
        barrier("the end")
        self._done.set()
        self._thread.join()
        jax.distributed.shutdown()
        self._hear_aborts(again=False)

    def tell(self, error: BaseException) -> None:
        """Tells the others that this process ends; or, if an error says that another one has gone, waits to hear which."""
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            wait = self.hosts.heartbeat + 2 * self.interval + GRACE
            print(
                f"\nAn operation failed; waiting {wait:.0f} s for word that another process is gone.", file=sys.stderr
            )
            time.sleep(wait)  # the watching thread then ends the process
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{ENDED}{self.which}", reason, True)
        self._done.set()
        # If nobody handles the error and calls `leave`: this comes before JAX's own farewell, which would wait for the others.
        atexit.register(leave, 1)

    # -----------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beats = 0
        now = time.monotonic()
        heard = dict.fromkeys(range(self.count), (None, now))
        reached = now
        while not self._done.wait(self.interval):
            beats += 1
            try:
                self.client.key_value_set(f"{ALIVE}{self.which}", str(beats), True)
                alive, ended = (dict(self.client.key_value_dir_get(key)) for key in (ALIVE, ENDED))
                reached = time.monotonic()
            except jax.errors.JaxRuntimeError:
                if time.monotonic() - reached > self.hosts.heartbeat:
                    self._stop(f"{self.names[0]} cannot be reached at {self.address}", reached)
                continue
            for which in range(self.count):
                beat = alive.get(f"{ALIVE}{which}")
                if beat != heard[which][0]:
                    heard[which] = (beat, reached)
                elif which != self.which and reached - heard[which][1] > self.hosts.heartbeat:
                    self._stop(f"{self.names[which]} is gone: it was killed, or lost its machine", heard[which][1])
            for which in range(self.count):
                if which != self.which and (reason := ended.get(f"{ENDED}{which}")) is not None:
                    if not self._done.wait(GRACE):
                        self._stop(f"{self.names[which]} ended: {reason}")
                    return

    def _stop(self, what: str, since: float | None = None) -> NoReturn:
        silent = "" if since is None else f" (no word from it for {time.monotonic() - since:.0f} s)"
        self._say(f"{what[0].upper()}{what[1:]}{silent}. This process stops, too: a run needs all of its processes.")

    def _say(self, message: str) -> NoReturn:
        print(
            f"\nError: {message} To go on from the last checkpoint, start all {self.count} processes again with the same "
            "commands.",
            file=sys.stderr,
        )
        _end(EXIT_PEER)

    def _hear_aborts(self, *, again: bool = True) -> None:
        """Replaces the way in which JAX ends a process whose coordinator is gone: abort(), without a word of who it was."""
        if not again:
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            return

        def heard(number: int) -> None:
            del number
            if self._joining:
                hosts = self.hosts
                address = hosts.coordinator_address or "the cluster's address"
                print(
                    f"\nError: The processes did not all find each other at {address} within {hosts.join_timeout} s "
                    f"(--join_timeout). Check that each of the {hosts.num_processes or 'expected'} runs once, under a "
                    "--process_id of its own, that all are given the same address, and that process 0 can be reached there.",
                    file=sys.stderr,
                )
                _end(EXIT_PEER)
            if self.which and not _listens(self.address):
                self._stop(f"{self.names[0]}, the coordinator at {self.address}, is gone")

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(heard)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)


def _listens(address: str) -> bool:
    """Whether anything answers at HOST:PORT."""
    place, _, port = address.rpartition(":")
    try:
        with socket.create_connection((place.strip("[]"), int(port)), timeout=2.0):
            return True
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Words between processes; alone, they cost nothing
# ---------------------------------------------------------------------------------------------------------------------


def barrier(what: str) -> None:
    """Waits until every process is here; not on the devices, so it may take as long as it takes."""
    if _session is None:
        return
    _session.number += 1
    _session.client.wait_at_barrier(f"drep_jax/{_session.number}/{what}", LONG)


def from_primary(make: Callable[[], T]) -> T:
    """Returns what process 0 makes of `make()`, on every process; the others do not call it."""
    if _session is None:
        return make()
    content = pickle.dumps(make()) if primary() else None
    barrier("a message")
    return pickle.loads(devices.broadcast(content))  # written by this run's own process 0


def check_same(what: str, mine: Mapping[str, Any]) -> None:
    """Refuses a run whose processes do not have the same.

    Args:
      what: what is compared, as it is called in the message.
      mine: its parts, as plain values.

    Raises:
      ConfigError: on every process; names the process and the parts that differ.
    """
    if _session is None:
        return
    key = f"{SAME}{_session.number}/"
    _session.client.key_value_set(f"{key}{_session.which}", json.dumps(mine, default=str))
    barrier(what)
    found = {k: json.loads(text) for k, text in _session.client.key_value_dir_get(key)}
    for which in range(1, _session.count):
        if different := differences(found[f"{key}0"], found[f"{key}{which}"]):
            lines = "\n".join(f"  {line}" for line in different)
            raise ConfigError(
                f"The {what} of {_session.names[which]} is not that of process 0; all processes need the same:\n{lines}"
            )


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns a line for each part that two processes do not have alike."""
    absent = "absent"
    return [
        f"{name}: {first.get(name, absent)!r} on process 0, {other.get(name, absent)!r} there"
        for name in sorted(first.keys() | other.keys())
        if first.get(name, absent) != other.get(name, absent)
    ]


def on_primary(make: Callable[[], Any]) -> Any:
    """Returns `make()` on process 0, and elsewhere something that does nothing whatever is called."""
    return make() if primary() else _Nothing()


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None
