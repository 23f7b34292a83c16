"""Swin Transformers of the first version: timm's names, the authors', and those of mmdetection's detectors.

The authors and timm have downsampling at the end and at the start of a stage. mmdetection lays the
channels of a merged patch channel by channel, where the others lay them pixel by pixel.
"""

import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np

from drep_jax.models.swin_v1 import Swin
from drep_jax.weights.formats.timm_swinv2 import BUFFERS
from drep_jax.weights.translation import Format, Layout, Rule

_QKV = ("query", "key", "value")


def _by_pixel(array: np.ndarray) -> np.ndarray:
    """Returns an array whose last axis is (channels, row, column) with that axis as (column, row, channels)."""
    if array.shape[-1] % 4:
        raise ValueError(f"{array.shape} is no patch of four pixels")
    parts = array.reshape(*array.shape[:-1], -1, 2, 2)
    return np.moveaxis(parts, (-3, -2, -1), (-1, -2, -3)).reshape(array.shape)


def _by_channel(array: np.ndarray) -> np.ndarray:
    parts = array.reshape(*array.shape[:-1], 2, 2, -1)
    return np.moveaxis(parts, (-3, -2, -1), (-1, -2, -3)).reshape(array.shape)


MERGED_NORM = Layout(_by_pixel, _by_channel)
"""mmdetection's norm of a merged patch and ours."""
MERGED_DENSE = Layout(lambda a: _by_pixel(a).T, lambda a: _by_channel(a.T))
"""The same for the dense layer behind it."""


def blocks(ours: str, theirs: str, attention: str, projection: str, mlp: tuple[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of the blocks, whose stage and number are the groups 1 and 2."""
    block = rf"{ours}stage(\d+)_block(\d+)"
    return (
        *(
            Rule(f"{block}/attn/{name}/{leaf}", f"{theirs}.{attention}.qkv.{whole}", part=(i, 3))
            for i, name in enumerate(_QKV)
            for leaf, whole in (("kernel", "weight"), ("bias", "bias"))
        ),
        Rule(f"{block}/attn/out", f"{theirs}.{attention}.{projection}"),
        Rule(f"{block}/attn/position_bias", f"{theirs}.{attention}.relative_position_bias_table"),
        Rule(f"{block}/mlp/fc1", f"{theirs}.{mlp[0]}"),
        Rule(f"{block}/mlp/fc2", f"{theirs}.{mlp[1]}"),
        Rule(rf"{block}/(norm[12])", rf"{theirs}.\3"),
    )


def classifier_rules(ours: str = "") -> tuple[Rule, ...]:
    """Returns what timm's and the authors' files name alike.

    Args:
      ours: prefix of our paths.
    """
    return (
        Rule(f"{ours}embedding", "patch_embed.proj"),
        Rule(f"{ours}embedding_norm", "patch_embed.norm"),
        *blocks(ours, r"layers.\1.blocks.\2", "attn", "proj", ("mlp.fc1", "mlp.fc2")),
    )


def merges(ours: str, before: int) -> Rule:
    """Returns the rule of the merges, that of stage s being in the file's stage s − `before`."""
    return Rule(
        rf"{ours}stage(\d+)_merge/(reduction|norm)",
        lambda match: f"layers.{int(match[1]) - before}.downsample.{match[2]}",
    )


def mmdet_rules(ours: str = "backbone/") -> tuple[Rule, ...]:
    """Returns the rules of a `SwinTrunk` in mmdetection's detectors."""

    def stage(match: re.Match[str]) -> str:
        return f"backbone.stages.{int(match[1]) - 1}.downsample"

    return (
        Rule(f"{ours}embedding", "backbone.patch_embed.projection"),
        Rule(f"{ours}embedding_norm", "backbone.patch_embed.norm"),
        *blocks(ours, r"backbone.stages.\1.blocks.\2", "attn.w_msa", "proj", ("ffn.layers.0.0", "ffn.layers.1")),
        Rule(
            rf"{ours}stage(\d+)_merge/reduction/kernel", lambda m: f"{stage(m)}.reduction.weight", layout=MERGED_DENSE
        ),
        Rule(rf"{ours}stage(\d+)_merge/norm/scale", lambda m: f"{stage(m)}.norm.weight", layout=MERGED_NORM),
        Rule(rf"{ours}stage(\d+)_merge/norm/bias", lambda m: f"{stage(m)}.norm.bias", layout=MERGED_NORM),
        Rule(rf"{ours}(norm\d)", r"backbone.\1"),
    )


def _rules(head: str, before: int) -> Callable[[nn.Module], Sequence[Rule]]:
    rules = (*classifier_rules(), merges("", before), Rule("norm", "norm"), Rule("head", head))
    return lambda net: rules


TIMM_SWIN = Format(
    name="timm",
    family=Swin,
    marks=(
        r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
        r"layers\.1\.downsample\.reduction\.weight",
        r"head\.fc\.weight",
    ),
    rules=_rules("head.fc", 0),
    ignored=BUFFERS,
)
SWIN_V1 = Format(
    name="swin",
    family=Swin,
    marks=(r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", r"layers\.0\.downsample\.reduction\.weight"),
    rules=_rules("head", 1),
    ignored=BUFFERS,
)
