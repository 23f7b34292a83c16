"""ResNets of torchvision; timm's, and those of person re-identification (without `fc`), have the same names."""

import dataclasses

import flax.linen as nn

from drep_jax.models.resnet import ResNet
from drep_jax.weights.translation import Format, Rule


def _rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    return (
        Rule("(conv1|bn1|fc)", r"\1"),
        Rule(r"(layer\d+)_(\d+)/downsample_conv", r"\1.\2.downsample.0"),
        Rule(r"(layer\d+)_(\d+)/downsample_bn", r"\1.\2.downsample.1"),
        Rule(r"(layer\d+)_(\d+)/((?:conv|bn)\d)", r"\1.\2.\3"),
    )


TORCHVISION_RESNET = Format(
    name="torchvision",
    family=ResNet,
    marks=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"layer2\.0\.downsample\.0\.weight"),
    rules=_rules,
    ignored=(r".*\.num_batches_tracked",),
)
TIMM_RESNET = dataclasses.replace(TORCHVISION_RESNET, name="timm")
