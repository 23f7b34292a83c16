r"""Where the parameters of `MyNet` are in its PyTorch file. Read both ways: for reading, and for writing the file back.

The left side of a rule is a regular expression over the path of a Flax module ("block0/bn1"), the right
side the name of the PyTorch module. PyTorch's names of the leaves (weight, bias, running_mean, …) and
its layouts follow by themselves. Where names are not a template, the right side is a function: here
the blocks of the file are counted from 1, behind the stem.
"""

from drep_jax.weights import Format, Rule

FORMAT = Format(
    name="mynet",
    rules=(
        Rule("stem", "features.0.0"),
        Rule("stem_bn", "features.0.1"),
        Rule(r"block(\d+)/depthwise", lambda match: f"features.{int(match[1]) + 1}.conv.0"),
        Rule(r"block(\d+)/bn1", lambda match: f"features.{int(match[1]) + 1}.conv.1"),
        Rule(r"block(\d+)/pointwise", lambda match: f"features.{int(match[1]) + 1}.conv.3"),
        Rule(r"block(\d+)/bn2", lambda match: f"features.{int(match[1]) + 1}.conv.4"),
        Rule("head", "classifier"),
    ),
    ignored=(r".*\.num_batches_tracked",),  # PyTorch's counters, which nothing depends on
)
