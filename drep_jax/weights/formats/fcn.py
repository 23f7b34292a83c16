"""FCNs of mmsegmentation and of torchvision, whole or their ImageNet encoders alone.

mmsegmentation's files have the encoder behind "backbone." and heads `decode_head` and
`auxiliary_head`; its encoder by itself is ResNetV1c with the classifier `fc`. torchvision's have
`classifier` and `aux_classifier`; its encoder by itself is the plain ResNet. An encoder is where
training begins: the heads stay as initialized, and a note says so.
"""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from drep_jax.models.fcn import FCN
from drep_jax.weights.formats.implementations import rules_of
from drep_jax.weights.translation import POINTWISE, Format, Rule

_COUNTERS = (r".*\.num_batches_tracked",)
_TRUNK = re.compile(r"(stem|conv1|bn1|layer[1-4])\.")
_BLOCKS = (
    Rule(r"(layer\d)_(\d+)/downsample_conv", r"backbone.\1.\2.downsample.0"),
    Rule(r"(layer\d)_(\d+)/downsample_bn", r"backbone.\1.\2.downsample.1"),
    Rule(r"(layer\d)_(\d+)/((?:conv|bn)\d)", r"backbone.\1.\2.\3"),
)
_MMSEG = (
    Rule(r"stem_conv(\d)", lambda match: f"backbone.stem.{3 * int(match[1]) - 3}"),
    Rule(r"stem_bn(\d)", lambda match: f"backbone.stem.{3 * int(match[1]) - 2}"),
    *_BLOCKS,
    Rule(r"(\w+_head)/(conv|bn)(\d)", lambda match: f"{match[1]}.convs.{int(match[3]) - 1}.{match[2]}"),
    Rule(r"decode_head/(conv|bn)_cat", r"decode_head.conv_cat.\1"),
    Rule(r"(\w+_head)/classifier/kernel", r"\1.conv_seg.weight", layout=POINTWISE),
    Rule(r"(\w+_head)/classifier", r"\1.conv_seg"),
)
_HEADS = {"decode_head": "classifier", "auxiliary_head": "aux_classifier"}
_TORCHVISION = (
    Rule("(conv1|bn1)", r"backbone.\1"),
    *_BLOCKS,
    Rule(r"(\w+_head)/conv1", lambda match: f"{_HEADS[match[1]]}.0"),
    Rule(r"(\w+_head)/bn1", lambda match: f"{_HEADS[match[1]]}.1"),
    Rule(r"(\w+_head)/classifier/kernel", lambda match: f"{_HEADS[match[1]]}.4.weight", layout=POINTWISE),
    Rule(r"(\w+_head)/classifier", lambda match: f"{_HEADS[match[1]]}.4"),
)


def _why(implementation: str, net: Any) -> str:
    example = {"mmseg": "fcn_r50", "torchvision": "fcn_resnet50"}[implementation]
    return (
        f"{implementation}'s FCNs have another stem and other heads than this model, so their weights do not fit: "
        f"set --config.model.implementation={implementation} (it is {net.implementation}), or choose a model "
        f"such as {example}."
    )


def _unused(auxiliary: str, classifiers: str) -> Callable[[Any, Collection[str]], tuple[str, ...]]:
    """Returns what says which of the heads' tensors a network has no use for."""

    def unused(net: Any, names: Collection[str]) -> tuple[str, ...]:
        del names
        without_auxiliary = () if net.auxiliary and net.num_classes else (auxiliary,)
        return without_auxiliary if net.num_classes else (*without_auxiliary, classifiers)

    return unused


MMSEG_FCN = Format(
    name="mmseg",
    family=FCN,
    marks=(r"backbone\.stem\.0\.weight", r"backbone\.layer1\.0\.conv1\.weight", r"decode_head\.conv_seg\.weight"),
    rules=rules_of("mmseg", _MMSEG, _why),
    ignored=_COUNTERS,
    canonical=lambda name: f"backbone.{name}" if _TRUNK.match(name) else name,
    unused=_unused(r"auxiliary_head\..*", r"decode_head\.conv_seg\..*"),
    fresh=(r"(params|batch_stats)/auxiliary_head/.*",),
)
MMSEG_FCN_ENCODER = dataclasses.replace(
    MMSEG_FCN,
    name="mmseg_encoder",
    marks=MMSEG_FCN.marks[:2],
    ignored=(r"fc\..*", *_COUNTERS),
    unused=lambda *_: (),
    fresh=(r"(params|batch_stats)/\w+_head/.*",),
)
TORCHVISION_FCN = Format(
    name="torchvision",
    family=FCN,
    marks=(r"backbone\.conv1\.weight", r"backbone\.layer1\.0\.conv1\.weight", r"classifier\.4\.weight"),
    rules=rules_of("torchvision", _TORCHVISION, _why),
    ignored=_COUNTERS,
    canonical=MMSEG_FCN.canonical,
    unused=_unused(r"aux_classifier\..*", r"classifier\.4\..*"),
    fresh=MMSEG_FCN.fresh,
)
TORCHVISION_FCN_ENCODER = dataclasses.replace(
    TORCHVISION_FCN,
    name="torchvision_encoder",
    marks=TORCHVISION_FCN.marks[:2],
    ignored=MMSEG_FCN_ENCODER.ignored,
    unused=lambda *_: (),
    fresh=MMSEG_FCN_ENCODER.fresh,
)
