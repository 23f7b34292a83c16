"""Detectors against PyTorch in one run: the network, its proposals, and what is found in its outputs.

    pip install torch torchvision transformers        # see requirements-parity.txt
    PYTHONPATH=. python benchmarks/detection_forward.py
    PYTHONPATH=. python benchmarks/detection_forward.py fasterrcnn_resnet50_fpn --size 320 320 --rounds 7

One image, float32, inference mode, both sides on one core (`single_thread`). Rounds are interleaved;
milliseconds are medians of processor time, and the ratio is the median over the rounds of ours /
PyTorch's in the same round. A network whose reference is not installed is left out, and named.

- "network": image to raw outputs, for Faster R-CNN with 1,000 proposals and the suppression among them;
- "proposals": from the outputs of the first stage alone;
- "objects": all that comes behind the network. Both sides are given the same outputs. Faster R-CNN's
  are our network's, which has PyTorch's random weights there: suppression depends on the boxes, and the
  random classes leave about as many pairs of box and class above the threshold as pictures do. The
  others have weights of their own, and outputs drawn at random, a few hundred pairs above the threshold.

The references are transformers' DETR, torchvision's Faster R-CNN, and mmdetection's networks as
tests/parity/mmdet_reference.py writes them in plain PyTorch, with torchvision's suppression.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import functools
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax import weights
from drep_jax.evaluation import cost
from drep_jax.models import create_model
from drep_jax.models.detectors.rcnn import RCNN
from drep_jax.models.detectors.rpn import propose

CLASSES = 80
STRIDE = 32
"""The networks take images whose sides are multiples of it."""


class Reference(NamedTuple):
    """PyTorch's side.

    Attributes:
      parts: (image (1, 3, h, w), our outputs as tensors) ↦ part ↦ function without arguments.
      copied: the network whose weights ours gets; None where both sides draw their own.
    """

    parts: Callable[[Any, Any], dict[str, Callable[[], Any]]]
    copied: Any = None


class Case(NamedTuple):
    """A network of ours: the size of its image, its options, those with --tiny, and what makes its reference."""

    size: tuple[int, int]
    options: dict[str, Any]
    tiny: dict[str, Any]
    reference: Callable[[], Reference]


class Missing(Exception):
    """Why a reference cannot be made."""


def _needs(*packages):
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Missing(f"{' and '.join(missing)} not installed")


def mmdet_network(name, depths, kinds):
    """Returns a network of tests/parity/mmdet_reference.py; `kinds` is the number of maps of a level."""
    _needs("torch", "torchvision")
    from tests.parity import mmdet_reference

    net = getattr(mmdet_reference, name)(depths, CLASSES).eval()

    def parts(pixels, outputs):
        maps = [tensor.permute(0, 3, 1, 2) for tensor in jax.tree.leaves(outputs)]
        levels = len(maps) // kinds
        given = maps if kinds == 1 else [maps[level::levels] for level in range(levels)]
        size = tuple(pixels.shape[2:])
        return {"network": lambda: net(pixels), "objects": lambda: net.find(given, size)}

    return Reference(parts)


def transformers_detr():
    _needs("torch", "transformers")
    import torch
    import transformers

    trunk = transformers.ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage4"])
    options = {"use_timm_backbone": False, "backbone": None, "backbone_config": trunk, "num_labels": 91}
    net = transformers.DetrForObjectDetection(transformers.DetrConfig(**options)).eval()

    def parts(pixels, outputs):
        height, width = pixels.shape[2:]

        def objects():
            scores, labels = outputs.logits[:, -1].softmax(-1)[..., :-1].max(-1)
            cx, cy, w, h = outputs.boxes[:, -1].unbind(-1)
            corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
            corners = corners * torch.tensor([width, height, width, height])
            order = scores.argsort(descending=True)
            return corners[0][order[0]], scores[0][order[0]], labels[0][order[0]]

        return {"network": lambda: net(pixel_values=pixels).logits, "objects": objects}

    return Reference(parts)


def torchvision_faster_rcnn(classes):
    _needs("torch", "torchvision")
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    from torchvision.models.detection.image_list import ImageList

    from tests.parity.torch_side import draw_weights

    net = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes + 1).eval()
    draw_weights(net)
    with torch.no_grad():
        net.rpn.head.bbox_pred.weight *= 0.2
        net.roi_heads.box_predictor.cls_score.weight *= 3
    rpn, heads = net.rpn, net.roi_heads

    def parts(pixels, outputs):
        listed = ImageList(pixels, [tuple(pixels.shape[2:])])
        with torch.inference_mode():
            maps = list(net.backbone(pixels).values())
            anchors = rpn.anchor_generator(listed, maps)
        per_level = [3 * level.shape[2] * level.shape[3] for level in maps]
        valid = outputs.valid[0]
        boxes, logits, deltas = outputs.boxes[0][valid], outputs.logits[0][valid], outputs.deltas[0][valid].flatten(1)

        def network():
            features = net.backbone(pixels)
            proposals, _ = rpn(listed, features)
            return heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, listed.image_sizes)))

        def proposals():
            decoded = rpn.box_coder.decode(outputs.anchor_deltas.reshape(-1, 4), anchors).view(1, -1, 4)
            return rpn.filter_proposals(decoded, outputs.objectness.reshape(-1, 1), listed.image_sizes, per_level)

        def objects():
            return heads.postprocess_detections(logits, deltas, [boxes], listed.image_sizes)

        return {"network": network, "proposals": proposals, "objects": objects}

    return Reference(parts, copied=net)


REAL_SIZE = (800, 1088)
TINY_DETR = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 4, "width": 8, "num_heads": 2, "mlp_dim": 8}
TINY_DETR |= {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
TINY_YOLO = {"stage_sizes": (1,) * 5, "width": 2}
TINY_PYRAMID = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 4, "width": 8, "groups": 2, "depth": 1}
TINY_RCNN = {"depths": (1, 1, 1, 1), "width": 2, "pyramid_width": 4, "head_width": 6, "proposals": 20}
RESNET50, DARKNET53 = (3, 4, 6, 3), (1, 2, 8, 8, 4)
CASES = {
    "detr_r50": Case(REAL_SIZE, {"implementation": "facebookresearch"}, TINY_DETR, transformers_detr),
    "yolov3_d53": Case((320, 320), {}, TINY_YOLO, functools.partial(mmdet_network, "YOLOv3", DARKNET53, 1)),
    "fasterrcnn_resnet50_fpn": Case(
        REAL_SIZE, {"num_classes": 90, "norm_eps": 1e-5}, TINY_RCNN, functools.partial(torchvision_faster_rcnn, 90)
    ),
    "atss_r50": Case(REAL_SIZE, {}, TINY_PYRAMID, functools.partial(mmdet_network, "ATSS", RESNET50, 3)),
    "centernet_r50": Case(REAL_SIZE, {}, TINY_PYRAMID, functools.partial(mmdet_network, "CenterNet", RESNET50, 2)),
}


def drawn_variables(shapes):
    """Returns variables: near zero for kernels, near one for scales and variances; initializing would compile more."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.02, leaf.shape), leaf.dtype), shapes)


