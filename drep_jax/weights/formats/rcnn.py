"""Faster and Mask R-CNNs of mmdetection and torchvision, and their ImageNet trunks, where training begins.

The first dense layer of the box head is a convolution by the whole region here; in the files its
input lies flattened, (channels, rows, columns). The transposed convolution of the mask head is a
dense layer here.

torchvision's older files name their convolutions without the index of a layer in its block; both
are read, and written back as they were.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.models.detectors.rcnn import BOX_CELLS, RCNN
from drep_jax.weights.formats.implementations import renaming, rules_of
from drep_jax.weights.formats.mmdet_parts import COUNTERS, fpn_rules, trunk_rules
from drep_jax.weights.formats.swin_v1 import classifier_rules, merges, mmdet_rules
from drep_jax.weights.formats.timm_swinv2 import BLOCK_RULES, BUFFERS
from drep_jax.weights.translation import POINTWISE, Format, Layout, Rule


def _regions(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1, BOX_CELLS, BOX_CELLS).transpose(2, 3, 1, 0)


REGION = Layout(_regions, lambda a: a.transpose(3, 2, 0, 1).reshape(a.shape[3], -1))
"""A dense layer on flattened regions (out, channels · rows · columns) and our convolution (rows, columns, channels, out)."""
DOUBLING = Layout(
    lambda a: a.transpose(0, 2, 3, 1).reshape(a.shape[0], -1),
    lambda a: a.reshape(a.shape[0], 2, 2, -1).transpose(0, 3, 1, 2),
)
"""A transposed convolution by 2×2 of stride 2 (in, out, 2, 2) and our dense layer (in, rows · columns · out)."""
_REST = "(neck|rpn|box_head|mask_head)"


def _masks(head: str, upsample: str, logits: str) -> tuple[Rule, ...]:
    """Returns the rules of the mask head; `head` is a template of a convolution's name by its number from 0."""
    return (
        Rule(r"mask_head/conv(\d)", lambda match: head.format(int(match[1]) - 1)),
        Rule("mask_head/upsample/kernel", f"{upsample}.weight", layout=DOUBLING),
        Rule("mask_head/upsample_bias", f"{upsample}.bias"),
        Rule("mask_head/logits/kernel", f"{logits}.weight", layout=POINTWISE),
        Rule("mask_head/logits", logits),
    )


_MMDET_HEADS = (
    Rule("rpn/conv", "rpn_head.rpn_conv"),
    Rule("rpn/objectness", "rpn_head.rpn_cls"),
    Rule("rpn/deltas", "rpn_head.rpn_reg"),
    Rule("box_head/fc1/kernel", "roi_head.bbox_head.shared_fcs.0.weight", layout=REGION),
    Rule("box_head/fc1", "roi_head.bbox_head.shared_fcs.0"),
    Rule("box_head/fc2", "roi_head.bbox_head.shared_fcs.1"),
    Rule("box_head/classes", "roi_head.bbox_head.fc_cls"),
    Rule("box_head/deltas", "roi_head.bbox_head.fc_reg"),
    *_masks("roi_head.mask_head.convs.{}.conv", "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"),
)
_TORCHVISION_RULES = (
    *trunk_rules("backbone.body."),
    Rule(r"neck/lateral_(\d)", r"backbone.fpn.inner_blocks.\1.0"),
    Rule(r"neck/output_(\d)", r"backbone.fpn.layer_blocks.\1.0"),
    Rule("rpn/conv", "rpn.head.conv.0.0"),
    Rule("rpn/objectness", "rpn.head.cls_logits"),
    Rule("rpn/deltas", "rpn.head.bbox_pred"),
    Rule("box_head/fc1/kernel", "roi_heads.box_head.fc6.weight", layout=REGION),
    Rule("box_head/fc1", "roi_heads.box_head.fc6"),
    Rule("box_head/fc2", "roi_heads.box_head.fc7"),
    Rule("box_head/classes", "roi_heads.box_predictor.cls_score"),
    Rule("box_head/deltas", "roi_heads.box_predictor.bbox_pred"),
    *_masks(
        "roi_heads.mask_head.{}.0", "roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_predictor.mask_fcn_logits"
    ),
)


