"""timm's Vision Transformers, and what took over its names: DeiT, DeiT-3, DINO, MAE. One packed layer makes q, k and v."""

import re
from typing import Any

from drep_jax.models.vit import ViT
from drep_jax.weights import positions
from drep_jax.weights.positions import Interpolation, Positions
from drep_jax.weights.translation import Format, Rule

QKV = ("query", "key", "value")
ICS_STEM = (
    r"patch_embed\.conv\..*",
    "this is the convolutional stem of TransReID-SSL's networks with ICS (IBN-based convolution stem), which this ViT has "
    "not. Choose a model transreid_ssl_…_ics, or a checkpoint without ICS, such as its plain ViT-S/16.",
)


def vit_rules(vit: Any) -> tuple[Rule, ...]:
    """Returns timm's names of a ViT; a norm behind the pooling has a name of its own."""
    return (
        Rule("cls", "cls_token"),
        Rule("registers", "reg_token"),
        Rule("pos_embedding", "pos_embed"),
        Rule("embedding", "patch_embed.proj"),
        *(Rule(rf"encoderblock_(\d+)/attn/{name}", r"blocks.\1.attn.qkv", part=(i, 3)) for i, name in enumerate(QKV)),
        Rule(r"encoderblock_(\d+)/attn/out", r"blocks.\1.attn.proj"),
        Rule(r"encoderblock_(\d+)/mlp/(fc[12])", r"blocks.\1.mlp.\2"),
        Rule(r"encoderblock_(\d+)/(norm[12])", r"blocks.\1.\2"),
        Rule(r"encoderblock_(\d+)/(ls[12])/gamma", r"blocks.\1.\2.gamma"),
        Rule("norm", "fc_norm" if vit.pool == "mean" else "norm"),
        Rule("head", "head"),
    )


def vit_positions(vit: Any, interpolation: Interpolation, source_grid: tuple[int, int] | None = None) -> Positions:
    """Returns the position embeddings of a ViT."""
    return Positions("params/pos_embedding", vit.prefix_positions, vit.grid, interpolation, source_grid)


TIMM_VIT = Format(
    name="timm",
    family=ViT,
    marks=(r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight", r"blocks\.0\.mlp\.fc1\.weight", "pos_embed"),
    rules=vit_rules,
    # DeiT-3's own files.
    canonical=lambda name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name),
    refused=(ICS_STEM,),
    positions=lambda vit: vit_positions(vit, positions.TIMM),
)