def copied_variables(net, model, shapes):
    """Returns the weights of a network of PyTorch, read from its file."""
    from tests.parity.torch_side import save_network

    with tempfile.TemporaryDirectory() as folder:
        return weights.load_foreign(save_network(net, os.path.join(folder, "net.pth")), model, shapes).variables


def drawn_outputs(shapes):
    """Returns outputs: small boxes, and classes of which few are likely."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        values = rng.normal(0, 0.5, leaf.shape)
        if leaf.shape[-1] >= CLASSES:
            values = rng.normal(-6, 1.2, leaf.shape)
        if leaf.shape[-1] == 3 * (5 + CLASSES):
            rows = values.reshape(*leaf.shape[:-1], 3, 5 + CLASSES)
            rows[..., :4] = rng.normal(0, 0.3, rows[..., :4].shape)
        return jnp.asarray(np.abs(values) if leaf.shape[-1] == 4 else values, jnp.float32)

    return jax.tree.map(draw, shapes)


def our_parts(model, variables, image, outputs):
    """Returns part ↦ function without arguments, as `Reference.parts` does."""
    size = image.shape[1:3]
    forward, find = jax.jit(model.apply), jax.jit(lambda outputs: model.objects(outputs, size))
    parts = {"network": lambda: forward(variables, image)}
    if isinstance(model, RCNN):
        anchors, limit = model._anchors(size), jnp.asarray([size], jnp.float32)
        options = {"least": model.convention.least_proposal, "clamp_below": model.convention.clamp_below}
        options |= {"per_level": model.per_level, "keep": model.proposals}
        suggest = jax.jit(lambda objectness, deltas: propose(objectness, deltas, anchors, limit, **options))
        parts["proposals"] = lambda: suggest(outputs.objectness, outputs.anchor_deltas)
    return {**parts, "objects": lambda: find(outputs)}


def measure(name, size, rounds, tiny):
    """Returns the table's rows of one network; with tiny, ours alone where its reference is not installed."""
    case = CASES[name]
    size = tuple(size or case.size)
    try:
        reference = case.reference()
    except Missing as reason:
        if not tiny:
            raise
        print(f"{name}: ours alone, {reason}")
        reference = None
    options = {"num_classes": CLASSES, **case.options, **(case.tiny if tiny else {})}
    model = create_model(name, image_size=size, **options)
    image = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    outputs, shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    copied = reference is not None and reference.copied is not None and not tiny
    variables = copied_variables(reference.copied, model, shapes) if copied else drawn_variables(shapes)
    x = jnp.asarray(image)
    given = jax.jit(model.apply)(variables, x) if isinstance(model, RCNN) else drawn_outputs(outputs)
    parts = {part: {"ours": run} for part, run in our_parts(model, variables, x, given).items()}
    if reference is not None:
        import torch

        torch.set_num_threads(1)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
        tensors = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), given)
        for part, run in reference.parts(pixels, tensors).items():
            parts[part]["PyTorch"] = torch.inference_mode()(run)
    found = parts["objects"]["ours"]()
    print(f"{name}: {int(found.valid.sum())} objects, {int(found.left_out.sum())} left out", file=sys.stderr)
    rows = []
    for part, sides in parts.items():
        times = cost.interleaved(sides, rounds=rounds, clock=time.process_time)
        milliseconds = [f"{1000 * float(np.median(seconds)):.1f}" for seconds in times.values()]
        print(f"{name}, {part}: {' ms against '.join(milliseconds)} ms", file=sys.stderr, flush=True)
        against = [f"{cost.ratios(times, 'PyTorch')['ours']:.2f}"] if "PyTorch" in sides else ["–", "–"]
        rows.append([name, "{} × {}".format(*size), part, *milliseconds, *against])
    return rows


def main(command=None):
    """Measures and prints the table."""
    tiny = ["detr_r50", "yolov3_d53", "fasterrcnn_resnet50_fpn"]
    parser = Parser(__doc__, models=tiny, rounds=1, size=(64, 64))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    size_help = f"of the image, multiples of {STRIDE}; by default each network has its own"
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=size_help)
    arguments = parser.parse_args(command)
    if unknown := set(arguments.models) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(CASES)}")
    if arguments.size and any(side < STRIDE or side % STRIDE for side in arguments.size):
        parser.error(f"--size {arguments.size[0]} {arguments.size[1]}: expected multiples of {STRIDE}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    rows = []
    for name in arguments.models or list(CASES):
        try:
            rows += measure(name, arguments.size, arguments.rounds, arguments.tiny)
        except Missing as reason:
            print(f"{name}: left out, {reason}")
    if rows:
        print(f"one image, float32, one thread, {arguments.rounds} interleaved rounds")
        headers = ["", "image", "", "ours ms", "PyTorch ms", "ours / PyTorch"]
        align = ("left",) * 3 + ("right",) * 3
        print(tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
