"""ResNets of re-identification: reid-strong-baseline's and fast-reid's own files, and torchvision's to begin from.

torchvision's have no necks; these are then as initialized, and `fc` is left. Both branches of a
network with two are read from the one that a file has. What the same names compute depends on the
stem, so a file of the one project is refused by a network with the stem of the other.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from drep_jax.errors import CheckpointError
from drep_jax.models.resnet_reid import BRANCHES, ResNetReID
from drep_jax.weights.translation import Format, Rule

_TRUNK = re.compile(r"(conv1|bn1|layer\d+)\.")
_VARIANTS = (
    (
        r".*layer\d+\.\d+\.bn\d\.(IN|BN)\..*",
        "these are instance norms beside batch norms (IBN), which this ResNet has not.",
    ),
    (r"(.*\.)?NL_\d\..*", "these are non-local blocks, which this ResNet has not."),
    (
        r"(.*\.)?layer\d+\.\d+\.(se|se_module)\..*",
        "these are squeeze-and-excitation blocks, which this ResNet has not.",
    ),
)


def _rules(prefix: str, neck: str, classifier: str) -> tuple[Rule, ...]:
    """Returns where the parameters lie: the trunk behind a prefix, the necks and classifiers under the names given."""
    branch = rf"(?:(?:{'|'.join(BRANCHES)})_)?(layer\d+)_(\d+)"
    necks = rf"neck(?:_(?:{'|'.join(BRANCHES)}))?"
    return (
        Rule("(conv1|bn1)", rf"{prefix}\1"),
        Rule(f"{branch}/downsample_conv", rf"{prefix}\1.\2.downsample.0"),
        Rule(f"{branch}/downsample_bn", rf"{prefix}\1.\2.downsample.1"),
        Rule(rf"{branch}/((?:conv|bn)\d)", rf"{prefix}\1.\2.\3"),
        Rule(f"{necks}/bottleneck", neck),
        Rule(f"{necks}/classifier/kernel", classifier),
    )


def _with_stem(stem: str, rules: tuple[Rule, ...]) -> Callable[[nn.Module], tuple[Rule, ...]]:
    """Returns the rules for networks of one stem only."""

    def find(net: Any) -> tuple[Rule, ...]:
        if net.stem != stem:
            raise CheckpointError(
                f'Networks of format "{stem}" have a stem of their own, which computes something else from the same '
                f'weights: set --config.model.stem={stem} (it is "{net.stem}").'
            )
        return rules

    return find


def _behind(prefix: str) -> Callable[[str], str]:
    """Returns what puts the prefix, which is taken off when a file is read, before the names of the trunk again."""
    return lambda name: prefix + name if _TRUNK.match(name) else name


def _fast_reid_name(name: str) -> str:
    """Returns the name in today's fast-reid: its classifier and its neck have had others."""
    name = re.sub(r"^heads\.bnneck\.", "heads.bottleneck.0.", name)
    return _behind("backbone.")(re.sub(r"^heads\.(classifier|cls_layer)\.weight$", "heads.weight", name))


TORCHVISION_REID = Format(
    name="torchvision",
    family=ResNetReID,
    marks=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"layer2\.0\.downsample\.0\.weight"),
    rules=lambda net: _rules("", "bottleneck", "classifier.weight"),
    ignored=(r".*\.num_batches_tracked", r"fc\..*"),
    refused=_VARIANTS,
    fresh=(r"(params|batch_stats)/neck.*",),
)
STRONG_BASELINE = Format(
    name="strong_baseline",
    family=ResNetReID,
    marks=(r"base\.conv1\.weight", r"base\.layer1\.0\.conv1\.weight", r"bottleneck\.running_mean"),
    rules=_with_stem("strong_baseline", _rules("base.", "bottleneck", "classifier.weight")),
    # A classifier is left only if the backbone has none.
    ignored=(r".*\.num_batches_tracked", r"classifier\.weight"),
    zeros=(r"bottleneck\.bias",),
    canonical=_behind("base."),
    refused=_VARIANTS,
)
FAST_REID = dataclasses.replace(
    STRONG_BASELINE,
    name="fast_reid",
    marks=(r"backbone\.conv1\.weight", r"heads\.bottleneck\.0\.running_mean"),
    rules=_with_stem("fast_reid", _rules("backbone.", "heads.bottleneck.0", "heads.weight")),
    ignored=(r".*\.num_batches_tracked", r"pixel_(mean|std)", r"heads\.((classifier|cls_layer)\.)?weight"),
    zeros=(r"heads\.bottleneck\.0\.bias",),
    canonical=_fast_reid_name,
    refused=(
        *_VARIANTS,
        (
            r"heads\.bottleneck\.0\.weight_g|heads\.bottleneck\.1\..*|heads\.pool_layer\..*",
            "these are parts of other heads of fast-reid than its baseline's (GlobalAvgPool, BNNeck, no embedding layer).",
        ),
    ),
)
