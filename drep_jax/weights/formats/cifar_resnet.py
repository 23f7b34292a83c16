"""ResNets for CIFAR-10 of github.com/akamaster/pytorch_resnet_cifar10: three stages, padded shortcuts, `linear` for `fc`."""

import flax.linen as nn

from drep_jax.models.resnet import ResNet
from drep_jax.weights.translation import Format, Rule


def _rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    return (
        Rule("(conv1|bn1)", r"\1"),
        Rule("fc", "linear"),
        Rule(r"(layer\d+)_(\d+)/((?:conv|bn)\d)", r"\1.\2.\3"),
    )


CIFAR_RESNET = Format(
    name="cifar_resnet",
    family=ResNet,
    marks=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"linear\.weight"),
    rules=_rules,
    ignored=(r".*\.num_batches_tracked",),
)
