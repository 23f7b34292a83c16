"""TransReID's networks, as trained by its public code or TransReID-SSL's, and the pre-trained ViTs that they begin with.

A trained file has the whole network: the ViT under "base.", the two copies of its last block of the
jigsaw branch ("b1" reads all patches, "b2" the groups), each with its norm, and a bottleneck and a
classifier for each feature. It also holds what the
network never reads: ImageNet's classifier ("base.fc") and, with the jigsaw branch, the last block
and the norm that the copies were made from. A file without the jigsaw branch is seen without
"base.", as a prefix that all of the ViT has.
"""

import re
from collections.abc import Collection
from typing import Any

from drep_jax.models.transreid import TransReID
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import QKV
from drep_jax.weights.positions import Positions
from drep_jax.weights.translation import Format, Rule

_TRUNK = re.compile(r"(cls_token|pos_embed|sie_embed|patch_embed|blocks|norm|fc)\b")
# The file says how many batches a batch norm has seen; nothing depends on it.
_COUNTERS = (r".*\.num_batches_tracked",)
_SHIFTS = (r"bottleneck(_\d)?\.bias",)


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *(Rule(f"{ours}/attn/{name}", f"{theirs}.attn.qkv", part=(i, 3)) for i, name in enumerate(QKV)),
        Rule(f"{ours}/attn/out", f"{theirs}.attn.proj"),
        Rule(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        Rule(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        Rule(f"{ours}/norm1", f"{theirs}.norm1"),
        Rule(f"{ours}/norm2", f"{theirs}.norm2"),
    )


def _rules(base: str) -> tuple[Rule, ...]:
    """Returns the rules of all but the jigsaw branch's blocks; `base` stands before the names of the ViT."""
    return (
        Rule("cls", f"{base}cls_token"),
        Rule("pos_embedding", f"{base}pos_embed"),
        Rule("sie", f"{base}sie_embed"),
        Rule("embedding", f"{base}patch_embed.proj"),
        *(Rule(f"stem_conv{i + 1}", f"{base}patch_embed.conv.{3 * i}") for i in range(3)),
        *(Rule(f"stem_norm{i + 1}/instance", f"{base}patch_embed.conv.{3 * i + 1}.IN") for i in range(2)),
        *(Rule(f"stem_norm{i + 1}/batch", f"{base}patch_embed.conv.{3 * i + 1}.BN") for i in range(2)),
        Rule("stem_norm3", f"{base}patch_embed.conv.7"),
        *_block(r"encoderblock_(\d+)", rf"{base}blocks.\1"),
        Rule("norm", f"{base}norm"),
        Rule(r"neck((?:_\d)?)/bottleneck", r"bottleneck\1"),
        Rule(r"neck((?:_\d)?)/classifier", r"classifier\1"),
    )


def _net_rules(net: Any) -> tuple[Rule, ...]:
    del net
    branches = (("global", "b1"), ("local", "b2"))
    copies = (r for ours, b in branches for r in (*_block(f"{ours}_block", f"{b}.0"), Rule(f"{ours}_norm", f"{b}.1")))
    return (*_rules("base."), *copies)


def _trunk_rules(net: Any) -> tuple[Rule, ...]:
    """Returns the rules of a ViT's file, whose last block both copies begin with."""
    copies = _block("(?:global|local)_block", f"blocks.{net.depth - 1}")
    return (*_rules(""), *copies, Rule("(?:global|local)_norm", "norm"))


def _net_unused(net: Any, names: Collection[str]) -> tuple[str, ...]:
    last = f"base.blocks.{net.depth - 1}."
    # A file of fewer blocks has originals too, but not where this network has them: then the norm
    # is one name too many.
    copied = net.jigsaw and any(name.startswith(last) for name in names)
    originals = (rf"{re.escape(last)}.*", r"base\.norm\..*") if copied else ()
    classifiers = () if net.num_classes else (r"classifier(_\d)?\.weight",)
    return (r"base\.fc\..*", *originals, *classifiers)


def _positions(net: Any, source_grid: tuple[int, int] | None = None) -> Positions:
    return Positions("params/pos_embedding", 1, net.grid, positions.TRANSREID, source_grid)


_FRESH = (r"params/sie", r"(params|batch_stats)/neck(_\d)?/.*")

TRANSREID_NET = Format(
    name="transreid",
    family=TransReID,
    marks=(r"base\.blocks\.0\.attn\.qkv\.weight", r"base\.pos_embed", r"bottleneck\.running_mean"),
    rules=_net_rules,
    ignored=_COUNTERS,
    canonical=lambda name: f"base.{name}" if _TRUNK.match(name) else name,
    positions=_positions,
    unused=_net_unused,
    zeros=_SHIFTS,
)
TRANSREID_SSL_TRUNK = Format(
    name="transreid_ssl",
    family=TransReID,
    marks=(r"blocks\.0\.attn\.qkv\.weight", "pos_embed", r"head\.mlp\.0\.weight"),
    rules=_trunk_rules,
    ignored=(r"head\.(mlp|last_layer)\..*", *_COUNTERS),
    positions=lambda net: _positions(net, source_grid=(16, 8)),
    fresh=_FRESH,
)
TRANSREID_TIMM_TRUNK = Format(
    name="timm",
    family=TransReID,
    marks=(r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight", r"blocks\.0\.mlp\.fc1\.weight", "pos_embed"),
    rules=_trunk_rules,
    ignored=(r"(head|pre_logits)\..*", *_COUNTERS),
    refused=(("dist_token", "this is a distilled DeiT, which has one token more. Take the plain DeiT."),),
    positions=_positions,
    fresh=_FRESH,
)
