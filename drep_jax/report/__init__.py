"""The report of a run: report.json, report.md, report.html, the plots and the console table.

All are made from one plain dict, whose keys docs/report.md describes. A difference is printed with
its paired confidence interval and one word: "higher", "lower" or "not significant".
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from drep_jax.errors import CheckpointError
from drep_jax.files import utf8, write_bytes
from drep_jax.report.as_html import html
from drep_jax.report.as_markdown import markdown
from drep_jax.report.comparisons import verdict
from drep_jax.report.console import console_table
from drep_jax.report.evaluation import evaluation_markdown, evaluation_text
from drep_jax.report.lines import data_lines
from drep_jax.report.plots import PLOTS
from drep_jax.report.schema import KEYS, SCHEMA, plain, validate

__all__ = [
    "KEYS",
    "PLOTS",
    "SCHEMA",
    "console_table",
    "data_lines",
    "evaluation_text",
    "html",
    "markdown",
    "plain",
    "validate",
    "verdict",
    "write_evaluation",
    "write_report",
]


def write_report(report: Mapping[str, Any], workdir: str) -> None:
    """Writes report.json, report.md, report.html and plots/*.png.

    Each appears whole or not at all, report.json last.

    Args:
      report: what docs/report.md describes; NumPy numbers are fine, NaN and Inf become null.
      workdir: the folder to write to; made when absent. A plot with nothing to show is not written.

    Raises:
      DataError: for a report with missing keys or values that JSON has no form for.
      CheckpointError: where the folder cannot be written to.
    """
    report = plain(report)
    validate(report)
    plots = {name: image for name, draw in PLOTS.items() if (image := draw(report)) is not None}
    for name in PLOTS:
        path = os.path.join(workdir, "plots", f"{name}.png")
        if name in plots:
            _write(path, plots[name])
        else:  # left by an earlier report, it would mislead
            _remove(path)
    _write(os.path.join(workdir, "report.md"), utf8(markdown(report, plots)))
    _write(os.path.join(workdir, "report.html"), utf8(html(report, plots)))
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    _write(os.path.join(workdir, "report.json"), utf8(text + "\n"))


def write_evaluation(content: Mapping[str, Any], folder: str) -> None:
    """Writes evaluation.md and evaluation.json, whole or not at all.

    Args:
      content: `config`, `environment`, `arms`, `data` and `metrics`; see docs/running.md.
      folder: to write to.

    Raises:
      CheckpointError: where the folder cannot be written to.
    """
    content = plain(content)
    _write(os.path.join(folder, "evaluation.md"), utf8(evaluation_markdown(content)))
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    _write(os.path.join(folder, "evaluation.json"), utf8(text + "\n"))


def _write(path: str, content: bytes) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror}. Free some space or make the place writable, then give the same command "
            "again."
        ) from error


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error.strerror}. Remove it by hand.") from error
