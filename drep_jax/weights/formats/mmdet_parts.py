"""Names of what mmdetection's detectors share: a ResNet and a pyramid; and ResNets alone, where training begins."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from drep_jax.weights.translation import CONV, Format, Layout, Rule

COUNTERS = (r".*\.num_batches_tracked",)
BGR = Layout(lambda a: CONV.read(a)[:, :, ::-1], lambda a: CONV.write(a[:, :, ::-1]))
"""A first convolution of images in the order blue, green, red, which are red, green, blue here."""


def trunk_rules(theirs: str = "backbone.", ours: str = "backbone", bgr: bool = False) -> tuple[Rule, ...]:
    """Returns the rules of a `ResNetTrunk`, which has torchvision's names behind a prefix in all public detectors.

    Args:
      theirs: prefix of its names, with the dot.
      ours: path of the trunk in the network.
      bgr: whether the file is for images in the order blue, green, red, as Caffe's networks are.
    """
    return (
        *([Rule(f"{ours}/conv1/kernel", f"{theirs}conv1.weight", layout=BGR)] if bgr else ()),
        Rule(f"{ours}/(conv1|bn1)", rf"{theirs}\1"),
        Rule(rf"{ours}/(layer\d)_(\d+)/downsample_conv", rf"{theirs}\1.\2.downsample.0"),
        Rule(rf"{ours}/(layer\d)_(\d+)/downsample_bn", rf"{theirs}\1.\2.downsample.1"),
        Rule(rf"{ours}/(layer\d)_(\d+)/((?:conv|bn)\d)", rf"{theirs}\1.\2.\3"),
    )


def fpn_rules(ours: str = "neck") -> tuple[Rule, ...]:
    """Returns the rules of an `FPN` without norms."""
    return (
        Rule(rf"{ours}/lateral_(\d)", r"neck.lateral_convs.\1.conv"),
        Rule(rf"{ours}/output_(\d)", r"neck.fpn_convs.\1.conv"),
    )


def trunk_alone(family: type[nn.Module], rest: Sequence[str], bgr: bool = False) -> Format:
    """Returns the format of a ResNet's ImageNet weights, with which a detector's training begins.

    Args:
      family: of detectors with a `ResNetTrunk` called "backbone".
      rest: names of the other parts, which stay as initialized.
      bgr: as for `trunk_rules`.
    """
    parts = "|".join(rest)

    def rules(net: Any) -> tuple[Rule, ...]:
        del net
        return (*trunk_rules("", bgr=bgr), Rule(f"({parts})(.*)", r"not in the file: \1\2"))

    return Format(
        name="resnet",
        family=family,
        marks=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"layer2\.0\.downsample\.0\.weight"),
        rules=rules,
        ignored=(r"fc\..*", *COUNTERS),
        refused=(
            (
                r"(neck|rpn_head|roi_head|bbox_head|decoder)\..*",
                "beside a ResNet it has the parts of a detector of another kind than this model. Choose the model that it is "
                "of, such as atss_r50, centernet_r50 or detr_r50.",
            ),
        ),
        fresh=(rf"(params|batch_stats)/({parts}).*",),
    )
