"""SegFormers of mmsegmentation, NVlabs and transformers, whole or their ImageNet encoders alone.

The three pack the attention differently: mmsegmentation has q, k and v in one tensor, although q
reads all pixels and k and v the reduced ones; NVlabs has k and v in one; transformers has three.
Here they are three layers, so that each part has the denoiser of what it reads. The layer that
fuses the stages' maps, with one tensor in all files, is four layers here, one a stage. NVlabs and
transformers lay the deepest stage first in it, mmsegmentation last.

NVlabs' files also hold a classifier `decode_head.conv_seg` that no forward pass uses: it is left
where it is. transformers 5 names its modules anew, but writes the old names; both are read.

An encoder is where training begins: the head stays as initialized, a note says so, and the
encoder may be read into the network of any implementation. The eps of its norms are then those of
the network.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from drep_jax.models.segformer import SegFormer
from drep_jax.weights.formats.implementations import renaming, rules_of
from drep_jax.weights.formats.timm_vit import QKV
from drep_jax.weights.translation import POINTWISE, Format, Rule

_COUNTERS = (r".*\.num_batches_tracked",)
_FRESH = (r"(params|batch_stats)/decode_head/.*",)
STAGES = range(4)


def _kernel(ours: str, theirs: str, **options: Any) -> Rule:
    """Returns the rule for a Dense layer of ours that is a convolution by one pixel in the file, without its bias."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", layout=POINTWISE, **options)


def _fuse(theirs: str, order: Sequence[int]) -> tuple[Rule, ...]:
    """Returns the rules of the layer that reads the stages side by side, stage i + 1 in place `order[i]`."""
    return tuple(
        _kernel(f"decode_head/fuse{i + 1}", theirs, part=(place, len(order)), axis=1) for i, place in enumerate(order)
    )


def _mmseg_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    rules = []
    for s in STAGES:
        stage, block = f"backbone.layers.{s}", rf"backbone.layers.{s}.1.\1"
        ours = rf"block{s + 1}_(\d+)"
        rules += [
            Rule(f"patch_embed{s + 1}", f"{stage}.0.projection"),
            Rule(f"patch_norm{s + 1}", f"{stage}.0.norm"),
            Rule(rf"{ours}/(norm[12])", rf"{block}.\2"),
            *(
                Rule(f"{ours}/attn/{name}/{leaf}", f"{block}.attn.attn.in_proj_{theirs}", part=(i, 3))
                for i, name in enumerate(QKV)
                for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
            ),
            Rule(f"{ours}/attn/out", f"{block}.attn.attn.out_proj"),
            Rule(f"{ours}/attn/sr", f"{block}.attn.sr"),
            Rule(f"{ours}/attn/sr_norm", f"{block}.attn.norm"),
            _kernel(f"{ours}/mlp/fc1", f"{block}.ffn.layers.0"),
            Rule(f"{ours}/mlp/fc1", f"{block}.ffn.layers.0"),
            Rule(f"{ours}/mlp/dwconv/dwconv", f"{block}.ffn.layers.1"),
            _kernel(f"{ours}/mlp/fc2", f"{block}.ffn.layers.4"),
            Rule(f"{ours}/mlp/fc2", f"{block}.ffn.layers.4"),
            Rule(f"norm{s + 1}", f"{stage}.2"),
            _kernel(f"decode_head/linear{s + 1}", f"decode_head.convs.{s}.conv"),
            Rule(f"decode_head/linear{s + 1}_bn", f"decode_head.convs.{s}.bn"),
        ]
    return (
        *rules,
        *_fuse("decode_head.fusion_conv.conv", (0, 1, 2, 3)),
        Rule("decode_head/fuse_bn", "decode_head.fusion_conv.bn"),
        _kernel("decode_head/classifier", "decode_head.conv_seg"),
        Rule("decode_head/classifier", "decode_head.conv_seg"),
    )


