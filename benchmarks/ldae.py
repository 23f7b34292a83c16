"""l-DAE against its control arms on CIFAR-10: the same network, steps and probe, with paired intervals.

    DREP_DATA=… PYTHONPATH=. python benchmarks/ldae.py --cache=DIR
    … --cache=DIR --arms="l-DAE" --seeds=1,2 --minutes=10         # resumes, and stops after ten minutes

Each arm and seed is a folder of DIR with its checkpoints and metrics; a further call goes on from
there, and what is done is only read. Arms without training: the encoder before its first step (gates
open), the PCA latents, the pixels. Trained arms: l-DAE with noise of one standard deviation for all
latents (`scale=global`) and of each latent's own (`whiten`), with latents as input and output, with gates
that start at zero as in the paper, noise in pixels, and hidden patches. Probes are learned on clean
features of --train training images; hits of all test images are kept in DIR.
"""

import contextlib
import json
import os
import re
import signal
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from benchmarks.keeping import kept
from configs import ldae_cifar10, ldae_digits
from drep_jax.data.source import Subset
from drep_jax.evaluation.probes import NEIGHBOR, RIDGE, TRAINED, compare_arms, features_of, probe_arms
from drep_jax.jobs.pretrain import LATENTS, PIXELS, RANDOM, control_networks, random_encoder
from drep_jax.jobs.scores import reading
from drep_jax.run.pretraining import pca_of, pretraining_of, train_autoencoder, use_saved_pca
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter
from drep_jax.training.signals import Interrupted

MAIN = "l-DAE whitened"
ARMS: dict[str, dict[str, Any]] = {
    MAIN: {"scale": "whiten"},
    "pixel noise": {"noise": "pixels"},
    "l-DAE one scale": {"scale": "global", "whiten_loss": False},
    "l-DAE whitened, loss of Eq. 4": {"scale": "whiten", "whiten_loss": False},
    "l-DAE latent in and out": {"scale": "whiten", "inputs": "latent", "outputs": "latent"},
    "l-DAE zero gates": {"scale": "whiten", "gate": 0.0},
    "hidden patches": {"noise": "mask", "conditioned": False},
    "l-DAE single level": {"scale": "whiten", "schedule": "single"},
}
"""Name ↦ settings of `pretrain` that differ from the recipe's."""
CONTROLS = (RANDOM, LATENTS, PIXELS)
READERS = (RIDGE, TRAINED, NEIGHBOR)


