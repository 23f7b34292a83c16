"""The report of a run: report.json as given, report.md and the final console table to read, and plots.

Everything is made from one plain dict, whose keys docs/report.md describes. Differences are printed with their paired
interval and one word, "significant" or "not significant".
"""

import dataclasses
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from drep_jax.errors import CheckpointError, DataError
from drep_jax.statistics import Interval

SCHEMA = 1
ALPHA = 0.05
"""Level of McNemar's test, that of the 95 % intervals."""

_THREE = {"baseline": None, "fused": None, "explicit": None}
_FIGURE = {"passed": None, "error": None, "bound": None, "change": None}
# "*" stands for every entry of a list or an object; a trailing "?" for a value that may be null.
KEYS: dict[str, Any] = {
    "schema": None,
    "config": {},
    "environment": dict.fromkeys(
        ("drep_jax", "jax", "flax", "python", "device", "device_count", "command", "git_revision", "date")
    ),
    "sites": {
        "*": dict.fromkeys(("path", "layers", "kind", "width", "groups", "bias")) | {"t": {}, "relative_change": {}}
    },
    "coverage": dict.fromkeys(("layers", "candidates", "kernel_share")),
    "learning?": {
        "learner": None,
        "steps": None,
        "seconds": None,
        "loss": {},
        "per_site": {},
        "optimum?": {},
        "images": None,
    },
    "metrics": {
        "*": {"n": None, "baseline": {}, "control": {}, "fused": {}, "difference": {}, "interval": {}, "mcnemar": {}}
    },
    "certificate?": {
        "passed": None,
        "rule": None,
        "steps": None,
        "results": {"*": _FIGURE | {"sites": {"*": _FIGURE | {"path": None, "slice": None, "t": {}}}}},
        "structure": dict.fromkeys(("same_tree", "same_dtypes", "same_program")),
    },
    "cost?": {
        "flops": _THREE,
        "flop_ratio": {"fused": None, "explicit": None},
        "latency_ms": _THREE,
        "latency_ratio": {"fused": None, "explicit": None},
        "parameters": {"backbone": None, "denoise": None},
        "batch": None,
    },
}
"""The required keys of a report; further keys are kept and not shown."""


def write_report(report: Mapping[str, Any], workdir: str) -> None:
    """Writes report.json, report.md and plots/*.png; each appears whole or not at all, report.json last.

    Args:
      report: what docs/report.md describes; NumPy numbers are fine, NaN and Inf become null.
      workdir: the folder to write to; made when absent. A plot with nothing to show is not written.

    Raises:
      DataError: for a report with missing keys or values that JSON has no form for.
      CheckpointError: where the folder cannot be written to.
    """
    report = plain(report)
    validate(report)
    plots = {f"plots/{name}.png": image for name, draw in PLOTS.items() if (image := draw(report)) is not None}
    for name in PLOTS:
        if f"plots/{name}.png" not in plots:  # an earlier run's picture next to this report would mislead
            _remove(os.path.join(workdir, f"plots/{name}.png"))
    for name, image in plots.items():
        _write(os.path.join(workdir, name), image)
    _write(os.path.join(workdir, "report.md"), markdown(report, sorted(plots)).encode())
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    _write(os.path.join(workdir, "report.json"), (text + "\n").encode())


def validate(report: Mapping[str, Any]) -> None:
    """Checks that every key that docs/report.md promises is there.

    Raises:
      DataError: naming every missing key with its place, up to a dozen.
    """
    problems = list(_problems(report, KEYS, ""))
    if not problems and report["schema"] != SCHEMA:
        problems.append(f"schema is {report['schema']!r}, expected {SCHEMA}")
    if not problems:
        problems = [*_site_problems(report["sites"]), *_metric_problems(report["metrics"])]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise DataError(f"Not a complete report: {'; '.join(problems[:12])}{more}. See docs/report.md for its keys.")


