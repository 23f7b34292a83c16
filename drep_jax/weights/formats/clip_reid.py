"""CLIP's own image encoder (github.com/openai/CLIP, state dicts), and networks trained by CLIP-ReID from it.

Both hold the text encoder as well, and CLIP-ReID's its learned prompts: they are left. CLIP has
neither necks, classifiers nor embeddings of cameras; these are then as initialized. CLIP's
positions are for the square of 224 pixels.
"""

import dataclasses
from typing import Any

from drep_jax.models.clip_reid import CLIPReID
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import QKV
from drep_jax.weights.positions import Positions
from drep_jax.weights.translation import SAME, Format, Layout, Rule

_FIRST_AXIS = Layout(lambda a: a[None], lambda a: a[0])
_FIRST_TWO_AXES = Layout(lambda a: a[None, None], lambda a: a[0, 0])


def _rules(encoder: str) -> tuple[Rule, ...]:
    """Returns where the parameters lie, those of the encoder behind a prefix."""
    block = rf"{encoder}.transformer.resblocks.\1"
    return (
        Rule("cls", f"{encoder}.class_embedding", layout=_FIRST_TWO_AXES),
        Rule("pos_embedding", f"{encoder}.positional_embedding", layout=_FIRST_AXIS),
        Rule("embedding", f"{encoder}.conv1"),
        Rule("norm_pre", f"{encoder}.ln_pre"),
        *(
            Rule(rf"encoderblock_(\d+)/attn/{name}/{ours}", f"{block}.attn.in_proj_{theirs}", part=(i, 3))
            for i, name in enumerate(QKV)
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        Rule(r"encoderblock_(\d+)/attn/out", f"{block}.attn.out_proj"),
        Rule(r"encoderblock_(\d+)/mlp/fc1", f"{block}.mlp.c_fc"),
        Rule(r"encoderblock_(\d+)/mlp/fc2", f"{block}.mlp.c_proj"),
        Rule(r"encoderblock_(\d+)/norm([12])", rf"{block}.ln_\2"),
        Rule("norm", f"{encoder}.ln_post"),
        Rule("projection/kernel", f"{encoder}.proj", layout=SAME),
        Rule("sie", "cv_embed"),
        Rule(r"neck(_proj)?/(bottleneck|classifier)", r"\2\1"),
    )


def _positions(net: Any) -> Positions:
    return Positions("params/pos_embedding", 1, net.grid, positions.TRANSREID)


def _square_positions(net: Any) -> Positions:
    return dataclasses.replace(_positions(net), source_grid=(224 // net.patch_size,) * 2)


CLIP = Format(
    name="clip",
    family=CLIPReID,
    marks=(r"visual\.conv1\.weight", r"visual\.class_embedding", r"visual\.proj"),
    rules=lambda net: _rules("visual"),
    ignored=(
        r"(transformer|token_embedding|ln_final)\..*",
        "positional_embedding|text_projection|logit_scale|input_resolution|context_length|vocab_size",
    ),
    fresh=(r"(params|batch_stats)/neck(_proj)?/.*", "params/sie"),
    positions=_square_positions,
)
CLIP_REID = Format(
    name="clip_reid",
    family=CLIPReID,
    marks=(r"image_encoder\.class_embedding", r"bottleneck_proj\.running_mean"),
    rules=lambda net: _rules("image_encoder"),
    # A classifier is left only if the backbone has none.
    ignored=(r"(text_encoder|prompt_learner)\..*", r".*\.num_batches_tracked", r"classifier(_proj)?\.weight"),
    zeros=(r"bottleneck(_proj)?\.bias",),
    positions=_positions,
)
