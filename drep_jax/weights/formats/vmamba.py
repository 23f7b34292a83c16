"""Checkpoints of VMamba's authors (github.com/MzeroMiko/VMamba), second version; the parameters lie under "model".

They stack over the four directions what is a layer each in our tree (see `drep_jax.models.vmamba`):
D of the scan as (4·inner,), A as (4·inner, states), the Δ projections as (4, inner, rank), and the
projections to Δ's coordinates, B and C as (4, rank + 2·states, inner), which are one dense layer of
ours.
"""

from collections.abc import Sequence

import flax.linen as nn

from drep_jax.models.vmamba import VMamba
from drep_jax.weights.translation import Format, Layout, Rule

_X_PROJ = Layout(lambda a: a.reshape(-1, a.shape[-1]).T, lambda a: a.T.reshape(4, -1, a.shape[0]))
_DT_KERNEL = Layout(lambda a: a[0].T, lambda a: a.T[None])
_DT_BIAS = Layout(lambda a: a[0], lambda a: a[None])
_A_LOG = Layout(
    lambda a: a.reshape(4, -1, a.shape[-1]).transpose(0, 2, 1),
    lambda a: a.transpose(0, 2, 1).reshape(-1, a.shape[1]),
)
_SKIP = Layout(lambda a: a.reshape(4, -1), lambda a: a.reshape(-1))


def _rules(module: nn.Module) -> Sequence[Rule]:
    """Returns the rules for as many stages as the module has."""
    stages = len(module.depths) if isinstance(module, VMamba) else 0
    return [
        Rule("stem_conv1", "patch_embed.0"),
        Rule("stem_norm1", "patch_embed.2"),
        Rule("stem_conv2", "patch_embed.5"),
        Rule("stem_norm2", "patch_embed.7"),
        *(rule for stage in range(stages) for rule in _stage(stage)),
        Rule("norm", "classifier.norm"),
        Rule("head", "classifier.head"),
    ]


def _stage(stage: int) -> list[Rule]:
    """Returns the rules of one stage's blocks and of the downsampling after it; the authors count stages from 0."""
    ours, theirs = rf"layer{stage + 1}_(\d+)", rf"layers.{stage}.blocks.\1"
    mix, op = f"{ours}/ss2d", f"{theirs}.op"
    directions = [
        rule
        for k in range(4)
        for rule in (
            Rule(f"{mix}/dt_proj_{k}/kernel", f"{op}.dt_projs_weight", (k, 4), _DT_KERNEL),
            Rule(f"{mix}/dt_proj_{k}/bias", f"{op}.dt_projs_bias", (k, 4), _DT_BIAS),
        )
    ]
    return [
        Rule(f"{ours}/norm1", f"{theirs}.norm"),
        Rule(f"{mix}/in_proj", f"{op}.in_proj"),
        Rule(f"{mix}/conv", f"{op}.conv2d"),
        Rule(f"{mix}/x_proj/kernel", f"{op}.x_proj_weight", layout=_X_PROJ),
        *directions,
        Rule(f"{mix}/a_log", f"{op}.A_logs", layout=_A_LOG),
        Rule(f"{mix}/skip", f"{op}.Ds", layout=_SKIP),
        Rule(f"{mix}/norm", f"{op}.out_norm"),
        Rule(f"{mix}/out_proj", f"{op}.out_proj"),
        Rule(f"{ours}/norm2", f"{theirs}.norm2"),
        Rule(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        Rule(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        Rule(f"downsample{stage + 1}_conv", f"layers.{stage}.downsample.1"),
        Rule(f"downsample{stage + 1}_norm", f"layers.{stage}.downsample.3"),
    ]


VMAMBA = Format(
    name="vmamba",
    family=VMamba,
    marks=(r"patch_embed\.0\.weight", r"layers\.0\.blocks\.0\.op\.x_proj_weight"),
    rules=_rules,
)
