"""DETRs of mmdetection, of facebookresearch and of transformers.

The first two have q, k and v of an attention in one tensor, although q and k read positions as
well; transformers has three. Facebook's frozen batch norms are four vectors, as ours.

transformers' files have either timm's ResNet or its own, whose names differ; version 5 names its
modules anew, but writes the old names. All of them are read, and written back as they were; new
files have the old names with timm's ResNet, as facebook/detr-resnet-50.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from drep_jax.models.detectors.detr import DETR
from drep_jax.weights.formats.implementations import renaming, rules_of
from drep_jax.weights.formats.mmdet_parts import COUNTERS, trunk_alone, trunk_rules
from drep_jax.weights.formats.timm_vit import QKV
from drep_jax.weights.translation import Format, Rule

_ATTENTIONS = (("encoder", "attn"), ("decoder", "attn"), ("decoder", "cross_attn"))


def _packed(names: Callable[[str, str], str]) -> tuple[Rule, ...]:
    """Returns the rules of attentions with q, k and v one below the other; `names` of (coder, attention), for layer \\1."""
    rules = []
    for coder, attention in _ATTENTIONS:
        ours, theirs = rf"{coder}_(\d+)/{attention}", names(coder, attention)
        rules += [
            Rule(f"{ours}/{name}/{leaf}", f"{theirs}.in_proj_{packed}", part=(i, 3))
            for i, name in enumerate(QKV)
            for leaf, packed in (("kernel", "weight"), ("bias", "bias"))
        ]
        rules.append(Rule(f"{ours}/out", f"{theirs}.out_proj"))
    return tuple(rules)


def _mmdet_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    names = {"attn": "self_attn.attn", "cross_attn": "cross_attn.attn"}
    boxes = ("reg_ffn.layers.0.0", "reg_ffn.layers.1", "fc_reg")
    return (
        *trunk_rules(),
        Rule("input_proj", "neck.convs.0.conv"),
        *_packed(lambda coder, attention: rf"{coder}.layers.\1.{names[attention]}"),
        Rule(r"(encoder|decoder)_(\d+)/mlp/fc1", r"\1.layers.\2.ffn.layers.0.0"),
        Rule(r"(encoder|decoder)_(\d+)/mlp/fc2", r"\1.layers.\2.ffn.layers.1"),
        Rule(
            r"(encoder|decoder)_(\d+)/norm(\d)",
            lambda match: f"{match[1]}.layers.{match[2]}.norms.{int(match[3]) - 1}",
        ),
        Rule("decoder_norm", "decoder.post_norm"),
        Rule("query_embedding", "query_embedding.weight"),
        Rule("class_embed", "bbox_head.fc_cls"),
        *(Rule(f"bbox_embed_{i}", f"bbox_head.{name}") for i, name in enumerate(boxes)),
    )


def _facebook_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    names = {"attn": "self_attn", "cross_attn": "multihead_attn"}
    layer = r"transformer.\1.layers.\2"
    return (
        *trunk_rules("backbone.0.body."),
        Rule("input_proj", "input_proj"),
        *_packed(lambda coder, attention: rf"transformer.{coder}.layers.\1.{names[attention]}"),
        Rule(r"(encoder|decoder)_(\d+)/mlp/fc([12])", rf"{layer}.linear\3"),
        Rule(r"(encoder|decoder)_(\d+)/(norm\d)", rf"{layer}.\3"),
        Rule("decoder_norm", "transformer.decoder.norm"),
        Rule("query_embedding", "query_embed.weight"),
        Rule("class_embed", "class_embed"),
        Rule(r"bbox_embed_(\d)", r"bbox_embed.layers.\1"),
    )


def _transformers_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    names = {"attn": "self_attn", "cross_attn": "encoder_attn"}
    rules = [*trunk_rules("model.backbone.conv_encoder.model."), Rule("input_proj", "model.input_projection")]
    for coder, attention in _ATTENTIONS:
        ours, theirs = rf"{coder}_(\d+)/{attention}", rf"model.{coder}.layers.\1.{names[attention]}"
        rules += [Rule(f"{ours}/{name}", f"{theirs}.{name[0]}_proj") for name in QKV]
        rules.append(Rule(f"{ours}/out", f"{theirs}.out_proj"))
    norms = {
        "encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    }
    return (
        *rules,
        Rule(r"(encoder|decoder)_(\d+)/mlp/(fc[12])", r"model.\1.layers.\2.\3"),
        *(
            Rule(rf"{coder}_(\d+)/norm{i}", rf"model.{coder}.layers.\1.{name}")
            for coder, of_layer in norms.items()
            for i, name in enumerate(of_layer, 1)
        ),
        Rule("decoder_norm", "model.decoder.layernorm"),
        Rule("query_embedding", "model.query_position_embeddings.weight"),
        Rule("class_embed", "class_labels_classifier"),
        Rule(r"bbox_embed_(\d)", r"bbox_predictor.layers.\1"),
    )


_KINDS = {"convolution": "conv", "normalization": "bn"}
_SHORTCUT = {"convolution": "0", "normalization": "1"}
_RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^model\.backbone\.(?!conv_encoder\.)", "model.backbone.conv_encoder."),
    (r"\.o_proj\.", ".out_proj."),
    (r"(\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"\.embedder\.embedder\.(convolution|normalization)\.", lambda match: f".{_KINDS[match[1]]}1."),
    (
        r"\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.",
        lambda match: f".layer{int(match[1]) + 1}.{match[2]}.downsample.{_SHORTCUT[match[3]]}.",
    ),
    (
        r"\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.(convolution|normalization)\.",
        lambda match: f".layer{int(match[1]) + 1}.{match[2]}.{_KINDS[match[4]]}{int(match[3]) + 1}.",
    ),
)


def _why(implementation: str, net: Any) -> str:
    return (
        f"This is a DETR of {implementation}, whose class outputs are others than this model's: set "
        f"--config.model.implementation={implementation} (it is {net.implementation})."
    )


MMDET_DETR = Format(
    name="mmdet",
    family=DETR,
    marks=(r"query_embedding\.weight", r"encoder\.layers\.0\.self_attn\.attn\.in_proj_weight"),
    rules=rules_of("mmdet", _mmdet_rules, _why),
    ignored=COUNTERS,
)
FACEBOOK_DETR = Format(
    name="facebookresearch",
    family=DETR,
    marks=(r"query_embed\.weight", r"transformer\.encoder\.layers\.0\.self_attn\.in_proj_weight"),
    rules=rules_of("facebookresearch", _facebook_rules, _why),
    ignored=COUNTERS,
)
TRANSFORMERS_DETR = Format(
    name="transformers",
    family=DETR,
    marks=(r"model\.query_position_embeddings\.weight", r"model\.encoder\.layers\.0\.self_attn\.q_proj\.weight"),
    rules=rules_of("facebookresearch", _transformers_rules, _why),
    ignored=COUNTERS,
    suffix=".safetensors",
    canonical=renaming(_RENAMED),
)
RESNET_DETR = trunk_alone(DETR, ("input_proj", "encoder", "decoder", "query_embedding", "class_embed", "bbox_embed"))
