"""ViTs that TransReID-SSL (github.com/damo-cv/TransReID-SSL) pre-trained on LUPerson with DINO, 256x128 pixels: timm's names.

The files hold the whole training state: the teacher's network is taken, its projection head is left.
"""

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