def _nvlabs_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    block, theirs = r"block(\d)_(\d+)", r"backbone.block\1.\2"
    return (
        Rule(r"patch_embed(\d)", r"backbone.patch_embed\1.proj"),
        Rule(r"patch_norm(\d)", r"backbone.patch_embed\1.norm"),
        Rule(f"{block}/(norm[12])", rf"{theirs}.\3"),
        Rule(f"{block}/attn/query", f"{theirs}.attn.q"),
        Rule(f"{block}/attn/key", f"{theirs}.attn.kv", part=(0, 2)),
        Rule(f"{block}/attn/value", f"{theirs}.attn.kv", part=(1, 2)),
        Rule(f"{block}/attn/out", f"{theirs}.attn.proj"),
        Rule(f"{block}/attn/sr", f"{theirs}.attn.sr"),
        Rule(f"{block}/attn/sr_norm", f"{theirs}.attn.norm"),
        Rule(f"{block}/mlp/(fc[12])", rf"{theirs}.mlp.\3"),
        Rule(f"{block}/mlp/dwconv/dwconv", f"{theirs}.mlp.dwconv.dwconv"),
        Rule(r"(norm\d)", r"backbone.\1"),
        Rule(r"decode_head/linear(\d)", r"decode_head.linear_c\1.proj"),
        *_fuse("decode_head.linear_fuse.conv", (3, 2, 1, 0)),
        Rule("decode_head/fuse_bn", "decode_head.linear_fuse.bn"),
        _kernel("decode_head/classifier", "decode_head.linear_pred"),
        Rule("decode_head/classifier", "decode_head.linear_pred"),
    )


def _transformers_rules(net: nn.Module) -> tuple[Rule, ...]:
    del net
    rules = []
    for s in STAGES:
        ours, block = rf"block{s + 1}_(\d+)", rf"segformer.encoder.block.{s}.\1"
        attention = f"{block}.attention.self"
        rules += [
            Rule(f"patch_embed{s + 1}", f"segformer.encoder.patch_embeddings.{s}.proj"),
            Rule(f"patch_norm{s + 1}", f"segformer.encoder.patch_embeddings.{s}.layer_norm"),
            Rule(f"{ours}/norm([12])", rf"{block}.layer_norm_\2"),
            *(Rule(f"{ours}/attn/{name}", f"{attention}.{name}") for name in QKV),
            Rule(f"{ours}/attn/out", f"{block}.attention.output.dense"),
            Rule(f"{ours}/attn/sr", f"{attention}.sr"),
            Rule(f"{ours}/attn/sr_norm", f"{attention}.layer_norm"),
            Rule(f"{ours}/mlp/fc([12])", rf"{block}.mlp.dense\2"),
            Rule(f"{ours}/mlp/dwconv/dwconv", f"{block}.mlp.dwconv.dwconv"),
            Rule(f"norm{s + 1}", f"segformer.encoder.layer_norm.{s}"),
            Rule(f"decode_head/linear{s + 1}", f"decode_head.linear_c.{s}.proj"),
        ]
    return (
        *rules,
        *_fuse("decode_head.linear_fuse", (3, 2, 1, 0)),
        Rule("decode_head/fuse_bn", "decode_head.batch_norm"),
        _kernel("decode_head/classifier", "decode_head.classifier"),
        Rule("decode_head/classifier", "decode_head.classifier"),
    )