def plain(value: Any, where: str = "report") -> Any:
    """Returns `value` as JSON knows it: tuples and arrays as lists, NumPy numbers as numbers, NaN and Inf as null.

    Raises:
      DataError: naming the place of a value that has no such form.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise DataError(f"{where} is a {type(value).__name__}; expected numbers, text, booleans, lists or dicts.")


def verdict(condition: str, result: Mapping[str, Any]) -> str:
    """Returns one sentence on the first metric under one condition, which claims no more than the intervals show.

    Args:
      condition: such as "clean" or "gaussian:50".
      result: its entry in report["metrics"].
    """
    metric = next(iter(result["baseline"]))
    first, *controls = [row for row in _comparisons(result) if row.metric == metric]
    words = {"higher": "Significantly higher", "lower": "Significantly lower"}.get(
        first.direction, "No significant change"
    )
    sentence = f"{words} on {condition} images: {metric} {first.text('points ')} against the unchanged backbone"
    beside = {
        "higher": "significantly higher than",
        "lower": "significantly lower than",
        "": "no significant change from",
    }
    if controls:
        sentence += "; " + ", ".join(f"{beside[row.direction]} {row.arm}" for row in controls)
    # A change is denoising's only if it also beats what the same maps at random, or the same training without it, give.
    if first.direction and not controls:
        sentence += "; no control arm ran, so denoising is not shown to be the cause"
    elif first.direction and any(row.direction != first.direction for row in controls):
        sentence += ", so denoising is not shown to be the cause"
    return sentence + "."


def console_table(report: Mapping[str, Any]) -> str:
    """Returns what a person reads in the terminal at the end: results, verdicts, certificate and cost."""
    report = plain(report)
    validate(report)
    lines = []
    if report["metrics"]:
        metrics = list(dict.fromkeys(name for entry in report["metrics"].values() for name in entry["baseline"]))
        rows = []
        for condition, entry in report["metrics"].items():
            first = next(iter(entry["baseline"]))
            against = {row.arm: row for row in _comparisons(entry) if row.metric == first}
            for index, (arm, values) in enumerate(_arms(entry).items()):
                row = against.get(arm)
                told = [row.text(), _p(row.p), row.word] if row else ["", "", ""]
                numbers = [_fixed(values.get(name), _decimals(entry["n"])) for name in metrics]
                rows.append([*([condition, str(entry["n"])] if index == 0 else ["", ""]), arm, *numbers, *told])
        headers = ["condition", "n", "arm", *metrics, f"fused − arm ({metrics[0]})", "p", "verdict"]
        align = ["left", "right", "left", *["right"] * len(metrics), "right", "right", "left"]
        lines += [tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=align), ""]
        lines += [verdict(condition, entry) for condition, entry in report["metrics"].items()]
    else:
        lines.append(_NO_METRICS)
    return "\n".join(
        [*lines, "", *_certificate_lines(report["certificate"]), *_cost_lines(report["cost"]), _coverage(report)]
    )


def markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """Returns report.md for a complete report, with links to `plots`."""
    sections = {
        "What ran": _what_ran,
        "Results": _results,
        "Certificate": _certificate,
        "Cost": _cost,
        "Sites": _sites,
        "Learning": _learning,
    }
    pictures = {"Results": "plots/accuracy.png", "Sites": "plots/sites.png", "Learning": "plots/loss.png"}
    parts = ["# DenoiseRep report"]
    for title, section in sections.items():
        parts += [f"## {title}", *section(report)]
        if pictures.get(title) in plots:
            parts.append(f"![{title}]({pictures[title]})")
    return "\n\n".join(parts) + "\n"


# ---- comparisons ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """One arm against another, `arm`, in one metric."""

    arm: str
    metric: str
    interval: Interval
    p: float | None
    decimals: int

    @property
    def direction(self) -> str:
        """Returns "higher" or "lower" where the interval and, if there is one, McNemar's test say so; else ""."""
        if not self.interval.significant or (self.p is not None and self.p >= ALPHA):
            return ""
        return "higher" if self.interval.low > 0 else "lower"

    @property
    def word(self) -> str:
        return "significant" if self.direction else "not significant"

    def text(self, unit: str = "") -> str:
        values = (self.interval.difference, self.interval.low, self.interval.high)
        difference, low, high = (_signed(value, self.decimals) for value in values)
        return f"{difference} {unit}[{low}, {high}]"