def _mmdet_rules(net: Any) -> tuple[Rule, ...]:
    if net.trunk == "swinv2":
        raise CheckpointError(
            "mmdetection has no SwinV2, so there are no names for it: choose a model such as mask_rcnn_swin_t, or write "
            "safetensors with our own names (native)."
        )
    trunk = mmdet_rules() if net.trunk == "swin" else trunk_rules()
    return (*trunk, *fpn_rules(), *_MMDET_HEADS)


def _torchvision_rules(net: Any) -> tuple[Rule, ...]:
    if net.trunk != "resnet":
        raise CheckpointError(f"torchvision's R-CNNs are on ResNets; this one is on {net.trunk}: set trunk=resnet.")
    return _TORCHVISION_RULES


def _why(implementation: str, net: Any) -> str:
    r50 = {
        "mmdet": "faster_rcnn_r50 or mask_rcnn_r50",
        "torchvision": "fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn",
    }
    return (
        f"{implementation}'s R-CNNs have other anchors, another RoIAlign and the background at another place than this "
        f"model, so its boxes would be wrong: set --config.model.implementation={implementation} (it is "
        f"{net.implementation}), or choose {r50[implementation]}."
    )


def _mask_free(pattern: str) -> Callable[[Any, Any], tuple[str, ...]]:
    """Returns what passes over the mask head's tensors where the network has none."""
    return lambda net, names: () if net.masks else (pattern,)


_OLD_NAMES = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(?=weight|bias)", r"\1.0."),
    (r"^rpn\.head\.conv\.(?=weight|bias)", "rpn.head.conv.0.0."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda match: f"roi_heads.mask_head.{int(match[1]) - 1}.0."),
)


MMDET_RCNN = Format(
    name="mmdet",
    family=RCNN,
    marks=(r"rpn_head\.rpn_conv\.weight", r"roi_head\.bbox_head\.shared_fcs\.0\.weight"),
    rules=rules_of("mmdet", _mmdet_rules, _why),
    ignored=(*COUNTERS, *BUFFERS),
    unused=_mask_free(r"roi_head\.mask_head\..*"),
)
TORCHVISION_RCNN = Format(
    name="torchvision",
    family=RCNN,
    marks=(r"rpn\.head\.cls_logits\.weight", r"roi_heads\.box_head\.fc6\.weight"),
    rules=rules_of("torchvision", _torchvision_rules, _why),
    ignored=COUNTERS,
    canonical=renaming(_OLD_NAMES),
    unused=_mask_free(r"roi_heads\.mask_(head|predictor)\..*"),
)


def _alone(name: str, trunk: str, marks: Sequence[str], rules: tuple[Rule, ...], ignored: Sequence[str]) -> Format:
    """Returns the format of a trunk's ImageNet weights."""

    def of(net: Any) -> tuple[Rule, ...]:
        if net.trunk != trunk:
            raise CheckpointError(
                f"The file is of a {trunk}, and the model's trunk is a {net.trunk}: choose another model."
            )
        # Where the file would have the rest, which it lacks, does not matter.
        return (
            *rules,
            Rule(rf"{_REST}(.*)", r"not in the file: \1\2"),
            Rule(r"backbone/(norm\d)", r"not in the file: \1"),
        )

    return Format(
        name=name,
        family=RCNN,
        marks=tuple(marks),
        rules=of,
        ignored=(*ignored, *COUNTERS),
        fresh=(rf"(params|batch_stats)/{_REST}.*", r"params/backbone/norm\d/.*"),
    )


_HEAD = (r"head\..*", r"norm\..*", *BUFFERS)
RESNET_RCNN = _alone(
    "resnet",
    "resnet",
    (r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"layer2\.0\.downsample\.0\.weight"),
    trunk_rules(""),
    (r"fc\..*",),
)
SWIN_RCNN = _alone(
    "swin",
    "swin",
    (r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", r"layers\.0\.downsample\.reduction\.weight"),
    (*classifier_rules("backbone/"), merges("backbone/", 1)),
    _HEAD,
)
SWINV2_RCNN = _alone(
    "swin",
    "swinv2",
    (r"layers\.0\.downsample\.reduction\.weight", r"layers\.0\.blocks\.0\.attn\.logit_scale"),
    (*(Rule(f"backbone/{rule.ours}", rule.theirs, rule.part) for rule in BLOCK_RULES), merges("backbone/", 1)),
    _HEAD,
)
