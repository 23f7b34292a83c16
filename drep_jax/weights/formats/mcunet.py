"""MCUNets of github.com/mit-han-lab/mcunet; the ProxylessNAS networks that they are made of have the same names."""

import flax.linen as nn

from drep_jax.models.mcunet import MCUNet
from drep_jax.weights.translation import Format, Rule

_LAYERS = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}


def _rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    return (
        Rule("first_(conv|bn)", r"first_conv.\1"),
        *(
            Rule(rf"block_(\d+)/{ours}_(conv|bn)", rf"blocks.\1.mobile_inverted_conv.{theirs}.\2")
            for ours, theirs in _LAYERS.items()
        ),
        Rule("last_(conv|bn)", r"feature_mix_layer.\1"),
        Rule("classifier", "classifier.linear"),
    )


MCUNET = Format(
    name="mcunet",
    family=MCUNet,
    marks=(r"first_conv\.conv\.weight", r"blocks\.0\.mobile_inverted_conv\.depth_conv\.conv\.weight"),
    rules=_rules,
    ignored=(r".*\.num_batches_tracked",),
)
