"""Detectors against PyTorch: forward of one image and what is found in its outputs, float32, one thread each.

    pip install torch torchvision transformers        # see requirements-parity.txt
    PYTHONPATH=. python benchmarks/detection_forward.py               # or: … detection_forward.py yolov3_d53

Both sides run on one core (`single_thread`), in inference mode, each with its own random weights.
Rounds are interleaved; seconds are medians of processor time, and the ratio is the median over the
rounds of ours / PyTorch's in the same round. "objects" is all that comes behind the network: both
sides are given the same outputs, drawn at random such that a few hundred pairs of box and class are
above the threshold. The references are transformers' DETR, and mmdetection's networks as
tests/parity/mmdet_reference.py writes them in plain PyTorch, with torchvision's suppression.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.evaluation import cost
from drep_jax.models import create_model

CLASSES = 80


class Case(NamedTuple):
    """A network of ours at an image size, and what makes its reference: (forward, objects of outputs)."""

    model: str
    options: dict[str, Any]
    size: tuple[int, int]
    reference: Callable[[], tuple[Callable, Callable]]
    tiny: dict[str, Any]


class Missing(Exception):
    """Why a reference cannot be made."""


def _needs(name):
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")


def mmdet_network(name, depths):
    """Returns the two halves of a network of tests/parity/mmdet_reference.py, outputs as flat lists of maps."""
    _needs("torchvision")
    from tests.parity import mmdet_reference

    net = getattr(mmdet_reference, name)(depths, CLASSES).eval()

    def find(maps, size):
        parts = 1 if name == "YOLOv3" else 3 if name == "ATSS" else 2
        levels = len(maps) // parts
        maps = [m.permute(0, 3, 1, 2) for m in maps]
        return net.find(maps if parts == 1 else [maps[i::levels] for i in range(levels)], size)

    return net, find


def transformers_detr():
    _needs("transformers")
    import torch
    import transformers

    trunk = transformers.ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage4"])
    options = {"use_timm_backbone": False, "backbone": None, "backbone_config": trunk, "num_labels": 91}
    net = transformers.DetrForObjectDetection(transformers.DetrConfig(**options)).eval()

    def find(outputs, size):
        boxes, logits = outputs[-1][:, 0], outputs[0][:, 0]
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        cx, cy, w, h = boxes.unbind(-1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        corners = corners * torch.tensor([size[1], size[0], size[1], size[0]])
        order = scores.argsort(descending=True)
        return corners[0][order[0]], scores[0][order[0]], labels[0][order[0]]

    return lambda x: net(pixel_values=x).logits, find


TINY_DETR = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 4, "width": 8, "num_heads": 2, "mlp_dim": 8}
TINY_PYRAMID = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 4, "width": 8, "groups": 2, "depth": 1}
CASES = {
    case.model: case
    for case in (
        Case(
            "detr_r50",
            {"implementation": "facebookresearch"},
            (800, 1088),
            transformers_detr,
            {**TINY_DETR, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5},
        ),
        Case(
            "yolov3_d53",
            {},
            (320, 320),
            lambda: mmdet_network("YOLOv3", (1, 2, 8, 8, 4)),
            {"stage_sizes": (1,) * 5, "width": 2},
        ),
        Case("atss_r50", {}, (800, 1088), lambda: mmdet_network("ATSS", (3, 4, 6, 3)), TINY_PYRAMID),
        Case("centernet_r50", {}, (800, 1088), lambda: mmdet_network("CenterNet", (3, 4, 6, 3)), TINY_PYRAMID),
    )
}


def drawn(shapes, seed=1):
    """Returns outputs: small boxes, and classes of which few are likely."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(0, 0.5, leaf.shape)
        if leaf.shape[-1] >= CLASSES:
            values = rng.normal(-6, 1.2, leaf.shape)
        if leaf.shape[-1] == 3 * (5 + CLASSES):
            rows = values.reshape(*leaf.shape[:-1], 3, 5 + CLASSES)
            rows[..., :4] = rng.normal(0, 0.3, rows[..., :4].shape)
        return np.abs(values).astype(np.float32) if leaf.shape[-1] == 4 else values.astype(np.float32)

    return jax.tree.map(draw, shapes)


def measure(name, rounds, tiny):
    """Returns the table's rows of one network."""
    case = CASES[name]
    size = (32, 32) if tiny else case.size
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    options = {**case.options, **(case.tiny if tiny else {})}
    model = create_model(name, num_classes=CLASSES, image_size=size, **options)
    outputs, shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    # Near zero for kernels, near one for scales and variances, drawn here: initializing would be one more program.
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.02, leaf.shape), leaf.dtype), shapes)
    forward, find = jax.jit(model.apply), jax.jit(lambda outputs: model.objects(outputs, size))
    given = drawn(outputs)
    x, held = jnp.asarray(images), jax.tree.map(jnp.asarray, given)
    sides = {"forward": {"ours": lambda: forward(variables, x)}, "objects": {"ours": lambda: find(held)}}
    if tiny:
        sides["forward"]["PyTorch"] = sides["objects"]["PyTorch"] = lambda: images @ images[0, 0].T
    else:
        _needs("torch")
        import torch

        torch.set_num_threads(1)
        their_forward, their_find = case.reference()
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        maps = [torch.from_numpy(leaf) for leaf in jax.tree.leaves(given)]

        def inferred(function, *arguments):
            with torch.inference_mode():
                return function(*arguments)

        sides["forward"]["PyTorch"] = lambda: inferred(their_forward, pixels)
        sides["objects"]["PyTorch"] = lambda: inferred(their_find, maps, size)
    rows = []
    for part, both in sides.items():
        times = cost.interleaved(both, rounds=rounds, clock=time.process_time)
        milliseconds = [1000 * float(np.median(times[side])) for side in ("ours", "PyTorch")]
        rows.append([name, "{} × {}".format(*size), part, *milliseconds, cost.ratios(times, "PyTorch")["ours"]])
        print(f"{name}, {part}: {milliseconds[0]:.1f} ms against {milliseconds[1]:.1f}", file=sys.stderr, flush=True)
    return rows


def main(command=None):
    """Measures and prints the table."""
    parser = Parser(__doc__, models=["detr_r50"], rounds=1)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(command)
    if unknown := set(arguments.models) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows = []
    for name in arguments.models or list(CASES):
        try:
            rows += measure(name, arguments.rounds, arguments.tiny)
        except Missing as reason:
            print(f"{name}: skipped, {reason}", file=sys.stderr)
    print(f"one image, float32, one thread, {arguments.rounds} interleaved rounds")
    headers = ["", "image", "", "ours ms", "PyTorch ms", "ours / PyTorch"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", "", "", ".1f", ".1f", ".2f")))


if __name__ == "__main__":
    main()
