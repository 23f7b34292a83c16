"""How the processes of a run find each other: the flags, and whether they fit together."""

import re
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from drep_jax.errors import ConfigError


class Hosts(NamedTuple):
    """How this process finds the others.

    Attributes:
      distributed: whether the cluster's own settings provide what is not given.
      coordinator_address: HOST:PORT of process 0.
      num_processes, process_id: the number of processes, and the index of this one.
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
        """Whether there is more than one process.

        >>> Hosts().several, Hosts(num_processes=2).several, Hosts(distributed=True).several
        (False, True, True)
        """
        return self.distributed or (self.num_processes or 1) > 1


def define_flags() -> Callable[[], Hosts]:
    """Defines the flags of a run over several processes; returns a function that reads them."""
    distributed = flags.DEFINE_bool(
        "distributed", False, "Join the processes of a TPU pod slice, SLURM or Open MPI job, which say who they are."
    )
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for all processes.")
    count = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.")
    index = flags.DEFINE_integer("process_id", None, "Index of this process: 0, 1, …")
    heartbeat = flags.DEFINE_float("heartbeat", 60.0, "Seconds of silence after which another process counts as dead.")
    timeout = flags.DEFINE_integer("join_timeout", 300, "Seconds in which all processes must have been started.")

    def parsed() -> Hosts:
        return Hosts(distributed.value, address.value, count.value, index.value, heartbeat.value, timeout.value)

    return parsed


def check(hosts: Hosts) -> None:
    """Checks that the flags fit together.

    Raises:
      ConfigError: naming the flag.
    """
    count, index, address = hosts.num_processes, hosts.process_id, hosts.coordinator_address
    if count is not None and count < 1:
        raise ConfigError(f"--num_processes={count} must be at least 1.")
    if index is not None and (index < 0 or (count is not None and index >= count)):
        allowed = "0, 1, …" if count is None else f"0…{count - 1}, because --num_processes={count}"
        raise ConfigError(f"--process_id={index} must be one of {allowed}.")
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise ConfigError(f"--coordinator_address={address} must be HOST:PORT, such as 10.0.0.1:1234.")
    if not hosts.heartbeat >= 1:
        raise ConfigError(f"--heartbeat={hosts.heartbeat:g} must be at least 1 second.")
    if hosts.join_timeout < 1:
        raise ConfigError(f"--join_timeout={hosts.join_timeout} must be at least 1 second.")
    if hosts.distributed:
        return
    values = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        given = " and ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        raise ConfigError(
            f"{given} alone does not say which run to join: give {' and '.join(missing)} too, or --distributed where "
            "the cluster knows (TPU pod slices, SLURM, Open MPI)."
        )
