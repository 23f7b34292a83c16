"""FCN and SegFormer against PyTorch: forward of one image, float32, one thread each, and the memory of a large image.

    pip install torch torchvision transformers        # see requirements-parity.txt
    PYTHONPATH=. python benchmarks/segmentation_forward.py            # or: … segmentation_forward.py segformer_b0
    PYTHONPATH=. python benchmarks/segmentation_forward.py --memory   # each network in a process of its own

Both sides run on one core (`single_thread`), in inference mode, each with its own random weights.
Rounds are interleaved; seconds are medians of processor time, and the ratio is the median over the
rounds of ours / PyTorch's in the same round. The references are torchvision's FCN (its auxiliary
head, which runs in inference too, taken out), transformers' SegFormer, and mmsegmentation's two
networks as tests/parity/mmseg_reference.py writes them in plain PyTorch. --memory needs no PyTorch.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import importlib.util
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser, printed_by
from drep_jax.evaluation import cost
from drep_jax.models import create_model

CLASSES = 150
TINY = {
    "segformer": {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "head_width": 8},
    "fcn": {"stage_sizes": (1, 1, 1, 1), "width": 4},
}
"""What replaces a network with --tiny, by its family."""


class Case(NamedTuple):
    """A network of ours, its options, and what makes its reference."""

    model: str
    options: dict[str, str]
    reference: Callable[[], Any]


class Missing(Exception):
    """Why a reference cannot be made."""


def mmseg_fcn(depths):
    _needs("torch")
    from tests.parity.mmseg_reference import MmsegFCN

    net = MmsegFCN(depths, CLASSES).eval()
    return lambda x: net.decode_head(net.backbone(x)[-1])


def torchvision_fcn(name):
    _needs("torchvision")
    import torchvision

    make = getattr(torchvision.models.segmentation, name)
    net = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False).eval()
    return lambda x: net.classifier(net.backbone(x)["out"])


def mmseg_segformer():
    _needs("torch")
    from tests.parity.mmseg_reference import MmsegSegFormer

    return MmsegSegFormer(CLASSES).eval()


def transformers_segformer():
    _needs("transformers")
    import transformers

    net = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=CLASSES)).eval()
    return lambda x: net(x).logits


def _needs(name):
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")


CASES = {
    "fcn_r50": Case("fcn_r50", {}, lambda: mmseg_fcn((3, 4, 6, 3))),
    "fcn_resnet50": Case("fcn_resnet50", {}, lambda: torchvision_fcn("fcn_resnet50")),
    "segformer_b0": Case("segformer_b0", {}, mmseg_segformer),
    "segformer_b0 of transformers": Case("segformer_b0", {"implementation": "transformers"}, transformers_segformer),
}


def our_side(case, images, tiny):
    """Returns what runs our network; it has no auxiliary head, which inference does not run."""
    family = case.model.split("_")[0]
    options = {"auxiliary": False, **case.options} if family == "fcn" else case.options
    name, options = (family, {**options, **TINY[family]}) if tiny else (case.model, options)
    model = create_model(name, num_classes=CLASSES, image_size=images.shape[1:3], **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    # Near zero for kernels, near one for scales and variances, drawn here: initializing would be one more program.
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.02, leaf.shape), leaf.dtype), shapes)
    forward, images = jax.jit(model.apply), jnp.asarray(images)
    return lambda: forward(variables, images)


def their_side(case, images):
    """Returns the same of PyTorch's."""
    _needs("torch")
    import torch

    torch.set_num_threads(1)
    forward = case.reference()
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def run():
        with torch.inference_mode():
            return forward(images).numpy()

    return run


def measure(name, size, rounds, tiny):
    """Returns the table's row of one network."""
    case = CASES[name]
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    sides = {"ours": our_side(case, images, tiny), "PyTorch": (lambda: images @ images[0, 0].T) if tiny else None}
    sides["PyTorch"] = sides["PyTorch"] or their_side(case, images)
    times = cost.interleaved(sides, rounds=rounds, clock=time.process_time)
    seconds = [float(np.median(times[side])) for side in ("ours", "PyTorch")]
    print(f"{name}: {seconds[0]:.2f} s against {seconds[1]:.2f} s", file=sys.stderr, flush=True)
    return [name, *seconds, cost.ratios(times, "PyTorch")["ours"]]


def peak(name, size, tiny):
    """Runs our network once and prints the largest memory of this process in GiB."""
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    jax.block_until_ready(our_side(CASES[name], images, tiny)())
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")


def main(command=None):
    """Measures and prints the table."""
    parser = Parser(__doc__, models=["segformer_b0", "fcn_r50"], rounds=1, size=(32, 40), large=(32, 64))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), help="of the image, height and width")
    parser.add_argument("--large", type=int, nargs=2, default=(512, 2048), help="the same with --memory")
    parser.add_argument("--memory", action="store_true", help="the largest memory of one forward pass")
    parser.add_argument("--peak", action="store_true", help="print the memory of this process alone")
    arguments = parser.parse_args(command)
    if unknown := set(arguments.models) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    names, rows = arguments.models or list(CASES), []
    if arguments.peak:
        peak(names[0], arguments.large, arguments.tiny)
        return
    if arguments.memory:
        script = str(pathlib.Path(__file__))
        for name in names:
            options = [name, "--peak", "--large", *map(str, arguments.large)]
            rows.append(
                [name, "{} × {}".format(*arguments.large), float(printed_by(main, script, options, arguments.tiny))]
            )
        print(tabulate(rows, ["", "image", "peak GiB"], tablefmt="github", floatfmt=".2f"))
        return
    for name in names:
        try:
            rows.append(measure(name, tuple(arguments.size), arguments.rounds, arguments.tiny))
        except Missing as reason:
            print(f"{name}: skipped, {reason}", file=sys.stderr)
    print("one image of {} × {}, float32, one thread, {} interleaved rounds".format(*arguments.size, arguments.rounds))
    headers = ["", "ours s", "PyTorch s", "ours / PyTorch"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".2f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
