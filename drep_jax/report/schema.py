"""The keys of a report, the check that all are present, and the report as plain JSON values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import DataError
from drep_jax.evaluation.summary import pairs_of
from drep_jax.files import utf8

SCHEMA = 2
NETWORKS = ("baseline", "fused", "explicit")
"""The networks whose cost is measured."""

_FIGURE = {"passed": None, "error": None, "bound": None, "change": None}
_METRICS: dict[str, Any] = (
    {"n": None}
    | {key: {} for key in ("baseline", "control", "denoised", "difference", "interval", "mcnemar")}
    | {"left_out??": {}}
)
# "*" stands for every entry of a list or an object. "?" marks a value that may be null, "??" one
# that may be absent too.
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
    "learning": {
        "*?": {"steps": None, "seconds": None, "loss": {}, "per_site": {}, "optimum?": {}, "images": None},
    },
    "exported": None,
    "metrics": {"*": _METRICS},
    "certificate?": {
        "passed": None,
        "rule": None,
        "steps": None,
        "results": {"*": _FIGURE | {"sites": {"*": _FIGURE | {"path": None, "slice": None, "t": {}}}}},
        "structure": dict.fromkeys(("same_tree", "same_dtypes", "same_program")),
        "held??": None,
    },
    "cost?": {
        "flops": dict.fromkeys(NETWORKS),
        "flop_ratio": {"fused": None, "explicit": None},
        "latency_ms": dict.fromkeys(NETWORKS),
        "latency_ratio": {"fused": None, "explicit": None},
        "parameters": {"backbone": None, "denoise": None},
        "batch": None,
    },
    "spectra??": {"*": {"variance": {"*": None}, "gain": {"*": None}}},
    "front??": {
        "conditions": {"*": None},
        "chosen": None,
        "points": {"*": {"label": None, "strength": None, "scores": {}}},
    },
    "ranked??": {
        "condition": None,
        "metric": None,
        "arms": {"*": None},
        "queries": {
            "*": {
                "image": None,
                "why": None,
                "ap": {},
                "found": {"*": {"*": dict.fromkeys(("image", "distance", "right"))}},
            }
        },
        "images": {"*": None},
        "sites??": {"*": dict.fromkeys(("path", "mAP", "gained", "lost", "queries"))},
    },
    "examples??": {
        "condition": None,
        "arms": {"*": None},
        "counts": {"*": None},
        "of": None,
        "images": {
            "*": dict.fromkeys(("index", "why", "label", "clean", "corrupted"))
            | {"answers": {"*": dict.fromkeys(("answer", "confidence"))}}
        },
    },
    "overlays??": {
        "condition": None,
        "arms": {"*": None},
        "classes": {"*": None},
        "ignored": None,
        "improved": None,
        "worsened": None,
        "of": None,
        "images": {
            "*": dict.fromkeys(("index", "why", "image", "label")) | {"accuracy": {"*": None}, "answers": {"*": None}}
        },
    },
    "pretraining??": {
        "steps": None,
        "seconds": None,
        "loss": {},
        "curve": {},
        "pca": dict.fromkeys(("components", "numbers", "kept", "scale")),
        "certificate": {"passed": None, "results": {}},
        "pictures": {"clean": {"*": None}, "filters": {"*": None}, "levels": {}},
    },
    "boxes??": {
        **dict.fromkeys(("condition", "score", "improved", "worsened", "of")),
        "arms": {"*": None},
        "classes": {"*": None},
        "images": {
            "*": dict.fromkeys(("index", "why", "image"))
            | {"truth": {"*": dict.fromkeys(("class", "crowd")) | {"box": {"*": None}}}}
            | {"found": {"*": {"*": dict.fromkeys(("class", "score", "object")) | {"box": {"*": None}}}}}
            | {"gained": {"*": None}, "lost": {"*": None}}
        },
    },
    "protocol??": {"*": None},
    "forms??": {"*": None},
    "items??": {"are": None, "resampled": None},
    "recovery??": {"*": {}},
    "sources??": {"*": {"gallery": None, "metrics": {"*": _METRICS}}},
    "data??": {"*": dict.fromkeys(("source", "images", "classes", "unlabeled")) | {"notes": {"*": None}}},
    "evaluation_failed??": None,
    "unreadable??": {"*": dict.fromkeys(("count", "limit", "images")) | {"first": {"*": None}}},
}
"""The keys of a report; further keys stay in report.json and are not shown."""


def validate(report: Mapping[str, Any]) -> None:
    """Checks that every key in docs/report.md is present.

    Raises:
      DataError: naming up to a dozen missing keys with their places.
    """
    problems = list(_problems(report, KEYS, ""))
    if not problems and report["schema"] != SCHEMA:
        problems.append(f"schema is {report['schema']!r}, expected {SCHEMA}")
    if not problems:
        problems = [*_site_problems(report["sites"]), *_metric_problems(report["metrics"])]
        problems += [*_learner_problems(report), *_picture_problems(report)]
        for name, source in (report.get("sources") or {}).items():
            problems += [f"sources.{name}.{problem}" for problem in _metric_problems(source["metrics"])]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise DataError(f"Not a complete report: {'; '.join(problems[:12])}{more}. See docs/report.md for its keys.")


def _problems(value: Any, keys: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yields a message for each key that `value` lacks."""
    every = next((name for name in keys if name.startswith("*")), None)
    if every:
        if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
            yield f"{where} is {value!r}, expected entries"
            return
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, entry in entries:
            if entry is not None or not every.endswith("?"):
                yield from _problems(entry, keys[every] or {}, f"{where}.{name}")
        return
    if keys and not isinstance(value, Mapping):
        yield f"{where or 'the report'} is {value!r}, expected an object"
        return
    for name, below in keys.items():
        key = name.rstrip("?")
        place = f"{where}.{key}" if where else key
        if key not in value:
            if not name.endswith("??"):
                yield f"{place} is missing"
        elif below is not None and not (name.endswith("?") and value[key] is None):
            if value[key] is None:
                yield f"{place} is null"
            else:
                yield from _problems(value[key], below, place)


