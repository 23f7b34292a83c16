"""The terminal output at the end of a run: results, verdicts, certificate and cost."""

from collections.abc import Mapping
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from drep_jax.report.blocks import Table, as_text
from drep_jax.report.comparisons import verdict
from drep_jax.report.lines import (
    certificate_lines,
    cost_lines,
    coverage_line,
    left_out_lines,
    neighbor_note,
    no_metrics_line,
    unreadable_lines,
)
from drep_jax.report.schema import plain, validate
from drep_jax.report.tables import EXPORTED_NOTE, recovery_table, results_table

MOST_METRICS = 2
"""Most metrics in the console's table, so that it fits in 110 columns; report.md has them all."""


def console_table(report: Mapping[str, Any]) -> str:
    """Returns the text for a complete report; its tables are about 105 columns wide."""
    report = plain(report)
    validate(report)
    parts = []
    if report["metrics"]:
        parts.append(drawn_table(results_table(report, MOST_METRICS)) + f"\n\n{EXPORTED_NOTE}")
        parts.append("\n".join(verdict(name, entry, report["exported"]) for name, entry in report["metrics"].items()))
    else:
        parts.append(no_metrics_line(report))
    for name, source in (report.get("sources") or {}).items():
        table = drawn_table(results_table({**report, "metrics": source["metrics"]}, MOST_METRICS))
        parts.append(f"{neighbor_note(name, source)}\n{table}")
    if report.get("recovery"):
        parts.append(
            "Fraction of the labeled fine-tuning's recovery\n" + drawn_table(recovery_table(report["recovery"]))
        )
    lines = [*certificate_lines(report["certificate"]), *cost_lines(report["cost"]), coverage_line(report)]
    lines += left_out_lines(report["metrics"]) + unreadable_lines(report)
    return "\n\n".join([*parts, "\n".join(lines)])


def drawn_table(table: Table) -> str:
    """Returns a table in plain text."""
    rows: list[Any] = []
    for index, row in enumerate(table.rows):
        rows += [SEPARATING_LINE] if index and index in table.groups else []
        rows.append([as_text(cell) for cell in row])
    align = ["left" if letter == "l" else "right" for letter in table.align]
    return tabulate(rows, table.headers, tablefmt="simple", disable_numparse=True, colalign=align)