def job_of(arguments: Any, arm: str, seed: int) -> Run:
    """Returns the run of an arm and a seed; its folder is made."""
    config = (ldae_digits if arguments.tiny else ldae_cifar10).get_config().to_dict()
    if arguments.tiny:
        config["model"] |= {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16, "patch_size": 4}
    config |= {"seed": seed, "progress": False, "log_every": 20, "checkpoint_every": 50}
    warmup = min(config["pretrain"]["warmup"], arguments.steps // 10)
    config["pretrain"] |= {
        "steps": arguments.steps,
        "batch_size": arguments.batch,
        "warmup": warmup,
        **ARMS.get(arm, {}),
    }
    config["pretrain"] |= {"learning_rate": arguments.rate, "probe_every": arguments.every}
    directory = os.path.join(arguments.cache, re.sub(r"\W+", "_", f"{arm} {seed}"))
    os.makedirs(directory, exist_ok=True)
    return Run(config, build(config), directory, MetricWriter(directory))


def hits_of(
    run: Run, arguments: Any, networks: dict[str, Any], arms: dict[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns {arm: {reader: hits of all test images}} of probes on clean training images."""
    setup, options = run.setup, reading(run.config)
    count = min(arguments.train, len(setup.train))
    train = Subset(setup.train, np.linspace(0, len(setup.train) - 1, count).astype(int))
    (features, labels), (queries, truth) = (
        features_of(setup, arms, each, networks=networks, **options) for each in (train, setup.test)
    )
    recipe = {"epochs": arguments.epochs, "batch_size": 2048, "learning_rate": 0.01}
    readers = probe_arms(features, labels, int(setup.train.num_classes), readers=arguments.readers, **recipe)
    return {arm: {name: read(queries[arm], truth) for name, read in each.items()} for arm, each in readers.items()}


def kept_hits(path: str, make: Any) -> dict[str, dict[str, np.ndarray]]:
    """Returns the hits in a file, which is made if it is not there."""
    hits = kept(path, lambda: jax.tree_util.tree_map(lambda value: value.astype(bool), make()))
    return jax.tree_util.tree_map(lambda value: value.astype(np.float64), hits)


def trained(arguments: Any, arm: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the hits of an arm at its time steps, training it first if need be."""
    run = job_of(arguments, arm, seed)
    path = os.path.join(run.directory, f"hits_{arguments.train}.npz")

    def make() -> Any:
        pretraining = pretraining_of(run, pca_of(run))
        use_saved_pca(run.directory)

        def accuracy(variables: Any) -> float:
            few, test = (
                Subset(each, np.arange(0, len(each), 5)[: arguments.curve])
                for each in (run.setup.train, run.setup.test)
            )
            (features, labels), (queries, truth) = (
                features_of(run.setup, {arm: variables}, each, **reading(run.config)) for each in (few, test)
            )
            readers = probe_arms(features, labels, int(run.setup.train.num_classes), readers=(RIDGE,))
            return 100 * float(readers[arm][RIDGE](queries[arm], truth).mean())

        def evaluate(params: Any) -> dict[str, float]:
            return {"probe": accuracy(pretraining.merged(params))}

        if arguments.every:
            print(f"{arm}, before the first step: {accuracy(random_encoder(run, pretraining)):.2f} %", flush=True)
        params, seconds = train_autoencoder(run, pretraining, evaluate)
        with open(os.path.join(run.directory, "seconds.json"), "w", encoding="utf-8") as file:
            json.dump({"seconds": seconds, "steps": arguments.steps}, file)
        arms = {f"{arm}, t = {t}": pretraining.merged(params, t) for t in arguments.times}
        return hits_of(run, arguments, {}, arms)

    with contextlib.closing(run.writer):
        return kept_hits(path, make)


def untrained(arguments: Any, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the hits of the arms without training."""
    run = job_of(arguments, "controls", seed)

    def make() -> Any:
        pretraining = pretraining_of(run, basis := pca_of(run))
        networks = control_networks(pretraining, basis)
        arms = {RANDOM: random_encoder(run, pretraining), **{name: {"params": {}} for name in networks}}
        return hits_of(run, arguments, networks, arms)

    with contextlib.closing(run.writer):
        return kept_hits(os.path.join(run.directory, f"hits_{arguments.train}.npz"), make)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, and prints the table of what there is."""
    tiny = {"steps": 2, "batch": 16, "train": 60, "seeds": (0,), "times": (10,), "arms": MAIN, "epochs": 2, "curve": 40}
    parser = Parser(__doc__, **tiny)
    parser.add_argument("--cache", default="runs/ldae_arms")
    parser.add_argument("--arms", default=".*", help="regular expression over the trained arms")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--times", type=lambda text: tuple(map(int, text.split(","))), default=(0, 10, 80))
    recipe = ldae_cifar10.get_config().pretrain
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch_size)
    parser.add_argument("--rate", type=float, default=recipe.learning_rate)
    parser.add_argument("--train", type=int, default=20_000, help="training images of the probes")
    parser.add_argument("--readers", type=lambda text: tuple(text.split(",")), default=READERS)
    parser.add_argument("--epochs", type=int, default=90, help="of the trained probe")
    parser.add_argument("--every", type=int, default=0, help="steps between points of the curve")
    parser.add_argument("--curve", type=int, default=4000, help="images of the curve's probes, training and test")
    parser.add_argument("--controls", type=int, default=1, help="0 leaves out the arms without training")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stops after so long, with a checkpoint; 0 for never"
    )
    arguments = parser.parse_args(argv)
    if arguments.minutes:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.alarm(round(60 * arguments.minutes))
    done: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    try:
        for seed in arguments.seeds:
            done[seed] = untrained(arguments, seed) if arguments.controls else {}
            for arm in ARMS:
                if re.fullmatch(arguments.arms, arm):
                    done[seed] |= trained(arguments, arm, seed)
    except Interrupted as error:
        print(error)
    print(table(done, arguments))


def table(done: dict[int, dict[str, dict[str, np.ndarray]]], arguments: Any) -> str:
    """Returns accuracies averaged over the seeds, and l-DAE's paired difference from each arm, all seeds' images together."""
    names = list(dict.fromkeys(name for hits in done.values() for name in hits))
    ours = f"{MAIN}, t = {10 if 10 in arguments.times else arguments.times[0]}"
    seeds = [seed for seed, hits in done.items() if ours in hits]
    rows = []
    for name in names:
        have = [seed for seed in done if name in done[seed]]
        readers = [reader for reader in READERS if all(reader in done[seed][name] for seed in have)]
        mean = {reader: 100 * np.mean([done[seed][name][reader].mean() for seed in have]) for reader in readers}
        row = [name, len(have), *(f"{mean[reader]:.2f}" if reader in mean else "–" for reader in READERS)]
        both = [seed for seed in seeds if seed in have]
        if name != ours and both:
            # An image's hits are averaged over the seeds: images are what is resampled.
            pair = {arm: {RIDGE: np.mean([done[seed][arm][RIDGE] for seed in both], axis=0)} for arm in (ours, name)}
            value, low, high = compare_arms(pair, ours, resamples=10_000, seed=0)["difference"][name][RIDGE]
            row.append(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append(row)
    headers = ["arm", "seeds", "ridge probe, %", "trained probe, %", "nearest, %", f"{ours} minus it (ridge)"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    jax.config.update("jax_threefry_partitionable", True)
    main()
