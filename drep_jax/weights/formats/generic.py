"""Files that need no table: their names are those of the module's own tree, as Flax or as PyTorch writes them.

`flax`: "params/block0/conv/kernel", with or without the collection, with "/" or "." between, in
Flax's layouts. `pytorch`: "block0.conv.weight" and "block0.bn.running_mean", in PyTorch's layouts.
"""

import re
from collections.abc import Collection, Iterable

import flax.linen as nn

from drep_jax.weights.translation import LEAVES, SAME, Format, Rule, find_pieces

_COLLECTION = re.compile(r"(params|batch_stats)/")

FLAX = Format(
    name="flax",
    rules=(Rule("(.*)", r"\1", layout=SAME),),
    suffix=".safetensors",
    canonical=lambda name: _COLLECTION.sub("", name.replace(".", "/"), count=1),
)
PYTORCH = Format(
    name="pytorch",
    rules=(
        Rule(f"(.*)/({'|'.join(LEAVES)})", lambda match: f"{match[1].replace('/', '.')}.{LEAVES[match[2]]}"),
        Rule("(.*)", lambda match: match[1].replace("/", ".")),
    ),
    ignored=(r".*\.num_batches_tracked",),
)

GENERIC = (FLAX, PYTORCH)
"""For any module, where no other format is recognized."""


def generic_format(module: nn.Module, leaves: Iterable[str], names: Collection[str]) -> Format | None:
    """Returns the generic format in which a file has more than half of a module's leaves, or None.

    Args:
      module: the backbone.
      leaves: paths of its variables with their collections.
      names: of the file's tensors.
    """
    shapes = dict.fromkeys(leaves, ())
    for fmt in GENERIC:
        known = {fmt.canonical(name) for name in names}
        shared = sum(piece.theirs in known for piece in find_pieces(fmt, module, shapes))
        if 2 * shared > len(shapes):
            return fmt
    return None
