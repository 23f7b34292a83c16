"""report.md: its sections, each a function from a complete report to paragraphs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from drep_jax.report.comparisons import ALPHA, arms_of, compare, verdict
from drep_jax.report.console import NO_METRICS, certificate_lines, cost_lines, coverage_line, outcome, worst_site
from drep_jax.report.formatting import (
    decimals_of,
    fixed,
    markdown_table,
    p_value,
    percent,
    power,
    si,
    signed,
    time_steps,
)
from drep_jax.report.schema import NETWORKS


def _what_ran(report: Mapping[str, Any]) -> list[str]:
    env, learning, certificate = report["environment"], report["learning"], report["certificate"]
    rows = [
        ["date", str(env["date"])],
        ["git revision", str(env["git_revision"])],
        ["device", f"{env['device_count']} × {env['device']}"],
        ["versions", ", ".join(f"{name} {env[name]}" for name in ("drep_jax", "jax", "flax", "python"))],
    ]
    if learning:
        seconds = fixed(learning["seconds"], 1)
        rows.append(
            ["learner", f"{learning['learner']}, {learning['steps']} steps, {learning['images']} images, {seconds} s"]
        )
    if certificate:
        rows.append(["reverse step", f"rule {certificate['rule']}, {certificate['steps']} step(s) a site"])
    rows.append(["coverage", coverage_line(report)])
    settings = "\n".join(f"{name} = {value!r}" for name, value in _flat(report["config"]))
    return [
        f"```\n{env['command']}\n```",
        markdown_table(["", ""], rows, left=2),
        f"<details><summary>Configuration</summary>\n\n```\n{settings}\n```\n\n</details>",
    ]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _results(report: Mapping[str, Any]) -> list[str]:
    if not report["metrics"]:
        return [NO_METRICS]
    parts, intervals = [], 0
    for condition, entry in report["metrics"].items():
        compared = {arm: compare(entry, arm) for arm in ("fused", *entry["control"])}
        intervals += sum(map(len, compared.values()))
        metrics = list(entry["baseline"])
        arms = [
            [arm, *(fixed(values.get(name), decimals_of(entry["n"])) for name in metrics)]
            for arm, values in arms_of(entry).items()
        ]
        rows = [
            [f"{ours} − {row.arm}", row.metric, row.text(), p_value(row.p), row.word]
            for ours, found in compared.items()
            for row in found
        ]
        parts += [
            f"### {condition} ({entry['n']} test images)",
            verdict(condition, entry),
            markdown_table(["arm", *(f"{name} (%)" for name in metrics)], arms),
            markdown_table(["difference", "metric", "points [95 % interval]", "McNemar p", "verdict"], rows, left=2),
        ]
    parts.append(
        f"Intervals are paired bootstrap intervals over the same test images, each by itself: of {intervals} intervals "
        f"at 95 %, about {0.05 * intervals:.1f} would exclude zero by chance if nothing had changed. Where McNemar's p "
        f"is given, significant needs p < {ALPHA} too. Not significant means that no difference was shown, not that "
        "there is none."
    )
    return parts


def _certificate(report: Mapping[str, Any]) -> list[str]:
    certificate = report["certificate"]
    lines = certificate_lines(certificate)
    if certificate is None:
        return lines
    rows = []
    for name, result in certificate["results"].items():
        for label, row in (("end to end", result), ("worst site", worst_site(result))):
            if row is not None:
                where = (
                    label
                    if row is result
                    else f"worst site: {row['path']}, slice {row['slice']}, t = {time_steps(row['t'])}"
                )
                numbers = [power(row["error"]), power(row["bound"]), percent(row["change"]), outcome(row)]
                rows.append([name, where, *numbers])
    return [
        f"**{lines[0].strip()}**",
        markdown_table(["precision", "where", "error", "bound", "change", "outcome"], rows, left=2),
        f"Structure: {lines[-1].strip()}.",
        "error = ‖(fused − base) − (explicit − base)‖ / ‖explicit − base‖; bound = what rounding allows for it; "
        "change = ‖explicit − base‖ / ‖base‖.",
    ]


def _cost(report: Mapping[str, Any]) -> list[str]:
    cost = report["cost"]
    if cost is None:
        return cost_lines(cost)
    rows = []
    for arm in NETWORKS:
        ratios = (cost["flop_ratio"].get(arm, 1.0), cost["latency_ratio"].get(arm, 1.0))
        by_flops, by_latency = (
            "–" if ratio is None else f"{fixed(ratio, digits)}×" for ratio, digits in zip(ratios, (3, 2), strict=True)
        )
        rows.append([arm, si(cost["flops"][arm]), by_flops, fixed(cost["latency_ms"][arm], 2), by_latency])
    parameters = cost["parameters"]
    return [
        markdown_table(["network", "FLOPs", "ratio", "latency (ms)", "ratio"], rows),
        f"Per batch of {cost['batch']}. The backbone has {si(parameters['backbone'])} parameters, fused or not; the "
        f"{si(parameters['denoise'])} of the denoisers are gone after fusion.",
    ]


def _sites(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for site in report["sites"]:
        known = [value for value in site["relative_change"] if value is not None]
        change = percent(max(known)) if known else "–"
        if len(known) > 1:
            change = f"{percent(min(known))} … {change}"
        form = f"{site['width']}" + (f" × {site['groups']} groups" if site["groups"] != 1 else "")
        rows.append([site["path"], site["kind"], form, "yes" if site["bias"] else "no", time_steps(site["t"]), change])
    return [
        markdown_table(["site", "kind", "width", "bias", "t", "‖W′ − W‖ / ‖W‖"], rows, left=2),
        "Of stacked layers, t is that of the first and last slice, and the change the smallest and largest."
        if any(len(site["t"]) > 1 for site in report["sites"])
        else "One t and one relative change of the weights a site.",
    ]


def _learning(report: Mapping[str, Any]) -> list[str]:
    learning = report["learning"]
    if learning is None:
        return ["Nothing was learned in this run; the denoisers were given."]
    optimum = learning["optimum"] or {}
    rows, known = [], []
    for path, (initial, final) in learning["per_site"].items():
        best = optimum.get(path)
        gap = math.nan if best is None or final is None else final - best
        rows.append([path, *(fixed(value, 4) for value in (initial, final, best)), signed(gap, 4)])
        if initial is not None and not math.isnan(gap):
            known.append((initial, final, best))
    if known:
        initial, final, best = (sum(column) for column in zip(*known, strict=True))
        text = f"Sum over the sites: {initial:.4f} → {final:.4f}, optimum {best:.4f}, gap {signed(final - best, 4)}"
        if initial > best:
            text += f"; {100 * (initial - final) / (initial - best):.1f} % of the possible reduction was reached"
        parts = [text + "."]
    else:
        parts = ["The optimum is not known for this learner, so how much is left to learn is not known either."]
    if rows:
        headers = ["site", "initial loss", "final loss", "optimum", "gap"]
        parts.append(
            markdown_table(headers if optimum else headers[:3], rows if optimum else [row[:3] for row in rows])
        )
    return parts


SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "What ran": _what_ran,
    "Results": _results,
    "Certificate": _certificate,
    "Cost": _cost,
    "Sites": _sites,
    "Learning": _learning,
}
"""By title, in the order of report.md, what returns the paragraphs of a section."""


def markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """Returns report.md for a complete report, with links to `plots`."""
    pictures = {"Results": "plots/accuracy.png", "Sites": "plots/sites.png", "Learning": "plots/loss.png"}
    parts = ["# DenoiseRep report"]
    for title, section in SECTIONS.items():
        parts += [f"## {title}", *section(report)]
        if pictures.get(title) in plots:
            parts.append(f"![{title}]({pictures[title]})")
    return "\n\n".join(parts) + "\n"
