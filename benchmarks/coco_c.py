"""COCO-C: 15 corruptions of the stored pictures, before any resizing; mPC, rPC, paired differences of arms.

    DREP_DATA=… PYTHONPATH=. python benchmarks/coco_c.py --cache=DIR --every=2 --severities=3
    … --cache=DIR --severities=1,2,3,4,5                             # the whole protocol

P is AP on clean images, mPC the mean of AP over corruptions and severities, rPC = mPC / P (Michaelis et
al. 2019, arXiv 1907.07484). The constants are those for photographs (docs/corruptions.md). Arms are those
of benchmarks/coco.py, whose --cache this script shares. Intervals resample the images, all conditions
together. "noise" is the mean of gaussian, shot and impulse noise, "others" that of the other twelve.
"""

import functools
import re
import time
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.arms import SEED, Job, command_line, configuration, end_after, network
from benchmarks.coco import ARMS, Pictures, Scorer
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.data.corruptions.imagenet_c import PHOTOGRAPHS
from drep_jax.data.decode import decode, fit
from drep_jax.data.source import raw_item
from drep_jax.evaluation.intervals import Bootstrap

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


class StoredScorer(Scorer):
    """A scorer that corrupts the stored image and resizes it then, as the protocol says."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._made: dict[tuple[int, str], np.ndarray] = {}

    def pixels(self, images: np.ndarray, index: np.ndarray, condition: str) -> np.ndarray:
        """Returns test images of which the stored ones were corrupted; those of the last condition are kept."""
        source = self.job.setup.test
        if any(kept != condition for _, kept in self._made):
            self._made = {}
        for place in map(int, index):
            if (place, condition) not in self._made:
                raw = raw_item(source, place)
                stored = decode(raw["image"], raw["where"])
                seen = np.rint(corrupt(stored[None], np.array([place]), condition, SEED)[0]).astype(np.uint8)
                self._made[place, condition] = fit(seen, images.shape[1:3], source.resize, raw["where"])
        return np.stack([self._made[int(place), condition] for place in index]).astype(np.float32)


def tables(job: Job, results: dict[str, dict[str, Any]], severities: list[str], resamples: int) -> None:
    """Prints P, mPC and rPC of every arm with intervals of the differences, then AP of each corruption."""
    ones = np.ones(len(job.index))
    bootstrap = Bootstrap(len(ones), resamples=resamples)
    metric = job.setup.task.metrics["AP"]
    conditions = list(next(iter(results.values())))
    groups = {
        "P": [CLEAN],
        "mPC": [c for c in conditions if c != CLEAN],
        "noise": [c for c in conditions if c.split(":")[-2:][0] in NOISES],
        "others": [c for c in conditions if c != CLEAN and c.split(":")[-2:][0] not in NOISES],
    }
    whole = {arm: {c: 100 * float(metric(row[c], ones)) for c in conditions} for arm, row in results.items()}
    stats = {(arm, c): (metric, results[arm][c]) for arm in results for c in conditions}
    drawn = bootstrap.values(stats)
    rows = []
    for arm, values in whole.items():
        cells, ends = [], []
        for group in groups.values():
            mean = float(np.mean([values[c] for c in group])) if group else float("nan")
            base = float(np.mean([whole["backbone"][c] for c in group])) if group else float("nan")
            cells.append(f"{mean:.1f}" if arm == "backbone" else f"{mean - base:+.1f}")
            change = 100 * np.mean([drawn[arm, c] - drawn["backbone", c] for c in group], axis=0)
            interval = bootstrap.interval(mean - base, change)
            ends.append(f"[{interval.low:+.1f}, {interval.high:+.1f}]")
        kept = np.mean([values[c] for c in groups["mPC"]]) / max(values[CLEAN], 1e-9)
        rows.append([arm, *cells, f"{100 * kept:.1f} %"])
        rows += [] if arm == "backbone" else [["", *ends, ""]]
    print(
        f"\n{len(ones)} images, severities {', '.join(severities)}; changes in points of AP, 95 % intervals over images"
    )
    print(tabulate(rows, ["", *groups, "rPC"], tablefmt="github", disable_numparse=True))
    names = list(dict.fromkeys(c.split(":")[1] for c in groups["mPC"]))
    rows = [
        [
            name,
            *(f"{np.mean([whole[arm][c] for c in groups['mPC'] if c.split(':')[1] == name]):.1f}" for arm in results),
        ]
        for name in names
    ]
    print("\n" + tabulate(rows, ["AP", *results], tablefmt="github", disable_numparse=True))


def main(command: Any = None) -> None:
    """Scores what is not kept, condition by condition, and prints."""
    tiny = {"every": 64, "arms": "backbone", "resamples": 100, "corruptions": "fog|shot_noise"}
    arms = "backbone|placebo|measured|measured mixed"
    parser = command_line(__doc__, tiny, config="yolo_fastest_coco", arms=arms, every=2, resamples=1000)
    parser.add_argument("--severities", default="3", help="with commas between")
    parser.add_argument("--corruptions", default=".*", help="regular expression")
    options = parser.parse_args(command)
    deadline = time.monotonic() + 60 * options.minutes
    severities = options.severities.split(",")
    names = [name for name in PHOTOGRAPHS if re.fullmatch(options.corruptions, name)]
    conditions = [CLEAN, *(f"imagenet_c:{name}:{severity}" for name in names for severity in severities)]
    job = Pictures(configuration(options.config), options.cache, options.every)
    score = StoredScorer(job)
    wanted = [name for name in ARMS if name == "backbone" or re.fullmatch(options.arms, name)]

    variables = functools.cache(lambda name: network(job, name, ARMS[name]))
    results: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for condition in conditions:
        for name in wanted:
            end_after(deadline, f"{name}, {condition}")
            results[name][condition] = job.kept(
                f"C {name} {condition} {job.every}",
                lambda n=name, c=condition: score(ARMS[n].statistics, variables(n), c),
            )
    job.run.writer.close()
    tables(job, results, severities, options.resamples)


if __name__ == "__main__":
    main()
