"""ViTs made of torch.nn.TransformerEncoder: post-norm, packed q, k, v. Names of github.com/smmk47/CIFAR10-Classification."""

import flax.linen as nn

from drep_jax.models.vit import ViT
from drep_jax.weights.formats.timm_vit import QKV
from drep_jax.weights.translation import Format, Rule

_LAYER = r"transformer.layers.\1"


def _rules(vit: nn.Module) -> tuple[Rule, ...]:
    del vit
    return (
        Rule("cls", "cls_token"),
        Rule("pos_embedding", "pos_embed"),
        Rule("embedding", "patch_embed.proj"),
        *(
            Rule(rf"encoderblock_(\d+)/attn/{name}/{ours}", f"{_LAYER}.self_attn.in_proj_{theirs}", part=(i, 3))
            for i, name in enumerate(QKV)
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        Rule(r"encoderblock_(\d+)/attn/out", f"{_LAYER}.self_attn.out_proj"),
        Rule(r"encoderblock_(\d+)/mlp/fc([12])", rf"{_LAYER}.linear\2"),
        Rule(r"encoderblock_(\d+)/(norm[12])", rf"{_LAYER}.\2"),
        Rule("norm", "mlp_head.0"),
        Rule("head", "mlp_head.1"),
    )


TORCH_ENCODER_VIT = Format(
    name="torch_encoder",
    family=ViT,
    marks=(r"transformer\.layers\.0\.self_attn\.in_proj_weight", r"mlp_head\.1\.weight"),
    rules=_rules,
)
