"""Clean accuracy against noise by number of images, all choices made on training images: CIFAR-10.

    DREP_DATA=… PYTHONPATH=. python benchmarks/front.py                       # ResNet-20
    DREP_DATA=… PYTHONPATH=. python benchmarks/front.py --network=vit --images=1500 --losses=1

For each number of unlabeled images the learner `measured` solves every clean share. Held-out
training images choose the share and the strength for each largest clean loss in --losses; the
chosen points alone are run on the test images. Changes are points against the backbone, with the
paired 95 % interval. --out keeps the backbone's answers, the solutions and the rows of each number
of images, so that the script goes on where it was ended; for other rows delete those.
"""

import json
import os
import resource
import tempfile
import time

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from benchmarks.keeping import kept
from configs import digits, resnet20_cifar10, vit_cifar10
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.measured import measuring
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize, read_images, read_labels
from drep_jax.evaluation.intervals import paired_interval
from drep_jax.evaluation.selection import Candidate, best_point, choose
from drep_jax.learners.base import direct_maps, selection_of
from drep_jax.learners.streams import CorruptedImages
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.run import Run
from drep_jax.run.setup import build

CONFIGS = {"resnet20": resnet20_cifar10, "vit": vit_cifar10, "digits": digits}
SEED = 11
SECONDS = "seconds of the solution"


def solutions(config, setup, variables, shares, out=""):
    """Returns a candidate for each clean share, the number of images, and seconds; out: what kept files begin with."""
    options = config.measured
    images = CorruptedImages(config.to_dict(), setup)
    held = images.bytes / 2**30 if images.resident else 0.0
    solve = measuring(
        setup.backbone,
        variables,
        setup.sites,
        images,
        ridge=options.ridge or None,
        memory_gib=options.memory_gib - held,
        outputs=False,
        vectors=options.vectors,
        shortcut=options.shortcut,
        chunk=options.chunk,
    )
    candidates, total = [], 0.0
    for share in shares:

        def solution(share=share):
            began = time.perf_counter()
            denoise = solve([share, *[(1 - share) / images.corrupted] * images.corrupted]).denoise
            return {**denoise, SECONDS: time.perf_counter() - began}

        denoise = kept(f"{out}_{share:g}.npz" if out else "", solution)
        total += float(denoise.pop(SECONDS))
        candidates.append(Candidate(f"clean share {share:g}", denoise))
    return candidates, images.shape[1], total


def scores(apply, setup, variables, count, conditions):
    """Returns {condition: hits of the first test images}."""
    index = np.arange(min(count or len(setup.test), len(setup.test)))
    images, labels = read_images(setup.test, index), read_labels(setup.test, index)
    hits = {}
    for condition in conditions:
        x = np.asarray(normalize(corrupt(images, index, condition, SEED), setup.mean, setup.std))
        logits = [np.asarray(apply(variables, x[i : i + 500])) for i in range(0, len(x), 500)]
        hits[condition] = np.argmax(np.concatenate(logits), -1) == labels
    return hits


def main(command=None):
    """Solves, chooses and tests what is not there yet, and prints the table."""
    tiny = {"network": "digits", "images": "30", "shares": "0.8", "losses": "100", "held_out": 20, "test": 20}
    parser = Parser(__doc__, **tiny)
    parser.add_argument("--network", choices=CONFIGS, default="resnet20")
    parser.add_argument("--images", default="500,1500,5000,20000", help="numbers of images to learn from")
    parser.add_argument("--shares", default="0.5,0.65,0.8,0.9")
    parser.add_argument("--strengths", default="0.25,0.5,0.75,1")
    parser.add_argument("--losses", default="0.5,1,2", help="largest clean losses on held-out images, in points")
    parser.add_argument("--held_out", type=int, default=2000)
    parser.add_argument("--test", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--out", default="", help="folder to keep results in")
    options = parser.parse_args(command)
    config = CONFIGS[options.network].get_config().unlock()
    config.progress = False
    config.select.images = options.held_out
    config.select.strengths = tuple(map(float, options.strengths.split(",")))
    if options.tiny:
        config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
    with tempfile.TemporaryDirectory() as scratch:
        setup = build(config)
        run = Run(config.to_dict(), setup, options.out or scratch)
        path = config.backbone.init_from
        variables = read_weights(run, path) if path else dict(fresh_variables(run))
    apply = jax.jit(setup.backbone.apply)
    conditions = tuple(config.evaluate.conditions)
    began = time.perf_counter()
    path = os.path.join(options.out, f"front_{options.network}_backbone_{options.test}.npz") if options.out else ""
    base = kept(path, lambda: scores(apply, setup, variables, options.test, conditions))
    print(f"backbone: scored in {time.perf_counter() - began:.0f} s", flush=True)
    rows = [["backbone", "", "", "", *(f"{100 * hits.mean():.2f}" for hits in base.values()), "", ""]]
    for count in map(int, options.images.split(",")):
        table = os.path.join(options.out, f"front_{options.network}_{count}.json") if options.out else ""
        if table and os.path.exists(table):
            with open(table, encoding="utf-8") as file:
                rows += json.load(file)
            continue
        config.measured.images = count
        shares = list(map(float, options.shares.split(",")))
        candidates, used, solving = solutions(config, setup, variables, shares, table.removesuffix(".json"))
        print(f"{used} images: solved in {solving:.0f} s", flush=True)
        choice = choose(setup, variables, candidates, selection_of(config.to_dict()))
        for number, point in enumerate(choice.points):
            values = ", ".join(f"{condition} {value:.1f}" for condition, value in choice.scores(number).items())
            print(f"held-out: {point.label}, strength {point.strength:g}: {values}", flush=True)
        print(f"chosen among in {choice.seconds:.0f} s", flush=True)
        tested: dict[int, dict] = {}
        found = []
        for loss in map(float, options.losses.split(",")):
            number = best_point(choice.points, choice.criterion, loss)
            point = choice.points[number]
            if number not in tested:
                maps = direct_maps(candidates[point.candidate].denoise).scaled(point.strength)
                fused = fuse_variables_exact(variables, maps, setup.sites, setup.schedule)
                tested[number] = scores(apply, setup, fused, options.test, conditions)
            hits = tested[number]
            cells, intervals = [], []
            for condition in conditions:
                interval = paired_interval(100.0 * hits[condition], 100.0 * base[condition], resamples=2000)
                cells.append(f"{interval.difference:+.2f}")
                intervals.append(f"[{interval.low:+.2f}, {interval.high:+.2f}]")
            cost = [
                f"{solving + choice.seconds:.0f}",
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}",
            ]
            found.append([used, loss, point.label.removeprefix("clean share "), point.strength, *cells, *cost])
            found.append(["", "", "", "", *intervals, "", ""])
            print(*found[-2], flush=True)
        rows += found
        if table:
            with open(table, "w", encoding="utf-8") as file:
                json.dump(found, file)
    headers = ["images", "loss allowed", "share", "strength", *conditions, "s", "peak GiB"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
