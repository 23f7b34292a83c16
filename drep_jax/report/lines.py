"""Lines on coverage, certificate and cost, the same in the console and the report."""

import math
from collections.abc import Mapping
from typing import Any

from drep_jax.core.precision import held_line
from drep_jax.report.formatting import fixed, percent, power

NO_METRICS = (
    "No accuracy: this run had no labeled test images, so no arms were compared. Whether the features got better is not "
    "known; give labeled test images to find out. Certificate and cost need no labels."
)


def no_metrics_line(report: Mapping[str, Any]) -> str:
    """Returns why no arms were compared."""
    if failed := report.get("evaluation_failed"):
        return f"The evaluation FAILED, so no arms were compared: {failed}"
    return NO_METRICS


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the counts of every part of the data, and what its source has to say, once each."""
    lines: list[str] = []
    notes: set[str] = set()
    for part, facts in (report.get("data") or {}).items():
        counts = [f"{facts['images']:,} images"]
        labeled = facts["classes"] is not None
        counts += [f"{facts['classes']:,} classes" if labeled else "no labels"]
        counts += [f"{facts['unlabeled']:,} without a label"] if labeled and facts["unlabeled"] else []
        said = [note for note in facts["notes"] if note not in notes]
        notes.update(said)
        lines.append(" ".join([f"{part}: {facts['source']}, {', '.join(counts)}.", *said]))
    return lines


def left_out_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns one line on what was left out of the scores; none if all items were scored."""
    by_condition = {
        condition: ", ".join(f"{number:,} {reason}" for reason, number in entry.get("left_out", {}).items())
        for condition, entry in metrics.items()
    }
    texts = dict.fromkeys(text for text in by_condition.values() if text)
    return [
        f"Left out of the scores{'' if len(texts) == 1 else f' ({condition})'}: {text}."
        for text in texts
        for condition in [next(name for name, other in by_condition.items() if other == text)]
    ]


def protocol_lines(report: Mapping[str, Any]) -> list[str]:
    """Returns one line on how the scores were computed, if the task says so."""
    lines = report.get("protocol") or []
    return [f"Protocol: {' '.join(lines)}"] if lines else []


def unreadable_lines(report: Mapping[str, Any]) -> list[str]:
    """Returns one line for each part of the data with unreadable images, which were skipped."""
    lines = []
    for part, skipped in (report.get("unreadable") or {}).items():
        if count := skipped["count"]:
            more = f", and {count - len(skipped['first'])} more" if count > len(skipped["first"]) else ""
            lines.append(
                f"Unreadable images skipped ({part}): {count} of {skipped['images']} (at most {skipped['limit']} are "
                f"allowed): {', '.join(skipped['first'])}{more}."
            )
    return lines


def neighbor_note(name: str, source: Mapping[str, Any]) -> str:
    """Returns one line on how the accuracy on a further source was computed."""
    if source["gallery"] is None:
        return f"{name}: its own queries in its own gallery; its labels were not learned from."
    return (
        f"{name}: accuracy of the nearest neighbor among {source['gallery']} of its training images, by the backbone's "
        "features; its labels were not learned from."
    )


def coverage_line(report: Mapping[str, Any]) -> str:
    """Returns one line on the part of the backbone that the sites cover."""
    coverage = report["coverage"]
    return (
        f"{len(report['sites'])} sites: {coverage['layers']} of {coverage['candidates']} linear layers, "
        f"{percent(coverage['kernel_share'])} of the kernel weights."
    )


def certificate_lines(certificate: Mapping[str, Any] | None) -> list[str]:
    """Returns the outcome, one line a precision, and the structure.

    Or that there is no certificate.
    """
    if certificate is None:
        return ["Certificate: none was made, so it is not shown that fused equals explicit."]
    lines = [
        f"Certificate: {'PASSED' if certificate['passed'] else 'FAILED'}   "
        f"(rule {certificate['rule']}, {certificate['steps']} step(s) a site)"
    ]
    for name, result in certificate["results"].items():
        worst = worst_site(result)
        line = f"  {name:8s} error {power(result['error'])} of the change, bound {power(result['bound'])}"
        if worst:
            line += f"; worst site {worst['path']}: {power(worst['error'])}, bound {power(worst['bound'])}"
        lines.append(line + f"  {outcome(result)}")
    if certificate.get("held"):
        lines.append("  " + held_line(certificate["held"]))
    marks = (f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in certificate["structure"].items())
    return [*lines, f"  {', '.join(marks)}"]


def outcome(result: Mapping[str, Any]) -> str:
    """Returns the outcome of one figure of the certificate, in words."""
    if not result["passed"]:
        return "FAILED"
    if result["change"] == 0:
        return "passed (denoising changes nothing)"
    # With a bound as large as the change, a fusion that does nothing would pass too.
    return "passed" if result["bound"] is not None and result["bound"] < 1 else "too coarse a type to decide"


def worst_site(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the site with the largest ratio of error to bound.

    An error that is not finite is the worst.
    """

    def ratio(site: Mapping[str, Any]) -> float:
        if site["error"] is None or not site["bound"]:
            return math.inf
        return site["error"] / site["bound"]

    return max(result["sites"], key=ratio, default=None)


def cost_lines(cost: Mapping[str, Any] | None) -> list[str]:
    """Returns FLOPs and latency against the baseline, or that they were not measured."""
    if cost is None:
        return ["Cost: not measured."]
    flops, latency = cost["flop_ratio"], cost["latency_ratio"]
    return [
        f"Cost against the baseline: fused {fixed(flops['fused'], 3)}× FLOPs, {fixed(latency['fused'], 2)}× latency; "
        f"explicit {fixed(flops['explicit'], 3)}× FLOPs, {fixed(latency['explicit'], 2)}× latency."
    ]
