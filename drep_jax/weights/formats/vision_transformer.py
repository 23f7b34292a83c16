"""Google's ViTs as .npz: github.com/google-research/vision_transformer and big_vision. Layouts are Flax's, heads an own axis.

Old and new files of both projects differ in ways that mean nothing: a prefix of all names, how the
parts of a block are numbered (Flax once counted all of them on, and now each kind by itself), and
where big_vision keeps its positions. What does
differ is where the positions begin: in vision_transformer's at the class token, in big_vision's at
the patches (`position_class_token=False`). Both were trained with the tanh form of GELU
(`activation="gelu_tanh"`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from drep_jax.models.vit import ViT
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import vit_positions
from drep_jax.weights.translation import SAME, Format, Rule, reshaped

Parts = Mapping[str, str]

_ALL_COUNTED: Parts = {
    "norm1": "LayerNorm_0",
    "attn": "MultiHeadDotProductAttention_1",
    "norm2": "LayerNorm_2",
    "mlp": "MlpBlock_3",
}
_KINDS_COUNTED: Parts = {
    "norm1": "LayerNorm_0",
    "attn": "MultiHeadDotProductAttention_0",
    "norm2": "LayerNorm_1",
    "mlp": "MlpBlock_0",
}
_OURS = {theirs: ours for parts in (_ALL_COUNTED, _KINDS_COUNTED) for ours, theirs in parts.items()}
_PREFIX = r"(opt/target/|params/img/|params/)?"
_TOKEN_FIRST = "Transformer/posembed_input/pos_embedding"


def _canonical(prefix: str, parts: Parts, embedding: str) -> Callable[[str], str]:
    """Returns the function that names tensors as the newest files of one of the projects do."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}/{parts[_OURS[match[2]]]}/" if match[2] in _OURS else match[0]

    def canonical(name: str) -> str:
        plain = re.sub(f"^{_PREFIX}", "", name)
        plain = re.sub(r"(encoderblock_\d+)/(\w+)/", part, plain, count=1)
        return prefix + (embedding if plain == "Transformer/pos_embedding" else plain)

    return canonical


def _rules(prefix: str, parts: Parts, embedding: str) -> Callable[[nn.Module], Sequence[Rule]]:
    block, theirs = r"encoderblock_(\d+)", prefix + r"Transformer/encoderblock_\1"
    qkv, attention, mlp = "(query|key|value)", parts["attn"], parts["mlp"]

    def rules(vit: Any) -> Sequence[Rule]:
        width, heads = vit.width, (vit.num_heads, vit.width // vit.num_heads)
        square = (width, width)
        return (
            Rule(
                rf"{block}/attn/{qkv}/kernel",
                rf"{theirs}/{attention}/\2/kernel",
                layout=reshaped(square, (width, *heads)),
            ),
            Rule(rf"{block}/attn/{qkv}/bias", rf"{theirs}/{attention}/\2/bias", layout=reshaped((width,), heads)),
            Rule(
                rf"{block}/attn/out/kernel",
                rf"{theirs}/{attention}/out/kernel",
                layout=reshaped(square, (*heads, width)),
            ),
            Rule(rf"{block}/attn/out/bias", rf"{theirs}/{attention}/out/bias"),
            Rule(rf"{block}/mlp/fc1/(\w+)", rf"{theirs}/{mlp}/Dense_0/\2", layout=SAME),
            Rule(rf"{block}/mlp/fc2/(\w+)", rf"{theirs}/{mlp}/Dense_1/\2", layout=SAME),
            *(Rule(rf"{block}/{norm}/(\w+)", rf"{theirs}/{parts[norm]}/\2") for norm in ("norm1", "norm2")),
            Rule(r"norm/(\w+)", prefix + r"Transformer/encoder_norm/\1"),
            Rule("pos_embedding", prefix + embedding),
            Rule(r"((embedding|pre_logits|head)/\w+|cls)", prefix + r"\1", layout=SAME),
        )

    return rules


def _format(name: str, prefix: str, parts: Parts, embedding: str, *marks: str) -> Format:
    return Format(
        name=name,
        family=ViT,
        marks=(
            prefix + "embedding/kernel",
            f"{prefix}Transformer/encoderblock_0/{parts['mlp']}/Dense_0/kernel",
            *marks,
        ),
        rules=_rules(prefix, parts, embedding),
        # Text towers and temperatures of image-text models; states of optimisers.
        ignored=(r"params/(txt/.*|t|b)", r"opt/(?!target/).*", r"(opt/)?state/.*"),
        suffix=".npz",
        canonical=_canonical(prefix, parts, embedding),
        positions=lambda vit: vit_positions(vit, positions.GOOGLE),
    )


VISION_TRANSFORMER = _format("vision_transformer", "", _ALL_COUNTED, _TOKEN_FIRST, _TOKEN_FIRST)
BIG_VISION = _format("big_vision", "params/", _KINDS_COUNTED, "pos_embedding")
