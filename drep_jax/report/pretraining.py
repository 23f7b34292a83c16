"""The report's section on the pre-training: what it was, its merge, what a probe reads from its features, pictures."""

from collections.abc import Mapping
from typing import Any

from drep_jax.report.blocks import Block, Cell, Heading, Picture, Table, Text, Verdict
from drep_jax.report.formatting import fixed, percent, power, signed

READERS = {"ridge": "linear probe", "trained": "trained probe", "nearest": "nearest neighbor"}


def pretraining_blocks(report: Mapping[str, Any]) -> list[Block]:
    """Returns the section's blocks; none without pre-training."""
    section = report.get("pretraining")
    if not section:
        return []
    return [*_what(section), *_merge(section), *_probe(section), *_pictures()]


def _what(section: Mapping[str, Any]) -> list[Block]:
    pca = section["pca"]
    down, across = pca["patch"]
    kept = f"{pca['components']} components of patches of {down}×{across} pixels ({pca['numbers']} numbers)"
    kinds = {
        "latent": f"noise in {kept}, which hold {percent(pca['kept'])} of the variance, scale {pca['scale']}",
        "pixels": "noise in pixels",
        "mask": "hidden patches",
        "none": "no noise",
    }
    speed = section["steps"] * section["batch_size"] / section["seconds"] if section["seconds"] else 0.0
    return [
        Text(
            f"{section['steps']} steps of {section['batch_size']} images without labels, {kinds[pca['noise']]}: "
            f"{section['seconds']:.0f} s, {speed:.0f} images/s. The encoder became the backbone at time step {section['t']} "
            f"(σ = {section['sigma']:.3g})."
        )
    ]


def _merge(section: Mapping[str, Any]) -> list[Block]:
    certificate = section["certificate"]
    parts = [
        f"{name}: error {power(row['error'])} of the change, bound {power(row['bound'])}"
        for name, row in certificate["results"].items()
    ]
    word, tone = ("passed", "passed") if certificate["passed"] else ("FAILED", "failed")
    return [Verdict(f"Merge of the time step into a plain ViT: {word} ({'; '.join(parts)}).", tone)]


def _probe(section: Mapping[str, Any]) -> list[Block]:
    probe = section.get("probe")
    if not probe:
        return [Text("Without labels, test images or a head no probe was learned.")]
    blocks: list[Block] = [
        Heading("What the features hold"),
        Text(
            f"Probes and neighbors are learned on {probe['images']} clean training images, features behind a BatchNorm "
            "without parameters, and kept for all conditions. Differences are paired, with 95 % intervals: the encoder's "
            "accuracy minus that of the row."
        ),
    ]
    for condition, entry in probe["conditions"].items():
        readers = list(next(iter(entry["accuracy"].values())))
        headers = [f"{condition}, {entry['n']} images", *(READERS.get(each, each) for each in readers)]
        rows: list[list[Cell]] = []
        for arm, accuracy in entry["accuracy"].items():
            difference = entry["difference"].get(arm, {})
            rows.append([arm, *(_cell(accuracy[each], difference.get(each)) for each in readers)])
        blocks.append(Table(headers, rows, "l" + "r" * len(readers)))
    return blocks


def _cell(accuracy: float | None, difference: Any) -> str:
    if difference is None:
        return fixed(accuracy, 1)
    value, low, high = difference
    return f"{fixed(accuracy, 1)} ({signed(value, 1)} [{signed(low, 1)}, {signed(high, 1)}])"


def _pictures() -> list[Block]:
    return [
        Picture("probe_curve", "Loss of the pre-training, and accuracy of a linear probe, over the epochs"),
        Picture(
            "reconstructions",
            "Images as they are, with the noise of several levels, and what the network makes of it",
            True,
        ),
        Picture("filters", "Directions of the patches' PCA, by falling variance", True),
    ]
