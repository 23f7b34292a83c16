"""ATSS, CenterNet-update and YOLOv3 of mmdetection.

CenterNet-update's files are for images in the order blue, green, red; the channels of its first
convolution are put into the order of the images here, red, green, blue.

YOLOv3 is a network of darknet here, whose layers have numbers; mmdetection's names follow from
their order, so its files fit every `.cfg` of this structure, darknet's own `yolov3.cfg` included.
"""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from drep_jax.errors import CheckpointError
from drep_jax.models.detectors.atss import ATSS
from drep_jax.models.detectors.centernet import CenterNet
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.darknet_cfg import Layer, Network
from drep_jax.weights.formats.mmdet_parts import COUNTERS, fpn_rules, trunk_alone, trunk_rules
from drep_jax.weights.translation import Format, Rule

_TOWERS = (
    Rule(r"head/(cls|reg)_conv_(\d+)", r"bbox_head.\1_convs.\2.conv"),
    Rule(r"head/(cls|reg)_gn_(\d+)", r"bbox_head.\1_convs.\2.gn"),
    Rule(r"head/scale_(\d)", r"bbox_head.scales.\1.scale"),
)


def _atss_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    return (*trunk_rules(), *fpn_rules(), *_TOWERS, Rule("head/(cls|reg|centerness)", r"bbox_head.atss_\1"))


def _centernet_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    return (*trunk_rules(bgr=True), *fpn_rules(), *_TOWERS, Rule("head/(cls|reg)", r"bbox_head.conv_\1"))


MMDET_ATSS = Format(
    name="mmdet",
    family=ATSS,
    marks=(r"bbox_head\.atss_cls\.weight", r"bbox_head\.atss_centerness\.weight"),
    rules=_atss_rules,
    ignored=COUNTERS,
)
MMDET_CENTERNET = Format(
    name="mmdet",
    family=CenterNet,
    marks=(r"bbox_head\.conv_cls\.weight", r"bbox_head\.cls_convs\.0\.gn\.weight", r"bbox_head\.scales\.0\.scale"),
    rules=_centernet_rules,
    ignored=COUNTERS,
)
RESNET_ATSS = trunk_alone(ATSS, ("neck", "head"))
RESNET_CENTERNET = trunk_alone(CenterNet, ("neck", "head"), bgr=True)


def _blocks(network: Network) -> Iterator[int]:
    """Yields the number of residual blocks of each group, which begins with a convolution of stride 2."""
    groups: list[int] = []
    for layer in network.layers:
        if layer.kind == "convolutional" and layer.strides == (2, 2):
            groups.append(0)
        elif layer.kind == "shortcut" and groups:
            groups[-1] += 1
    yield from groups


def _yolo_names(network: Network) -> list[str]:
    """Returns the names of mmdetection's YOLOv3 with as many blocks, in the order of execution."""
    names = ["backbone.conv1"]
    for group, blocks in enumerate(_blocks(network), 1):
        owner = f"backbone.conv_res_block{group}"
        names += [f"{owner}.conv", *(f"{owner}.res{j}.conv{k}" for j in range(blocks) for k in (1, 2))]
    for level in range(len(network.heads)):
        names += [f"neck.conv{level}"] if level else []
        names += [f"neck.detect{level + 1}.conv{k}" for k in range(1, 6)]
        names += [f"bbox_head.convs_bridge.{level}", f"bbox_head.convs_pred.{level}"]
    return names


def _yolo_rules(net: Any) -> tuple[Rule, ...]:
    convolutions: list[Layer] = [layer for layer in net.network.layers if layer.kind == "convolutional"]
    names = _yolo_names(net.network)
    if len(names) != len(convolutions) or any(
        layer.norm == ("convs_pred" in name) for layer, name in zip(convolutions, names, strict=True)
    ):
        raise CheckpointError(
            f"mmdetection's YOLOv3 with these residual blocks has {len(names)} convolutions in another order than this "
            f"network's {len(convolutions)}: choose the model yolov3_d53, or a .cfg with the structure of darknet's yolov3.cfg."
        )
    rules = []
    for layer, name in zip(convolutions, names, strict=True):
        rules.append(Rule(f"conv_{layer.number}", f"{name}.conv" if layer.norm else name))
        rules.append(Rule(f"bn_{layer.number}", f"{name}.bn"))
    return tuple(rules)


MMDET_YOLOV3 = Format(
    name="mmdet",
    family=Darknet,
    marks=(r"neck\.detect1\.conv1\.conv\.weight", r"bbox_head\.convs_pred\.0\.weight"),
    rules=_yolo_rules,
    ignored=COUNTERS,
)