def _comparisons(result: Mapping[str, Any], ours: str = "fused") -> list[_Comparison]:
    """Returns the arm `ours` against the baseline and then each control arm, every metric of each."""
    found = []
    for arm in list(_arms(result))[:-1]:
        key = f"{ours} - {arm}"
        if key not in result["difference"]:  # only fused is compared with all of them
            continue
        for metric, difference in result["difference"][key].items():
            low, high = result["interval"][key][metric]
            interval = Interval(
                math.nan if difference is None else difference,
                -math.inf if low is None else low,
                math.inf if high is None else high,
            )
            decimals = _decimals(result["n"])
            # A bound just off zero must not print as zero beside the word "significant".
            while (
                interval.significant
                and decimals < 5
                and min(abs(interval.low), abs(interval.high)) < 0.5 * 10**-decimals
            ):
                decimals += 1
            p = result["mcnemar"].get(key) if metric == "acc@1" else None
            found.append(_Comparison(arm, metric, interval, p, decimals))
    return found


def _arms(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {"baseline": result["baseline"], **result["control"], "fused": result["fused"]}


# ---- numbers and tables --------------------------------------------------------------------------------------------


def _decimals(n: int) -> int:
    """Returns the decimals of a percentage that one of n items can change."""
    return 1 if n <= 1000 else 2


def _fixed(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _signed(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "+∞" if value > 0 else "−∞"
    text = f"{value:+.{decimals}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _si(value: float | None) -> str:
    if value is None:
        return "–"
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _times(times: Sequence[int]) -> str:
    return ", ".join(map(str, times)) if len(times) <= 4 else f"{times[0]}…{times[-1]}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Returns a Markdown table whose first `left` columns are text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, colalign=align if cells else None)


# ---- sections ------------------------------------------------------------------------------------------------------

_NO_METRICS = (
    "No accuracy: this run had no labelled test images, so no arms could be compared. Whether the features got better "
    "is not known; give labelled test images to find out. Certificate and cost need no labels."
)


def _what_ran(report: Mapping[str, Any]) -> list[str]:
    env, learning, certificate = report["environment"], report["learning"], report["certificate"]
    rows = [
        ["date", str(env["date"])],
        ["git revision", str(env["git_revision"])],
        ["device", f"{env['device_count']} × {env['device']}"],
        ["versions", ", ".join(f"{name} {env[name]}" for name in ("drep_jax", "jax", "flax", "python"))],
    ]
    if learning:
        seconds = _fixed(learning["seconds"], 1)
        rows.append(
            ["learner", f"{learning['learner']}, {learning['steps']} steps, {learning['images']} images, {seconds} s"]
        )
    if certificate:
        rows.append(["reverse step", f"rule {certificate['rule']}, {certificate['steps']} step(s) a site"])
    rows.append(["coverage", _coverage(report)])
    settings = "\n".join(f"{name} = {value!r}" for name, value in _flat(report["config"]))
    return [
        f"```\n{env['command']}\n```",
        _table(["", ""], rows, left=2),
        f"<details><summary>Configuration</summary>\n\n```\n{settings}\n```\n\n</details>",
    ]


def _coverage(report: Mapping[str, Any]) -> str:
    coverage = report["coverage"]
    return (
        f"{len(report['sites'])} sites: {coverage['layers']} of {coverage['candidates']} linear layers, "
        f"{_percent(coverage['kernel_share'])} of the kernel weights."
    )


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _results(report: Mapping[str, Any]) -> list[str]:
    if not report["metrics"]:
        return [_NO_METRICS]
    parts, intervals = [], 0
    for condition, entry in report["metrics"].items():
        compared = {arm: _comparisons(entry, arm) for arm in ("fused", *entry["control"])}
        intervals += sum(map(len, compared.values()))
        metrics = list(entry["baseline"])
        arms = [
            [arm, *(_fixed(values.get(name), _decimals(entry["n"])) for name in metrics)]
            for arm, values in _arms(entry).items()
        ]
        rows = [
            [f"{ours} − {row.arm}", row.metric, row.text(), _p(row.p), row.word]
            for ours, found in compared.items()
            for row in found
        ]
        parts += [
            f"### {condition} ({entry['n']} test images)",
            verdict(condition, entry),
            _table(["arm", *(f"{name} (%)" for name in metrics)], arms),
            _table(["difference", "metric", "points [95 % interval]", "McNemar p", "verdict"], rows, left=2),
        ]
    parts.append(
        f"Intervals are paired bootstrap intervals over the same test images, each by itself: of {intervals} intervals "
        f"at 95 %, about {0.05 * intervals:.1f} would exclude zero by chance if nothing had changed. Where McNemar's p "
        f"is given, significant needs p < {ALPHA} too. Not significant means that no difference was shown, not that "
        "there is none."
    )
    return parts


def _worst(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the site nearest to, or furthest above, its bound; an error that is no number is the worst."""

    def ratio(site: Mapping[str, Any]) -> float:
        if site["error"] is None or not site["bound"]:
            return math.inf
        return site["error"] / site["bound"]

    return max(result["sites"], key=ratio, default=None)


def _certificate_lines(certificate: Mapping[str, Any] | None) -> list[str]:
    if certificate is None:
        return ["Certificate: none was made, so it is not shown that fused equals explicit."]
    lines = [
        f"Certificate: {'PASSED' if certificate['passed'] else 'FAILED'}   "
        f"(rule {certificate['rule']}, {certificate['steps']} step(s) a site)"
    ]
    for name, result in certificate["results"].items():
        worst = _worst(result)
        line = f"  {name:8s} error {_power(result['error'])} of the change, bound {_power(result['bound'])}"
        if worst:
            line += f"; worst site {worst['path']}: {_power(worst['error'])}, bound {_power(worst['bound'])}"
        lines.append(line + f"  {_outcome(result)}")
    marks = (f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in certificate["structure"].items())
    return [*lines, f"  {', '.join(marks)}"]


def _outcome(result: Mapping[str, Any]) -> str:
    if not result["passed"]:
        return "FAILED"
    if result["change"] == 0:
        return "passed (denoising changes nothing)"
    # With a bound of the size of the change, a fusion that does nothing would pass as well.
    return "passed" if result["bound"] is not None and result["bound"] < 1 else "too coarse a type to decide"


def _certificate(report: Mapping[str, Any]) -> list[str]:
    certificate = report["certificate"]
    lines = _certificate_lines(certificate)
    if certificate is None:
        return lines
    rows = []
    for name, result in certificate["results"].items():
        for label, row in (("end to end", result), ("worst site", _worst(result))):
            if row is not None:
                where = (
                    label
                    if row is result
                    else f"worst site: {row['path']}, slice {row['slice']}, t = {_times(row['t'])}"
                )
                numbers = [_power(row["error"]), _power(row["bound"]), _percent(row["change"]), _outcome(row)]
                rows.append([name, where, *numbers])
    return [
        f"**{lines[0].strip()}**",
        _table(["precision", "where", "error", "bound", "change", "outcome"], rows, left=2),
        f"Structure: {lines[-1].strip()}.",
        "error = ‖(fused − base) − (explicit − base)‖ / ‖explicit − base‖; bound = what rounding allows for it; "
        "change = ‖explicit − base‖ / ‖base‖.",
    ]


def _cost_lines(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return ["Cost: not measured."]
    flops, latency = cost["flop_ratio"], cost["latency_ratio"]
    return [
        f"Cost against the baseline: fused {_fixed(flops['fused'], 3)}× FLOPs, {_fixed(latency['fused'], 2)}× latency; "
        f"explicit {_fixed(flops['explicit'], 3)}× FLOPs, {_fixed(latency['explicit'], 2)}× latency."
    ]


def _cost(report: Mapping[str, Any]) -> list[str]:
    cost = report["cost"]
    if cost is None:
        return _cost_lines(cost)
    rows = []
    for arm in _THREE:
        ratios = (cost["flop_ratio"].get(arm, 1.0), cost["latency_ratio"].get(arm, 1.0))
        by_flops, by_latency = (
            "–" if ratio is None else f"{_fixed(ratio, digits)}×" for ratio, digits in zip(ratios, (3, 2), strict=True)
        )
        rows.append([arm, _si(cost["flops"][arm]), by_flops, _fixed(cost["latency_ms"][arm], 2), by_latency])
    parameters = cost["parameters"]
    return [
        _table(["network", "FLOPs", "ratio", "latency (ms)", "ratio"], rows),
        f"Per batch of {cost['batch']}. The backbone has {_si(parameters['backbone'])} parameters, fused or not; the "
        f"{_si(parameters['denoise'])} of the denoisers are gone after fusion.",
    ]


def _sites(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for site in report["sites"]:
        known = [value for value in site["relative_change"] if value is not None]
        change = _percent(max(known)) if known else "–"
        if len(known) > 1:
            change = f"{_percent(min(known))} … {change}"
        form = f"{site['width']}" + (f" × {site['groups']} groups" if site["groups"] != 1 else "")
        rows.append([site["path"], site["kind"], form, "yes" if site["bias"] else "no", _times(site["t"]), change])
    return [
        _table(["site", "kind", "width", "bias", "t", "‖W′ − W‖ / ‖W‖"], rows, left=2),
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
        rows.append([path, *(_fixed(value, 4) for value in (initial, final, best)), _signed(gap, 4)])
        if initial is not None and not math.isnan(gap):
            known.append((initial, final, best))
    if known:
        initial, final, best = (sum(column) for column in zip(*known, strict=True))
        text = f"Sum over the sites: {initial:.4f} → {final:.4f}, optimum {best:.4f}, gap {_signed(final - best, 4)}"
        if initial > best:
            text += f"; {100 * (initial - final) / (initial - best):.1f} % of the possible reduction was reached"
        parts = [text + "."]
    else:
        parts = ["The optimum is not known for this learner, so how much is left to learn is not known either."]
    if rows:
        headers = ["site", "initial loss", "final loss", "optimum", "gap"]
        parts.append(_table(headers if optimum else headers[:3], rows if optimum else [row[:3] for row in rows]))
    return parts


# ---- plots ---------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart with any colour vision; markers differ too.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#555555"
_CONTROLS = (("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#D55E00", "X"))
MOST_BARS = 150
"""Bars in plots/sites.png; of more slices than that, those that change most."""


def _png(figure: Figure) -> bytes:
    """Draws with Agg and no global state; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a folder name in a script the font lacks is no fault
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _axes(axes: Any, grid: str) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _plot_loss(report: Mapping[str, Any]) -> bytes | None:
    """Total loss against step, with the sum of the sites' optima when it is known."""
    learning = report["learning"] or {"loss": []}
    points = [(step, loss) for step, loss in learning["loss"] if loss is not None]
    if len(points) < 2:
        return None
    steps, losses = zip(*points, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = _axes(figure.add_subplot(), "both")
    axes.plot(steps, losses, color=_BLUE, linewidth=1.5, label=str(learning["learner"]))
    optimum = learning["optimum"] or {}
    if optimum and optimum.keys() == learning["per_site"].keys() and None not in optimum.values():
        best = sum(optimum.values())
        axes.axhline(best, color=_RED, linestyle="--", linewidth=1.5, label=f"optimum {best:.4g}")
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
    if min(steps) > 0 and max(steps) > 100 * min(steps):
        axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, sum over {len(learning['per_site'])} sites")
    axes.legend(frameon=False)
    return _png(figure)


def _plot_sites(report: Mapping[str, Any]) -> bytes | None:
    """Relative change of the weights of every site and slice, in execution order from the top."""
    bars = []
    for site in report["sites"]:
        for index, (t, change) in enumerate(zip(site["t"], site["relative_change"], strict=True)):
            name = f"{site['path']}[{index}]" if len(site["t"]) > 1 else site["path"]
            bars.append(
                (
                    f"{name if len(name) <= 44 else '…' + name[-43:]}   t = {t}",
                    100 * (math.nan if change is None else change),
                )
            )
    if not bars:
        return None
    title = ""
    if len(bars) > MOST_BARS:
        title = f"the {MOST_BARS} largest changes of {len(bars)}"
        kept = sorted(np.argsort([-change for _, change in bars], kind="stable")[:MOST_BARS])  # NaN comes last
        bars = [bars[index] for index in kept]
    names, changes = zip(*bars, strict=True)
    figure = Figure(figsize=(8.5, 1.1 + 0.2 * len(bars)), layout="constrained")
    axes = _axes(figure.add_subplot(), "x")
    drawn = axes.barh(range(len(bars)), np.nan_to_num(changes), color=_BLUE, height=0.7)
    labels = ["unknown" if math.isnan(change) else f"{change:.3g}" for change in changes]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * float(np.max(np.nan_to_num(changes))) or 1.0)
    axes.set_xlabel("relative change of the weights, ‖W′ − W‖ / ‖W‖ (%)")
    axes.set_title(title, fontsize=10)
    return _png(figure)


def _plot_accuracy(report: Mapping[str, Any]) -> bytes | None:
    """The first metric of every arm, and fused against each arm with its interval; filled where significant."""
    results = report["metrics"]
    if not results:
        return None
    metric = next(iter(next(iter(results.values()))["baseline"]))
    shown = {condition: entry for condition, entry in results.items() if metric in entry["baseline"]}
    controls = list(dict.fromkeys(arm for entry in shown.values() for arm in entry["control"]))
    looks = {"baseline": (_GREY, "o"), "fused": (_BLUE, "D")}
    looks |= {arm: _CONTROLS[index % len(_CONTROLS)] for index, arm in enumerate(controls)}
    arms = ["baseline", *controls, "fused"]
    offset = {arm: 0.7 * ((index + 0.5) / len(arms) - 0.5) for index, arm in enumerate(arms)}

    figure = Figure(figsize=(10, 1.6 + len(shown) * max(0.45, 0.17 * len(arms))), layout="constrained")
    values, gaps = figure.subplots(1, 2, sharey=True)
    for index, entry in enumerate(shown.values()):
        for arm, scores in _arms(entry).items():
            if scores.get(metric) is not None:
                colour, marker = looks[arm]
                values.plot(scores[metric], index + offset[arm], marker, color=colour, markersize=6)
        for row in _comparisons(entry):
            if row.metric != metric or math.isnan(row.interval.difference):
                continue
            colour, marker = looks[row.arm]
            at, fill = index + offset[row.arm], colour if row.direction else "white"
            if math.isfinite(row.interval.low) and math.isfinite(row.interval.high):
                gaps.hlines(at, row.interval.low, row.interval.high, color=colour, linewidth=1.6)
            gaps.plot(row.interval.difference, at, marker, color=colour, markerfacecolor=fill, markersize=6)
    gaps.axvline(0, color="black", linewidth=0.8, zorder=1)
    for axes in (values, gaps):
        _axes(axes, "x")
        for index in range(1, len(shown)):
            axes.axhline(index - 0.5, color="#DDDDDD", linewidth=0.6)
    values.set_yticks(range(len(shown)), list(shown), parse_math=False)
    values.set_ylim(len(shown) - 0.5, -0.5)
    values.set_xlabel(f"{metric} (%)", parse_math=False)
    gaps.set_xlabel(
        f"fused − arm, points of {metric}, 95 % interval\n(filled: significant, hollow: not)", parse_math=False
    )
    handles = [values.plot([], [], looks[arm][1], color=looks[arm][0], label=arm)[0] for arm in arms]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(arms), 6), frameon=False)
    return _png(figure)


PLOTS: dict[str, Callable[[Mapping[str, Any]], bytes | None]] = {
    "accuracy": _plot_accuracy,
    "loss": _plot_loss,
    "sites": _plot_sites,
}
"""By file name, what draws plots/NAME.png; None where there is nothing to show."""


# ---- files and checks ----------------------------------------------------------------------------------------------


def _write(path: str, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames, so that a reader never sees half a file."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        finally:
            _remove(temporary)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror}. Give a work directory that can be written to."
        ) from error


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error.strerror}. Remove it by hand.") from error


