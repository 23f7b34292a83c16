"""The tables on results that the console and the report share."""

from collections.abc import Mapping
from typing import Any

from drep_jax.evaluation.summary import arms_of
from drep_jax.report.blocks import Cell, Table, Word
from drep_jax.report.comparisons import compare
from drep_jax.report.formatting import decimals_of, fixed, p_value

EXPORTED_NOTE = "The arm marked * was exported: its weights are in fused/."


def results_table(report: Mapping[str, Any], most_metrics: int | None = None) -> Table:
    """Returns one row an arm and condition: its scores, and the first metric's difference from the baseline."""
    results = report["metrics"]
    metrics = list(dict.fromkeys(name for entry in results.values() for name in entry["baseline"]))[:most_metrics]
    rows: list[list[Cell]] = []
    groups = []
    for condition, entry in results.items():
        groups.append(len(rows))
        for index, (arm, scores) in enumerate(arms_of(entry).items()):
            found = [row for row in compare(entry, arm) if (row.metric, row.theirs) == (metrics[0], "baseline")]
            rows.append(
                [
                    *([condition, str(entry["n"])] if index == 0 else ["", ""]),
                    f"{arm} *" if arm == report["exported"] else arm,
                    *(fixed(scores.get(name), decimals_of(entry["n"])) for name in metrics),
                    *([found[0], p_value(found[0].p), Word(found[0].word, found[0].direction)] if found else [""] * 3),
                ]
            )
    headers = ["condition", "n", "arm", *metrics, f"{metrics[0]} against baseline", "p", "verdict"]
    return Table(headers, rows, "lrl" + "r" * len(metrics) + "rrl", groups)


def recovery_table(recovery: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Returns the share of the labelled fine-tuning's recovery, one row a condition, one column an arm."""
    arms = list(dict.fromkeys(arm for shares in recovery.values() for arm in shares))
    rows = []
    for condition, shares in recovery.items():
        known = [shares.get(arm) for arm in arms]
        rows.append(
            [condition, *("–" if share is None else f"{100 * share:.0f} %".replace("-", "−") for share in known)]
        )
    return Table(["condition", *arms], rows, "l" + "r" * len(arms))
