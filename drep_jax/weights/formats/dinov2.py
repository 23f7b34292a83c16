"""DINOv2 (github.com/facebookresearch/dinov2), with or without registers: timm's names, but for the registers.

Networks trained in shards count blocks within chunks too ("blocks.0.3." is block 3). The files of
all published sizes have positions for 37 x 37 patches (518 pixels).
"""

import re
from typing import Any

from drep_jax.models.vit import ViT
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import vit_positions, vit_rules
from drep_jax.weights.translation import Format, Rule


def _rules(vit: Any) -> tuple[Rule, ...]:
    return (Rule("registers", "register_tokens"), *vit_rules(vit))


def _positions(vit: Any) -> positions.Positions:
    # The versions with registers came later, without the offset and antialiased like timm's.
    return vit_positions(vit, positions.TIMM if vit.registers else positions.DINOV2, source_grid=(37, 37))


DINOV2 = Format(
    name="dinov2",
    family=ViT,
    marks=("mask_token", r"blocks\.0\.attn\.qkv\.weight", r"blocks\.0\.ls1\.gamma"),
    rules=_rules,
    # The mask token and the heads serve the training only.
    ignored=("mask_token", r"(dino|ibot)_head\..*"),
    canonical=lambda name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name),
    positions=_positions,
)