def _site_problems(sites: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for site in sites:
        if len(site["t"]) != len(site["relative_change"]):
            counts = f"{len(site['t'])} and {len(site['relative_change'])} numbers"
            yield f"site {site['path']} has {counts} in t and relative_change, expected one of each a slice"


def _learner_problems(report: Mapping[str, Any]) -> Iterator[str]:
    exported, learners = report["exported"], list(report["learning"])
    if exported not in learners:
        yield f"exported is {exported!r}, expected one of learning: {', '.join(learners) or 'none'}"
    for condition, entry in report["metrics"].items():
        if exported not in entry["denoised"]:
            yield f"metrics.{condition}.denoised.{exported} is missing"


def _picture_problems(report: Mapping[str, Any]) -> Iterator[str]:
    for name, site in (report.get("spectra") or {}).items():
        counts = (len(site["variance"]), len(site["gain"]))
        if counts[0] != counts[1] or not counts[0]:
            yield f"spectra.{name} has {counts[0]} and {counts[1]} numbers in variance and gain, expected one of each"
    front = report.get("front")
    if front:
        count = len(front["points"])
        if not isinstance(front["chosen"], int) or not 0 <= front["chosen"] < count:
            yield f"front.chosen is {front['chosen']!r}, expected the index of one of {count} points"
        for index, point in enumerate(front["points"]):
            for condition in front["conditions"]:
                if condition not in point["scores"]:
                    yield f"front.points.{index}.scores.{condition} is missing"
    examples = report.get("examples") or {"images": ()}
    for index, image in enumerate(examples["images"]):
        for arm in examples["arms"]:
            if arm not in image["answers"]:
                yield f"examples.images.{index}.answers.{arm} is missing"
    overlays = report.get("overlays") or {"images": ()}
    for index, image in enumerate(overlays["images"]):
        for arm in overlays["arms"]:
            if arm not in image["answers"]:
                yield f"overlays.images.{index}.answers.{arm} is missing"
    boxes = report.get("boxes") or {"images": ()}
    for index, image in enumerate(boxes["images"]):
        for arm in boxes["arms"]:
            if arm not in image["found"]:
                yield f"boxes.images.{index}.found.{arm} is missing"
    ranked = report.get("ranked") or {"queries": ()}
    for index, query in enumerate(ranked["queries"]):
        for arm in ranked["arms"]:
            for part in ("ap", "found"):
                if arm not in query[part]:
                    yield f"ranked.queries.{index}.{part}.{arm} is missing"
        shown = [query, *(one for found in query["found"].values() for one in found)]
        for image in sorted({str(one["image"]) for one in shown} - set(ranked["images"])):
            yield f"ranked.images.{image} is missing"


def _metric_problems(metrics: Mapping[str, Any]) -> Iterator[str]:
    for condition, entry in metrics.items():
        if not entry["baseline"]:
            yield f"metrics.{condition}.baseline is empty, expected at least one metric"
        for ours, theirs in pairs_of(entry):
            for part in ("difference", "interval"):
                for metric in entry["baseline"]:
                    if metric not in entry[part].get(f"{ours} - {theirs}", {}):
                        yield f"metrics.{condition}.{part}.{ours} - {theirs}.{metric} is missing"


def plain(value: Any, where: str = "report") -> Any:
    """Returns `value` in JSON's types: arrays as lists, NaN and Inf as null, text that can be written and drawn.

    >>> plain({"t": (1, np.float32(0.5)), "loss": float("nan")})
    {'t': [1, 0.5], 'loss': None}

    Raises:
      DataError: naming the place of a value that has no such form.
    """
    if isinstance(value, str):
        return utf8(value).decode()
    if isinstance(value, Mapping):
        return {utf8(str(key)).decode(): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    raise DataError(f"{where} is a {type(value).__name__}; expected numbers, text, booleans, lists or dicts.")