def _problems(value: Any, keys: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yields what `value` lacks of `keys`."""
    if "*" in keys:
        if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
            yield f"{where} is {value!r}, expected entries"
            return
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, entry in entries:
            yield from _problems(entry, keys["*"], f"{where}.{name}")
        return
    if keys and not isinstance(value, Mapping):
        yield f"{where or 'the report'} is {value!r}, expected an object"
        return
    for name, below in keys.items():
        key = name.removesuffix("?")
        place = f"{where}.{key}" if where else key
        if key not in value:
            yield f"{place} is missing"
        elif below is not None and not (name.endswith("?") and value[key] is None):
            if value[key] is None:
                yield f"{place} is null"
            else:
                yield from _problems(value[key], below, place)


def _site_problems(sites: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for site in sites:
        if len(site["t"]) != len(site["relative_change"]):
            found = f"{len(site['t'])} and {len(site['relative_change'])} numbers"
            yield f"site {site['path']} has {found} in t and relative_change, expected one of each a slice"


def _metric_problems(metrics: Mapping[str, Any]) -> Iterator[str]:
    for condition, entry in metrics.items():
        if not entry["baseline"]:
            yield f"metrics.{condition}.baseline is empty, expected at least one metric"
        wanted = [f"fused - {arm}" for arm in ("baseline", *entry["control"])]
        for key in dict.fromkeys([*wanted, *entry["difference"]]):
            for part in ("difference", "interval"):
                for metric in entry["baseline"]:
                    if metric not in entry[part].get(key, {}):
                        yield f"metrics.{condition}.{part}.{key}.{metric} is missing"
