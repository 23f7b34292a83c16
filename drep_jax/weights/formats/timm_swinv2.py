"""timm's SwinV2: query, key and value packed in one tensor, and downsampling at the start of a stage."""

from collections.abc import Sequence

import flax.linen as nn

from drep_jax.models.swin import SwinV2
from drep_jax.weights.translation import Format, Rule

BUFFERS = (r".*\.(relative_coords_table|relative_position_index|attn_mask|k_bias)",)

BLOCK_RULES = (
    Rule(r"embedding", r"patch_embed.proj"),
    Rule(r"embedding_norm", r"patch_embed.norm"),
    Rule(r"stage(\d+)_block(\d+)/attn/query/kernel", r"layers.\1.blocks.\2.attn.qkv.weight", part=(0, 3)),
    Rule(r"stage(\d+)_block(\d+)/attn/key/kernel", r"layers.\1.blocks.\2.attn.qkv.weight", part=(1, 3)),
    Rule(r"stage(\d+)_block(\d+)/attn/value/kernel", r"layers.\1.blocks.\2.attn.qkv.weight", part=(2, 3)),
    Rule(r"stage(\d+)_block(\d+)/attn/query/bias", r"layers.\1.blocks.\2.attn.q_bias"),
    Rule(r"stage(\d+)_block(\d+)/attn/value/bias", r"layers.\1.blocks.\2.attn.v_bias"),
    Rule(r"stage(\d+)_block(\d+)/attn/out", r"layers.\1.blocks.\2.attn.proj"),
    Rule(r"stage(\d+)_block(\d+)/attn/logit_scale", r"layers.\1.blocks.\2.attn.logit_scale"),
    Rule(r"stage(\d+)_block(\d+)/attn/cpb/fc1", r"layers.\1.blocks.\2.attn.cpb_mlp.0"),
    Rule(r"stage(\d+)_block(\d+)/attn/cpb/fc2", r"layers.\1.blocks.\2.attn.cpb_mlp.2"),
    Rule(r"stage(\d+)_block(\d+)/mlp/(fc[12])", r"layers.\1.blocks.\2.mlp.\3"),
    Rule(r"stage(\d+)_block(\d+)/(norm[12])", r"layers.\1.blocks.\2.\3"),
    Rule(r"norm", r"norm"),
)
"""What timm and the original repository name alike."""


def rules(swin: nn.Module) -> Sequence[Rule]:
    """Returns the rules of any SwinV2."""
    del swin
    return (
        *BLOCK_RULES,
        Rule(r"stage(\d+)_merge/(reduction|norm)", r"layers.\1.downsample.\2"),
        Rule(r"head", r"head.fc"),
    )


TIMM_SWINV2 = Format(
    name="timm",
    family=SwinV2,
    marks=(r"layers\.0\.blocks\.0\.attn\.logit_scale", r"layers\.0\.blocks\.0\.attn\.cpb_mlp\.0\.weight"),
    rules=rules,
    ignored=BUFFERS,
)
