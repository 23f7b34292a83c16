"""Person re-identification: ViTs pre-trained by TransReID-SSL, and ViT baselines of TransReID trained from them; timm's names.

The pre-trained files (DINO on LUPerson, 256x128 pixels) hold the whole training state: the
teacher's network is taken, its projection head is left. Of trained networks the classifier and the
batch norm before it are left: the feature is that before the batch norm (TEST.NECK_FEAT "before").
"""

import dataclasses

from drep_jax.models.vit import ViT
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import ICS_STEM, vit_positions, vit_rules
from drep_jax.weights.translation import Format

TRANSREID_SSL = Format(
    name="transreid_ssl",
    family=ViT,
    marks=(r"blocks\.0\.attn\.qkv\.weight", "pos_embed", r"head\.mlp\.0\.weight"),
    rules=vit_rules,
    ignored=(r"head\.(mlp|last_layer)\..*",),
    refused=(ICS_STEM,),
    positions=lambda vit: vit_positions(vit, positions.TRANSREID, source_grid=(16, 8)),
)
TRANSREID = dataclasses.replace(
    TRANSREID_SSL,
    name="transreid",
    marks=(r"blocks\.0\.attn\.qkv\.weight", "pos_embed", r"bottleneck\.running_mean"),
    ignored=(r"(bottleneck|classifier|fc)\..*",),
    refused=(
        ICS_STEM,
        (
            "sie_embed",
            "these are embeddings of cameras and viewpoints, which a ViT that sees the image only cannot add: choose a "
            "model transreid_… with side_info.",
        ),
    ),
    positions=lambda vit: vit_positions(vit, positions.TRANSREID),
)
