"""One process of several: joins the others, and stops with a message when one is gone."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge

from drep_jax.errors import ConfigError
from drep_jax.parallel.hosts import Hosts

EXIT_PEER = 4
"""Exit status of a process that ends because another one did."""


GRACE = 3.0
"""Seconds that a process has to find an error by itself that another one has reported."""


LONG = 7 * 24 * 3600 * 1000
"""Milliseconds that processes wait for each other.

The heartbeat notices sooner if one of them is gone.
"""


ALIVE, ENDED = "drep_jax/alive/", "drep_jax/ended/"


def end_process(status: int) -> NoReturn:
    """Ends this process at once, after writing out what it has printed.

    The interpreter's own end destroys the objects of XLA while its threads still compile or run
    with them, which crashes (signal 11), and JAX's farewell waits for processes that no longer
    come. The system does neither.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    os._exit(status)


class Session:
    """Membership of this process in a run, with a thread that sends and receives heartbeats.

    Attributes:
      client: JAX's key-value store and barriers, held by the coordinator.
      index, count: the index of this process, and the number of processes.
      names: of all processes, for messages.
      barriers: number of barriers that all processes have passed.
      interval: seconds between heartbeats.
    """

    def __init__(self, hosts: Hosts) -> None:
        """Waits until all processes have joined.

        Raises:
          ConfigError: if a device was used before, or the cluster does not say which process this
            is.
        """
        if xla_bridge.backends_are_initialized():
            raise ConfigError("Processes must join before a device is used; this one has used its devices already.")
        self.hosts = hosts
        self.interval = min(2.0, hosts.heartbeat / 4)
        self.barriers = 0
        self._done = threading.Event()
        self._joining = True
        self._handler: Any = None
        self._catch_aborts()
        by_hand = not hosts.distributed
        # The preemption service would handle SIGTERM instead of us.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                hosts.coordinator_address,
                hosts.num_processes,
                hosts.process_id,
                cluster_detection_method="deactivate" if by_hand else None,
                initialization_timeout=hosts.join_timeout,
                # Our heartbeat must come first, since it has a message. A process that ends with an
                # error waits briefly.
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
        self.index, self.count = state.process_id, state.num_processes
        self.names = {
            index: f"process {index} of {self.count}" + (f" on {host}" if host else "")
            for index, host in enumerate(self._host_names())
        }
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def _host_names(self) -> list[str]:
        self.client.key_value_set(f"drep_jax/host/{self.index}", socket.gethostname())
        self.client.wait_at_barrier("drep_jax/introduced", 1000 * self.hosts.join_timeout)
        names = dict(self.client.key_value_dir_get("drep_jax/host/"))
        return [names.get(f"drep_jax/host/{index}", "") for index in range(self.count)]

    def barrier(self, name: str) -> None:
        """Waits until every process is here; on the CPU, so it may take as long as it takes."""
        self.barriers += 1
        self.client.wait_at_barrier(f"drep_jax/{self.barriers}/{name}", LONG)

    def end(self) -> None:
        """Waits for all processes, then leaves them."""
        self.barrier("the end")
        self._done.set()
        self._thread.join()
        jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def report(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error.

        If the error says that another process is gone, it first waits for the heartbeat to find out
        which.
        """
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            wait = self.hosts.heartbeat + 2 * self.interval + GRACE
            print(
                f"\nAn operation failed; waiting {wait:.0f} s for word that another process is gone.", file=sys.stderr
            )
            time.sleep(wait)  # the heartbeat thread then ends the process
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{ENDED}{self.index}", reason, True)
        self._done.set()
        # For an error that nobody handles. It runs before JAX's own farewell, which would wait for
        # the others.
        atexit.register(self.leave, 1)

    def leave(self, status: int) -> NoReturn:
        """Ends this process after an error; process 0 first lets the others read the reason."""
        if self.index == 0:
            time.sleep(2 * self.interval)
        end_process(status)

    # ---- the heartbeat thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beats = 0
        now = time.monotonic()
        last_heard = dict.fromkeys(range(self.count), (None, now))
        reached = now
        while not self._done.wait(self.interval):
            beats += 1
            try:
                self.client.key_value_set(f"{ALIVE}{self.index}", str(beats), True)
                alive, ended = (dict(self.client.key_value_dir_get(key)) for key in (ALIVE, ENDED))
                reached = time.monotonic()
            except jax.errors.JaxRuntimeError:
                if time.monotonic() - reached > self.hosts.heartbeat:
                    self._stop(f"{self.names[0]} cannot be reached at {self.address}", reached)
                continue
            for index in range(self.count):
                beat = alive.get(f"{ALIVE}{index}")
                if beat != last_heard[index][0]:
                    last_heard[index] = (beat, reached)
                elif index != self.index and reached - last_heard[index][1] > self.hosts.heartbeat:
                    self._stop(f"{self.names[index]} is gone: it was killed, or lost its machine", last_heard[index][1])
            for index in range(self.count):
                if index != self.index and (reason := ended.get(f"{ENDED}{index}")) is not None:
                    if not self._done.wait(GRACE):
                        self._stop(f"{self.names[index]} ended: {reason}")
                    return

    def _stop(self, event: str, since: float | None = None) -> NoReturn:
        silence = "" if since is None else f" (no word from it for {time.monotonic() - since:.0f} s)"
        print(
            f"\nError: {event[0].upper()}{event[1:]}{silence}. This process stops, too: a run needs all of its "
            f"processes. To go on from the last checkpoint, start all {self.count} processes again with the same "
            "commands.",
            file=sys.stderr,
        )
        end_process(EXIT_PEER)

    def _catch_aborts(self) -> None:
        """Handles the abort() with which JAX ends a process whose coordinator is gone."""

        def handle(number: int) -> None:
            del number
            if self._joining:
                hosts = self.hosts
                address = hosts.coordinator_address or "the cluster's address"
                print(
                    f"\nError: The processes did not all find each other at {address} within {hosts.join_timeout} s "
                    f"(--join_timeout). Check that each of the {hosts.num_processes or 'expected'} runs once, under a "
                    "--process_id of its own, that all are given the same address, and that process 0 can be reached "
                    "there.",
                    file=sys.stderr,
                )
                end_process(EXIT_PEER)
            if self.index and not _answers(self.address):
                self._stop(f"{self.names[0]}, the coordinator at {self.address}, is gone")

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)


def _answers(address: str) -> bool:
    """Returns whether anything listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except OSError:
        return False
