"""Metrics as JSON lines and TensorBoard events in the work directory."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import tensorboardX

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars of a stage; a resumed stage first drops what it logged beyond the step it resumes from."""

    def __init__(self, workdir: str) -> None:
        self._path = os.path.join(workdir, FILE)
        self._board = tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {"stage", "step", …values}."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the lines of `stage` after `step`."""
        kept = [line for line in read_metrics(self._path) if line["stage"] != stage or line["step"] <= step]
        temporary = self._path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(temporary, self._path)

    def close(self) -> None:
        """Flushes the event file."""
        self._board.close()


def read_metrics(path: str) -> Iterable[dict[str, Any]]:
    """Returns the lines of a metrics file; an incomplete last line, left by a crash, is passed over."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines
