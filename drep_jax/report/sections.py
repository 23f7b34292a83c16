"""The sections of a report, each a function from a complete report to blocks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from drep_jax.report.blocks import Block, Cell, Code, Details, Heading, Picture, Table, Text, Verdict, Word
from drep_jax.report.comparisons import ALPHA, compare, direction, verdict
from drep_jax.report.formatting import fixed, p_value, percent, power, si, signed, time_steps
from drep_jax.report.lines import (
    certificate_lines,
    cost_lines,
    coverage_line,
    data_lines,
    left_out_lines,
    neighbor_note,
    no_metrics_line,
    outcome,
    protocol_lines,
    unreadable_lines,
    worst_site,
)
from drep_jax.report.pretraining import pretraining_blocks
from drep_jax.report.schema import NETWORKS
from drep_jax.report.tables import EXPORTED_NOTE, recovery_table, results_table


def _in_short(report: Mapping[str, Any]) -> list[Block]:
    certificate, exported = report["certificate"], report["exported"]
    verdicts: list[Block] = [
        Verdict(verdict(condition, entry, exported), direction(entry, exported))
        for condition, entry in report["metrics"].items()
    ]
    passed = "" if certificate is None else "passed" if certificate["passed"] else "failed"
    return [
        *(verdicts or [Verdict(no_metrics_line(report), "failed" if report.get("evaluation_failed") else "")]),
        Verdict(certificate_lines(certificate)[0], passed),
        Text(cost_lines(report["cost"])[0]),
        Text(coverage_line(report)),
        *map(Text, protocol_lines(report)),
        *map(Text, left_out_lines(report["metrics"])),
        *map(Text, unreadable_lines(report)),
    ]


def _data(report: Mapping[str, Any]) -> list[Block]:
    return [Text(line) for line in data_lines(report)]


def _results(report: Mapping[str, Any]) -> list[Block]:
    if not report["metrics"]:
        return [Text("No arms were compared."), *_front(report), *_pictures(report)]
    blocks: list[Block] = [
        results_table(report),
        Text(EXPORTED_NOTE),
        Picture("accuracy", "Every arm under every condition, and its difference from the baseline with the interval"),
    ]
    if report.get("recovery"):
        blocks += [
            Heading("Fraction of the labeled fine-tuning's recovery"),
            recovery_table(report["recovery"]),
            Text(
                "The gain of an arm over the baseline, divided by the gain of fine-tuning with labels on such images. The "
                "fine-tuned network is no control arm: it has seen labels."
            ),
        ]
    blocks += [*_front(report), *_pictures(report)]
    return [*blocks, *_differences(report, report["metrics"])]


def _other_sources(report: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for name, source in (report.get("sources") or {}).items():
        blocks += [Text(neighbor_note(name, source)), *map(Text, left_out_lines(source["metrics"]))]
        blocks += [results_table({**report, "metrics": source["metrics"]})]
        blocks += _differences(report, source["metrics"])
    return blocks


def _differences(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    intervals = 0
    items, resampled = _items(report)
    for condition, entry in metrics.items():
        comparisons = [row for arm in (*entry["denoised"], *entry["control"]) for row in compare(entry, arm)]
        intervals += len(comparisons)
        rows: list[list[Cell]] = [
            [f"{row.ours} − {row.theirs}", row.metric, row, p_value(row.p), Word(row.word, row.direction)]
            for row in comparisons
        ]
        headers = ["difference", "metric", "points [95 % interval]", "McNemar p", "verdict"]
        blocks += [
            Heading(f"{condition} ({entry['n']} {items})"),
            *(Verdict(verdict(condition, entry, arm), direction(entry, arm)) for arm in entry["denoised"]),
            Details(f"All {len(rows)} differences on {condition} images", [Table(headers, rows, "llrrl")]),
        ]
    note = (
        f"Intervals are paired bootstrap intervals over the same {resampled}, each by itself: of {intervals} intervals "
        f"at 95 %, about {0.05 * intervals:.1f} would exclude zero by chance if nothing had changed. Where McNemar's p "
        f"is given, higher and lower need p < {ALPHA} too. Not significant means that no difference was shown, not that "
        "there is none."
    )
    return [*blocks, Text(note)]


def _items(report: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what scores are of, and what the intervals resample."""
    items = report.get("items") or {"are": "test images", "resampled": "test images"}
    return items["are"], items["resampled"]


def _front(report: Mapping[str, Any]) -> list[Block]:
    if not report.get("front"):
        return []
    return [
        Heading("Clean against corrupted images, by strength"),
        Picture("front", "Score on clean images against the mean score on the others, one point a strength"),
    ]


def _examples(report: Mapping[str, Any]) -> list[Block]:
    examples = report.get("examples")
    if not examples or not examples["images"]:
        return []
    before, after = examples["arms"]
    counts = examples["counts"]
    return [
        Heading("Test images"),
        Text(
            f"Of {examples['of']} {examples['condition']} images, {after} answers {counts['corrected']} rightly that {before} "
            f"answers wrongly, {counts['broken']} the other way round, and {counts['changed']} differently but wrongly both "
            "times. Shown first are those of each kind on which the two are most confident, then some at random: the first "
            "kinds show what can happen, only the last how often."
        ),
        Picture(
            "examples", "Test images as they are and corrupted, with the answer and confidence of both networks", True
        ),
    ]


def _pictures(report: Mapping[str, Any]) -> list[Block]:
    return [*_examples(report), *_overlays(report), *_boxes(report), *_ranked(report)]


def _overlays(report: Mapping[str, Any]) -> list[Block]:
    overlays = report.get("overlays")
    if not overlays or not overlays["images"]:
        return []
    before, after = overlays["arms"]
    return [
        Heading("Test images"),
        Text(
            f"Of {overlays['of']} {overlays['condition']} images, {after} has more pixels right than {before} in "
            f"{overlays['improved']}, and fewer in {overlays['worsened']}. Shown are those that gained and lost most, then "
            "some at random: the first kinds show what can happen, only the last how often."
        ),
        Picture(
            "overlays", "Test images with the classes of the labels and of both networks, and where these differ", True
        ),
    ]


def _boxes(report: Mapping[str, Any]) -> list[Block]:
    boxes = report.get("boxes")
    if not boxes or not boxes["images"]:
        return []
    before, after = boxes["arms"]
    return [
        Heading("Test images"),
        Text(
            f"Of {boxes['of']} {boxes['condition']} images, {after} finds more objects than {before}, less the wrong boxes, in "
            f"{boxes['improved']}, and fewer in {boxes['worsened']}, with boxes of a score of {boxes['score']:g} or more. "
            "Shown are those that gained and lost most, then some at random: the first kinds show what can happen, only the "
            "last how often."
        ),
        Picture(
            "boxes", "Test images with their objects, the boxes of both networks, and what was gained and lost", True
        ),
    ]


def _ranked(report: Mapping[str, Any]) -> list[Block]:
    if not report.get("ranked"):
        return []
    how = "The queries are those whose average precision changed most, up and down, and some of the others at random"
    blocks: list[Block] = [Heading("Ranked results")]
    if report["ranked"]["queries"]:
        blocks += [
            Text(f"{how}: the first kinds show what can happen, only the last how often."),
            Picture("ranked", "Queries and the first gallery images of each arm, right and wrong ones marked", True),
        ]
    if sites := report["ranked"].get("sites"):
        rows: list[list[Cell]] = [
            [site["path"], signed(site["mAP"], 2), *(str(site[name]) for name in ("gained", "lost", "queries"))]
            for site in sorted(sites, key=lambda site: -abs(site["mAP"]))
        ]
        blocks += [
            Text(
                f"What each site does by itself, all others left as they are, on {report['ranked']['condition']} "
                "images: the effects of several sites do not add up."
            ),
            Table(["site", "mAP, points", "queries that gained", "that lost", "of"], rows, "lrrrr"),
        ]
    return blocks


def _certificate(report: Mapping[str, Any]) -> list[Block]:
    certificate = report["certificate"]
    lines = certificate_lines(certificate)
    if certificate is None:
        return [Text(lines[0])]
    rows: list[list[Cell]] = []
    for name, result in certificate["results"].items():
        for label, row in (("end to end", result), ("worst site", worst_site(result))):
            if row is not None:
                where = (
                    label
                    if row is result
                    else f"worst site: {row['path']}, slice {row['slice']}, t = {time_steps(row['t'])}"
                )
                numbers = [power(row["error"]), power(row["bound"]), percent(row["change"])]
                text = outcome(row)
                word = Word(text, {"passed": "passed", "FAILED": "failed"}.get(text, ""))
                rows.append([name, where, *numbers, word])
    for size, other in certificate.get("sizes", {}).items():
        for name, result in other["results"].items():
            numbers = [power(result["error"]), power(result["bound"]), percent(result["change"])]
            text = outcome(result)
            word = Word(text, {"passed": "passed", "FAILED": "failed"}.get(text, ""))
            rows.append([name, f"end to end at {size}", *numbers, word])
    return [
        Text(lines[0], strong=True),
        Table(["precision", "where", "error", "bound", "change", "outcome"], rows, "llrrrl"),
        Text(f"Structure: {lines[-1].strip()}."),
        Text(
            "error = ‖(fused − base) − (explicit − base)‖ / ‖explicit − base‖; bound = allowed by rounding; "
            "change = ‖explicit − base‖ / ‖base‖."
        ),
    ]


def _cost(report: Mapping[str, Any]) -> list[Block]:
    cost = report["cost"]
    if cost is None:
        return [Text(line) for line in cost_lines(cost)]
    rows = []
    for arm in NETWORKS:
        ratios = (cost["flop_ratio"].get(arm, 1.0), cost["latency_ratio"].get(arm, 1.0))
        by_flops, by_latency = (
            "–" if ratio is None else f"{fixed(ratio, digits)}×" for ratio, digits in zip(ratios, (3, 2), strict=True)
        )
        rows.append([arm, si(cost["flops"][arm]), by_flops, fixed(cost["latency_ms"][arm], 2), by_latency])
    parameters = cost["parameters"]
    return [
        Table(["network", "FLOPs", "ratio", "latency (ms)", "ratio"], rows, "lrrrr"),
        Text(
            f"Per batch of {cost['batch']}. The backbone has {si(parameters['backbone'])} parameters, fused or not; the "
            f"denoisers' {si(parameters['denoise'])} are gone after fusion."
        ),
    ]


def _sites(report: Mapping[str, Any]) -> list[Block]:
    rows = []
    for site in report["sites"]:
        known = [value for value in site["relative_change"] if value is not None]
        change = percent(max(known)) if known else "–"
        if len(known) > 1:
            change = f"{percent(min(known))} … {change}"
        form = f"{site['width']}" + (f" × {site['groups']} groups" if site["groups"] != 1 else "")
        rows.append([site["path"], site["kind"], form, "yes" if site["bias"] else "no", time_steps(site["t"]), change])
    stacked = any(len(site["t"]) > 1 for site in report["sites"])
    blocks: list[Block] = [
        Table(["site", "kind", "width", "bias", "t", "‖W′ − W‖ / ‖W‖"], rows, "llrrrr"),
        Text(
            "For stacked layers: t of the first and last slice, and the smallest and largest change."
            if stacked
            else "One time step t and one relative change of the weights per site."
        ),
        *(Text(line) for line in report.get("forms", ())),
        Picture("sites", "Relative change of the weights of every site"),
    ]
    if report.get("spectra"):
        blocks += [
            Heading("Spectra of the features"),
            Picture(
                "spectra", "For each site, the variance of its features along each eigenvector, and the gain on it"
            ),
        ]
    return blocks


def _learning(report: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for learner, learning in report["learning"].items():
        blocks += [Heading(learner), *_learner(learning)]
    return [*blocks, Picture("loss", "Total loss of each learner against its step")]


def _learner(learning: Mapping[str, Any] | None) -> list[Block]:
    if learning is None:
        return [Text("Nothing was learned in this run; the denoisers were given.")]
    optimum, held_out = learning["optimum"] or {}, learning.get("held_out") or {}
    rows, known = [], []
    for path, (initial, final) in learning["per_site"].items():
        best = optimum.get(path)
        gap = math.nan if best is None or final is None else final - best
        rest = [fixed(held_out.get(path), 4)] if held_out else [fixed(best, 4), signed(gap, 4)]
        rows.append([path, fixed(initial, 4), fixed(final, 4), *rest])
        if initial is not None and not math.isnan(gap):
            known.append((initial, final, best))
    text = "The optimum is not known for this learner, nor how much is left to learn."
    if known:
        initial, final, best = (sum(column) for column in zip(*known, strict=True))
        text = f"Sum over the sites: {initial:.4f} → {final:.4f}, optimum {best:.4f}, gap {signed(final - best, 4)}"
        if initial > best:
            text += f"; {100 * (initial - final) / (initial - best):.1f} % of the possible reduction was reached"
        text += "."
    if held_out:
        alone = learning.get("left_alone") or []
        text = f"On images that a site was not fitted to, the mean error is {_mean(held_out.values())}"
        text += f"; {len(alone)} of {len(rows)} sites are left as they are" if alone else ""
        text += f" ({', '.join(alone[:6])}{', …' if len(alone) > 6 else ''})." if alone else "."
    if not rows:
        return [Text(text)]
    columns = 4 if held_out else 5 if optimum else 3
    headers = ["site", "initial loss", "final loss", *(["held out"] if held_out else ["optimum", "gap"])][:columns]
    table = Table(headers, [row[:columns] for row in rows], "lrrrr"[:columns])
    return [Text(text), Details(f"Loss of each of the {len(rows)} sites", [table])]


def _mean(values: Iterable[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return fixed(sum(numbers) / len(numbers) if numbers else None, 4)


def _what_ran(report: Mapping[str, Any]) -> list[Block]:
    env, certificate = report["environment"], report["certificate"]
    rows = [
        ["date", str(env["date"])],
        ["git revision", str(env["git_revision"])],
        ["device", f"{env['device_count']} × {env['device']}"],
        ["versions", ", ".join(f"{name} {env[name]}" for name in ("drep_jax", "jax", "flax", "python"))],
    ]
    for learner, learning in report["learning"].items():
        if learning:
            cells = (f"{learning['steps']} steps", f"{learning['images']} images", f"{fixed(learning['seconds'], 1)} s")
            rows.append([f"learner {learner}", ", ".join(cells)])
    if certificate:
        rows.append(["reverse step", f"rule {certificate['rule']}, {certificate['steps']} step(s) a site"])
    settings = "\n".join(f"{name} = {value!r}" for name, value in _flat(report["config"]))
    return [Code(env["command"]), Table(["", ""], rows, "ll"), Details("Configuration", [Code(settings)])]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[Block]]] = {
    "In short": _in_short,
    "Images": _data,
    "Pre-training": pretraining_blocks,
    "Results": _results,
    "Other sources": _other_sources,
    "Certificate": _certificate,
    "Cost": _cost,
    "Sites": _sites,
    "Learning": _learning,
    "What ran": _what_ran,
}
"""Title ↦ function that returns the blocks of the section, in the order of the report."""


def sections(report: Mapping[str, Any]) -> dict[str, list[Block]]:
    """Returns the blocks of all non-empty sections of a complete report."""
    blocks_by_title = {title: section(report) for title, section in SECTIONS.items()}
    return {title: blocks for title, blocks in blocks_by_title.items() if blocks}