_NEW_NAMES = (
    (r"^(block|patch_embeddings|layer_norm|stages)\.(?=\d)", r"segformer.encoder.\1."),
    (r"^encoder\.", "segformer.encoder."),
    (r"^segformer\.stages\.", "segformer.encoder.stages."),
    (r"\.stages\.(\d+)\.blocks\.", r".block.\1."),
    (r"\.stages\.(\d+)\.(patch_embeddings|layer_norm)\.", r".\2.\1."),
    (r"\.attention\.(q|k|v)_proj\.", lambda match: f".attention.self.{dict(zip('qkv', QKV, strict=True))[match[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.sequence_reduction\.sequence_reduction\.", ".self.sr."),
    (r"\.sequence_reduction\.layer_norm\.", ".self.layer_norm."),
    (r"\.layernorm_before\.", ".layer_norm_1."),
    (r"\.layernorm_after\.", ".layer_norm_2."),
    (r"\.mlp\.fc([12])\.", r".mlp.dense\1."),
    (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
)


def _why(implementation: str, net: Any) -> str:
    return (
        f"This is a SegFormer of {implementation}, which has another head or other eps in its norms than this model: "
        f"set --config.model.implementation={implementation} (it is {net.implementation})."
    )


def _encoder(whole: Format, rules: Callable[[nn.Module], tuple[Rule, ...]], classifier: str) -> Format:
    """Returns the format of an encoder alone, with ImageNet's classifier."""

    def with_any_head(net: nn.Module) -> tuple[Rule, ...]:
        # The file has no head; where it would lie does not matter.
        return (*rules(net), Rule("(decode_head)/(.*)", r"\1.\2"))

    return dataclasses.replace(
        whole,
        name=f"{whole.name}_encoder",
        marks=whole.marks[:2],
        rules=with_any_head,
        ignored=(classifier, *_COUNTERS),
        unused=lambda *_: (),
        fresh=_FRESH,
    )


def _unused(classifier: str) -> Callable[[Any, Any], tuple[str, ...]]:
    return lambda net, names: () if net.num_classes else (classifier,)


MMSEG_SEGFORMER = Format(
    name="mmseg",
    family=SegFormer,
    marks=(
        r"backbone\.layers\.0\.0\.projection\.weight",
        r"backbone\.layers\.0\.1\.0\.attn\.attn\.in_proj_weight",
        r"decode_head\.fusion_conv\.conv\.weight",
    ),
    rules=rules_of("mmseg", _mmseg_rules, _why),
    ignored=_COUNTERS,
    canonical=lambda name: re.sub(r"^layers\.(?=\d)", "backbone.layers.", name),
    unused=_unused(r"decode_head\.conv_seg\..*"),
)
NVLABS_SEGFORMER = Format(
    name="nvlabs",
    family=SegFormer,
    marks=(
        r"backbone\.patch_embed1\.proj\.weight",
        r"backbone\.block1\.0\.attn\.kv\.weight",
        r"decode_head\.linear_c1\.proj\.weight",
    ),
    rules=rules_of("nvlabs", _nvlabs_rules, _why),
    ignored=(r"decode_head\.conv_seg\..*", *_COUNTERS),
    canonical=lambda name: re.sub(r"^((patch_embed|block|norm)\d\.)", r"backbone.\1", name),
    unused=_unused(r"decode_head\.linear_pred\..*"),
)
TRANSFORMERS_SEGFORMER = Format(
    name="transformers",
    family=SegFormer,
    marks=(
        r"segformer\.encoder\.patch_embeddings\.0\.proj\.weight",
        r"segformer\.encoder\.block\.0\.0\.attention\.self\.query\.weight",
        r"decode_head\.linear_c\.0\.proj\.weight",
    ),
    rules=rules_of("transformers", _transformers_rules, _why),
    ignored=_COUNTERS,
    suffix=".safetensors",
    canonical=renaming(_NEW_NAMES),
    unused=_unused(r"decode_head\.classifier\..*"),
)
MMSEG_SEGFORMER_ENCODER = _encoder(MMSEG_SEGFORMER, _mmseg_rules, r"head\..*")
NVLABS_SEGFORMER_ENCODER = _encoder(NVLABS_SEGFORMER, _nvlabs_rules, r"head\..*")
TRANSFORMERS_SEGFORMER_ENCODER = _encoder(TRANSFORMERS_SEGFORMER, _transformers_rules, r"classifier\..*")
