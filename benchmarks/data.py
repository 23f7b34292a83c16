"""Images per second of our loader and of a plain PyTorch loader: same work, same cores.

    PYTHONPATH=. python benchmarks/data.py                # needs requirements-parity.txt
    PYTHONPATH=. python benchmarks/data.py --sides ours   # without PyTorch and torchvision

The work: read a JPEG of 500 × 375 pixels, decode it, crop and resize to 224 × 224 at random
(bicubic), flip horizontally at random, uint8 batches of 64. Every side is a process (with its
workers a process group) that reads without end. While one is timed the others are stopped, so that
none reads ahead for free. "ours" has its eight threads, "ours_2" two, the number of workers of
"torch": on a machine that is otherwise busy, more threads get more of it. Rounds are interleaved;
the results are medians, and the median of the ratios within a round.
"""

import argparse
import functools
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks.common import Parser, network

BATCH = 64
SIZE = 224
WORKERS = 2


def write_images(folder, count):
    """Writes photograph-like JPEGs: shapes on a smooth background with grain, about 60 KB each."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for i in range(count):
        ground = ndimage.zoom(rng.normal(size=(8, 10, 3)), (375 / 8, 50, 1), order=3)[:375, :500]
        detail = ndimage.zoom(rng.normal(size=(94, 125, 3)), (375 / 94, 4, 1), order=1)[:375, :500]
        pixels = 127 + 50 * ground + 25 * detail + 6 * rng.normal(size=(375, 500, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(f"{folder}/{i:04}.jpg", quality=90)


def ours(folder, threads=None, batch=BATCH):
    from drep_jax.data import open_source
    from drep_jax.data.augment import Augmentation
    from drep_jax.data.loader import training_batches

    source = open_source(f"folder:{folder}", "train", image_size=(SIZE, SIZE))
    augmentation = Augmentation(flip=True, crop_scale=(0.08, 1.0))
    for read in training_batches(source, batch, seed=0, augmentation=augmentation, num_threads=threads):
        yield read["image"]


def plain(folder, batch=BATCH):
    import torch
    from torchvision import transforms

    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    names = sorted(os.listdir(folder))

    class Folder(torch.utils.data.Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            with Image.open(f"{folder}/{names[i % len(names)]}") as image:
                return change(image.convert("RGB"))

    yield from torch.utils.data.DataLoader(Folder(), batch, shuffle=True, num_workers=WORKERS)


SIDES = {"ours": ours, "ours_2": functools.partial(ours, threads=WORKERS), "torch": plain}


def serve(name, folder):
    """Reads for ever and tells of every batch."""
    for images in SIDES[name](folder):
        if sorted(images.shape) != [3, BATCH, SIZE, SIZE]:
            raise SystemExit(f"{name} gives {tuple(images.shape)}.")
        print(".", flush=True)


def timed(process, batches):
    """Returns images per second of a side that runs alone for so many batches."""
    while select.select([process.stdout], [], [], 0)[0] and process.stdout.read(1):
        pass  # told before it was stopped
    os.killpg(process.pid, signal.SIGCONT)
    process.stdout.readline()
    began = time.perf_counter()
    for _ in range(batches):
        if not process.stdout.readline():
            raise SystemExit("A side ended; its message is above.")
    seconds = time.perf_counter() - began
    os.killpg(process.pid, signal.SIGSTOP)
    return BATCH * batches / seconds


def forward_rate(tiny=False):
    """Returns images per second of the forward pass of ViT-S/16, an upper bound for training."""
    import jax
    import jax.numpy as jnp

    model, pixels = network("vit_s16", tiny, SIZE)
    images = jnp.zeros((8, pixels, pixels, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    forward = jax.jit(model.apply)
    forward(variables, images).block_until_ready()
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        forward(variables, images).block_until_ready()
        rates.append(len(images) / (time.perf_counter() - began))
    return statistics.median(rates)


def main(command=None):
    parser = Parser(__doc__, sides=["ours_2"], rounds=1, batches=1, images=4)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--batches", type=int, default=24, help="a round; our threads finish eight batches at about the same time"
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command)
    if arguments.serve:
        serve(*arguments.serve)
        return
    if arguments.tiny:  # no processes to stop and to time, but the same reading
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, arguments.images)
            for name in arguments.sides:
                print(f"{name:8s} {next(SIDES[name](folder, batch=arguments.images)).shape}")
        print(f"forward  {forward_rate(tiny=True):7.1f} images/s")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no stopped process behind
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, arguments.images)
        processes = {
            name: subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--serve", name, folder],
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
            for name in arguments.sides
        }
        rates = {name: [] for name in processes}
        try:
            for process in processes.values():
                os.killpg(process.pid, signal.SIGSTOP)
            for process in processes.values():
                timed(process, 2)  # start-up
            for number in range(arguments.rounds):
                names = list(processes)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    rates[name].append(timed(processes[name], arguments.batches))
        finally:
            for process in processes.values():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
    print(f"{len(os.sched_getaffinity(0))} cores; {arguments.rounds} rounds of {arguments.batches} batches of {BATCH}")
    for name, values in rates.items():
        ratio = "".join(
            f"  {statistics.median(a / b for a, b in zip(values, rates['torch'], strict=True)):5.2f}× torch"
            for _ in range("torch" in rates and name != "torch")
        )
        print(f"{name:8s} {statistics.median(values):7.1f} images/s{ratio}")
    print(f"forward  {forward_rate():7.1f} images/s of ViT-S/16 on the same cores: no step takes more")


if __name__ == "__main__":
    main()
