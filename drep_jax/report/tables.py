"""The tables of results, shared by console and report."""

from collections.abc import Mapping
from typing import Any

from drep_jax.evaluation.summary import arms_of
from drep_jax.report.blocks import Cell, Table, Word
from drep_jax.report.comparisons import compare
from drep_jax.report.formatting import decimals_of, fixed, p_value

EXPORTED_NOTE = "The arm marked * was exported: its weights are in fused/."


def results_table(report: Mapping[str, Any], most_metrics: int | None = None) -> Table:
    """Returns a row per arm and condition: scores, and the change of the first metric."""
    results = report["metrics"]
    metrics = list(dict.fromkeys(name for entry in results.values() for name in entry["baseline"]))[:most_metrics]
    rows: list[list[Cell]] = []
    groups = []
    for condition, entry in results.items():
        groups.append(len(rows))
        for index, (arm, scores) in enumerate(arms_of(entry).items()):
            comparisons = (row for row in compare(entry, arm) if (row.metric, row.theirs) == (metrics[0], "baseline"))
            first = next(comparisons, None)
            rows.append(
                [
                    *([condition, str(entry["n"])] if index == 0 else ["", ""]),
                    f"{arm} *" if arm == report["exported"] else arm,
                    *(fixed(scores.get(name), decimals_of(entry["n"])) for name in metrics),
                    *([first, p_value(first.p), Word(first.word, first.direction)] if first else [""] * 3),
                ]
            )
    headers = ["condition", "n", "arm", *metrics, f"{metrics[0]} against baseline", "p", "verdict"]
    return Table(headers, rows, "lrl" + "r" * len(metrics) + "rrl", groups)


def recovery_table(recovery: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Returns each arm's fraction of the labeled fine-tuning's recovery, one row per condition."""
    arms = list(dict.fromkeys(arm for shares in recovery.values() for arm in shares))
    rows = []
    for condition, shares in recovery.items():
        known = [shares.get(arm) for arm in arms]
        rows.append(
            [condition, *("–" if share is None else f"{100 * share:.0f} %".replace("-", "−") for share in known)]
        )
    return Table(["condition", *arms], rows, "l" + "r" * len(arms))
