"""Metrics as JSON lines, TensorBoard events and, optionally, a run of Weights & Biases."""

import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from drep_jax.errors import CheckpointError, ConfigError, lookup
from drep_jax.files import whole, write_text
from drep_jax.training.checkpoint import OLD_STAGES

FILE = "metrics.jsonl"
CLOCK = ("seconds", "images_per_second")
"""Values that differ when the same run is repeated."""


class MetricWriter:
    """Writes the scalars of stages.

    A resumed stage first drops its lines after the step it resumes from.

    Every line is written at once, in the caller's thread, so a full disk is noticed immediately.
    """

    def __init__(
        self, workdir: str, *, wandb: Mapping[str, Any] | None = None, record: Mapping[str, Any] | None = None
    ) -> None:
        """Opens the files.

        Args:
          workdir: of the run.
          wandb: options of Weights & Biases, the section `wandb` of a configuration; None, or one without a project, for
            none.
          record: what is kept there of the run, its whole configuration.

        Raises:
          CheckpointError: if they cannot be written.
          ConfigError: if Weights & Biases is configured and does not start.
        """
        self._path = os.path.join(workdir, FILE)
        self._folder = os.path.join(workdir, "tensorboard")
        self._wandb = _WeightsAndBiases(workdir, wandb, record or {}) if wandb and wandb["project"] else None
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._board = EventsWriter(os.path.join(self._folder, "events"), f".{os.getpid()}")
        except OSError as error:
            raise _not_written(self._folder, error) from error

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one line: {"stage", "step", …values}.

        Raises:
          CheckpointError: if it cannot be written.
        """
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
            for name, value in values.items():
                event = Event(step=step, wall_time=time.time(), summary=scalar(f"{stage}/{name}", value))
                self._board.write_event(event)
            self._board.flush()
        except OSError as error:
            raise _not_written(self._path, error) from error
        if self._wandb:
            self._wandb.write(stage, step, values)

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`.

        Raises:
          CheckpointError: if the file cannot be written.
        """
        names = _names(stage)
        lines = [{**line, "stage": stage} if line["stage"] in names else line for line in read_metrics(self._path)]
        if self._wandb:
            self._wandb.rewind(stage, [line["step"] for line in lines if line["stage"] == stage])
        remaining = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        try:
            with whole(self._path) as file:
                file.writelines(json.dumps(line) + "\n" for line in remaining)
        except OSError as error:
            raise _not_written(self._path, error) from error

    def close(self) -> None:
        """Closes the event file and ends the run of Weights & Biases."""
        if self._wandb:
            self._wandb.close()
        try:
            self._board.close()
        except OSError as error:
            raise _not_written(self._folder, error) from error


def _not_written(path: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Cannot write {path}: {error.strerror or error}. Checkpoints are untouched; free some space or make the place "
        "writable, then give the same command again."
    )


def read_metrics(path: str) -> Iterable[dict[str, Any]]:
    """Returns the lines of a metrics file; an incomplete last line, left by a crash, is skipped."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def lines_of(workdir: str, stage: str) -> list[dict[str, Any]]:
    """Returns the lines of a stage, also of one logged by the first release under another name."""
    return [line for line in read_metrics(os.path.join(workdir, FILE)) if line["stage"] in _names(stage)]


def _names(stage: str) -> tuple[str, ...]:
    return stage, OLD_STAGES.get(stage, stage)


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases (optional)
# ---------------------------------------------------------------------------------------------------------------------

MODES = {"online": "online", "offline": "offline"}


def check_wandb(options: Mapping[str, Any]) -> None:
    """Checks the settings of `wandb`.

    Raises:
      ConfigError: naming the setting, or the missing package.
    """
    lookup(MODES, options["mode"], "wandb.mode")
    ignored = [name for name in ("entity", "name", "group", "tags") if options[name]]
    if not options["project"] and ignored:
        raise ConfigError(
            f"{', '.join(f'wandb.{name}' for name in ignored)} would have no effect: give --config.wandb.project=NAME too."
        )
    if options["project"]:
        _package()


def _package() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb.project needs the package wandb, which is optional ({error}): pip install -r requirements-wandb.txt"
        ) from error
    return wandb


class _WeightsAndBiases:
    """One run there for one work directory, also when it is resumed."""

    def __init__(self, workdir: str, options: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        wandb = _package()
        try:
            self._run = wandb.init(
                project=options["project"],
                entity=options["entity"] or None,
                name=options["name"] or os.path.basename(os.path.abspath(workdir)),
                group=options["group"] or None,
                tags=list(options["tags"]) or None,
                mode=options["mode"],
                dir=workdir,
                id=_identity(workdir),
                resume="allow",
                config=dict(record),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases did not start ({error}). Log in with `wandb login`, or give --config.wandb.mode=offline."
            ) from error
        self._sent: dict[str, int] = {}

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Sends a line, with a step axis per stage.

        Lines sent before a crash are not sent again.
        """
        if step <= self._sent.get(stage, 0):
            return
        if stage not in self._sent:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._sent[stage] = step
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def rewind(self, stage: str, logged: list[int]) -> None:
        """Records the steps of a stage that an earlier start of the run has sent."""
        if logged:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._sent[stage] = max(logged)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _identity(workdir: str) -> str:
    """Returns the run's identifier at Weights & Biases.

    Drawn once, then read from the work directory.
    """
    path = os.path.join(workdir, "wandb_id.txt")
    try:
        if not os.path.exists(path):
            write_text(path, uuid.uuid4().hex[:16] + "\n")
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise _not_written(path, error) from error
