"""The SwinV2 authors' own checkpoints: as timm's, with downsampling at the end of a stage and the head by itself."""

from collections.abc import Sequence

import flax.linen as nn

from drep_jax.models.swin import SwinV2
from drep_jax.weights.formats.timm_swinv2 import BLOCK_RULES, BUFFERS
from drep_jax.weights.translation import Format, Rule


def rules(swin: nn.Module) -> Sequence[Rule]:
    """Returns the rules of a SwinV2 with as many stages as this one."""
    stages = len(swin.depths) if isinstance(swin, SwinV2) else 0
    return (
        *BLOCK_RULES,
        *(
            Rule(rf"stage{stage}_merge/(reduction|norm)", rf"layers.{stage - 1}.downsample.\1")
            for stage in range(1, stages)
        ),
        Rule(r"head", r"head"),
    )


SWIN = Format(
    name="swin",
    family=SwinV2,
    marks=(r"layers\.0\.downsample\.reduction\.weight", r"layers\.0\.blocks\.0\.attn\.logit_scale"),
    rules=rules,
    ignored=BUFFERS,
)
