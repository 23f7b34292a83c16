"""Faster R-CNN against torchvision's with the same weights: one image through the network, proposals, and objects.

    pip install torch torchvision        # see requirements-parity.txt
    PYTHONPATH=. python benchmarks/rcnn.py                       # 320 × 320
    PYTHONPATH=. python benchmarks/rcnn.py --size 800 1344 --rounds 3

Both sides run on one core (`single_thread`), in inference mode. "network": images to logits and
deltas of 1,000 proposals, suppression among these included. "proposals": from the outputs of the
first stage alone. "objects": from logits and deltas to the final boxes; the random classes leave
about as many pairs of box and class above the threshold as pictures do. Rounds are interleaved;
milliseconds are medians of processor time, and the ratio is the median over the rounds of ours /
torchvision's in the same round.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import importlib.util
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax import weights
from drep_jax.evaluation import cost
from drep_jax.models import create_model
from drep_jax.models.detectors.rpn import propose

CLASSES = 90
NAME = "fasterrcnn_resnet50_fpn"
TINY = {"depths": (1, 1, 1, 1), "width": 2, "pyramid_width": 4, "head_width": 6, "proposals": 20}


def our_side(model, variables, images):
    """Returns what runs each part, and the outputs that the later parts begin with."""
    size = images.shape[1:3]
    limit = jnp.asarray([size], jnp.float32)
    anchors = model._anchors(size)
    forward = jax.jit(model.apply)
    options = {"per_level": model.per_level, "keep": model.proposals, "least": 1e-3, "clamp_below": False}
    suggest = jax.jit(lambda objectness, deltas: propose(objectness, deltas, anchors, limit, **options))
    find = jax.jit(lambda outputs: model.objects(outputs, size))
    x = jnp.asarray(images)
    outputs = jax.block_until_ready(forward(variables, x))
    return {
        "network": lambda: forward(variables, x),
        "proposals": lambda: suggest(outputs.objectness, outputs.anchor_deltas),
        "objects": lambda: find(outputs),
    }, outputs


def their_network():
    """Returns torchvision's network with random weights, and its state as a file of ours reads it."""
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from tests.parity.torch_side import draw_weights, save_network

    torch.set_num_threads(1)
    net = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1).eval()
    draw_weights(net)
    with torch.no_grad():
        net.rpn.head.bbox_pred.weight *= 0.2
        net.roi_heads.box_predictor.cls_score.weight *= 3
    model = create_model(NAME, num_classes=CLASSES, image_size=(64, 64), norm_eps=1e-5)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    with tempfile.TemporaryDirectory() as folder:
        return net, model, weights.load_foreign(save_network(net, f"{folder}/net.pth"), model, like).variables


def their_side(net, images, outputs):
    """Returns the same parts of torchvision's."""
    import torch
    from torchvision.models.detection.image_list import ImageList

    size = images.shape[1:3]
    listed = ImageList(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), [tuple(size)])
    anchors = net.rpn.anchor_generator(listed, list(net.backbone(listed.tensors).values()))
    sides = [len(level) for level in _levels(size)]
    objectness, deltas, boxes, valid, logits, regression = (
        torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(outputs)
    )
    boxes, logits, regression = boxes[0][valid[0]], logits[0][valid[0]], regression[0][valid[0]].flatten(1)

    @torch.inference_mode()
    def network():
        features = net.backbone(listed.tensors)
        proposals, _ = net.rpn(listed, features)
        read = net.roi_heads.box_roi_pool(features, proposals, listed.image_sizes)
        return net.roi_heads.box_predictor(net.roi_heads.box_head(read))

    @torch.inference_mode()
    def proposals():
        decoded = net.rpn.box_coder.decode(deltas.reshape(-1, 4), anchors).view(1, -1, 4)
        return net.rpn.filter_proposals(decoded, objectness.reshape(-1, 1), listed.image_sizes, sides)

    @torch.inference_mode()
    def objects():
        return net.roi_heads.postprocess_detections(logits, regression, [boxes], listed.image_sizes)

    return {"network": network, "proposals": proposals, "objects": objects}


def _levels(size):
    return create_model(NAME, num_classes=CLASSES, image_size=size)._anchors(tuple(size))


def main(command=None):
    """Measures and prints the table."""
    parser = Parser(__doc__, rounds=1, size=(64, 64))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 320), help="of the image, height and width")
    arguments = parser.parse_args(command)
    images = np.random.default_rng(0).normal(size=(1, *arguments.size, 3)).astype(np.float32)
    if arguments.tiny:
        model = create_model(NAME, num_classes=5, image_size=arguments.size, **TINY)
        variables = model.init(jax.random.key(0, impl="rbg"), jnp.asarray(images))
        sides, _ = our_side(model, variables, images)
        others = dict.fromkeys(sides, lambda: images @ images[0, 0].T)
    else:
        if importlib.util.find_spec("torchvision") is None:
            print("skipped, torchvision is not installed", file=sys.stderr)
            return
        net, model, variables = their_network()
        sides, outputs = our_side(model, variables, images)
        others = their_side(net, images, outputs)
        found = model.objects(outputs, tuple(arguments.size))
        print(
            f"{int(outputs.valid.sum())} proposals, {int(found.valid.sum())} objects, {int(found.left_out[0])} left out"
        )
    rows = []
    for part in sides:
        times = cost.interleaved(
            {"ours": sides[part], "torchvision": others[part]}, rounds=arguments.rounds, clock=time.process_time
        )
        milliseconds = [1000 * float(np.median(times[side])) for side in ("ours", "torchvision")]
        rows.append([part, *milliseconds, cost.ratios(times, "torchvision")["ours"]])
        print(f"{part}: {milliseconds[0]:.1f} ms against {milliseconds[1]:.1f}", file=sys.stderr, flush=True)
    print("one image of {} × {}, float32, one thread, {} interleaved rounds".format(*arguments.size, arguments.rounds))
    headers = ["", "ours ms", "torchvision ms", "ours / torchvision"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".1f", ".1f", ".2f")))


if __name__ == "__main__":
    main()
