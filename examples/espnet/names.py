"""Where the parameters of `ESPNet` are in the published PyTorch files."""

from drep_jax.weights import Format, Layout, Rule

ENLARGE = Layout(
    read=lambda a: a.transpose(0, 2, 3, 1).reshape(1, 1, a.shape[0], -1),
    write=lambda a: a.reshape(a.shape[2], 2, 2, -1).transpose(0, 3, 1, 2),
)
"""PyTorch's transposed convolution (in, out, 2, 2), and a 1 × 1 convolution to (2, 2, out)."""


FORMAT = Format(
    name="espnet",
    rules=(
        Rule("up3/kernel", "up_l3.0.weight", layout=ENLARGE),
        Rule("up2/kernel", "up_l2.0.weight", layout=ENLARGE),
        Rule("classes/kernel", "classifier.weight", layout=ENLARGE),
        Rule("level1", "encoder.level1.conv"),
        Rule("level1_norm/bn", "encoder.level1.bn"),
        Rule("level1_norm/act/slope", "encoder.level1.act.weight"),
        Rule(r"(b\d)/bn", r"encoder.\1.bn"),
        Rule(r"(b\d)/act/slope", r"encoder.\1.act.weight"),
        Rule(r"level(\d)_down/([cd]\d+)", r"encoder.level\1_0.\2.conv"),
        Rule(r"level(\d)_down/norm/bn", r"encoder.level\1_0.bn"),
        Rule(r"level(\d)_down/norm/act/slope", r"encoder.level\1_0.act.weight"),
        Rule(r"level(\d)_(\d+)/([cd]\d+)", r"encoder.level\1.\2.\3.conv"),
        Rule(r"level(\d)_(\d+)/norm/bn", r"encoder.level\1.\2.bn.bn"),
        Rule(r"level(\d)_(\d+)/norm/act/slope", r"encoder.level\1.\2.bn.act.weight"),
        Rule("level3_classes", "encoder.classifier.conv"),
        Rule("level3_bn", "br"),
        Rule("level2_classes", "level3_C.conv"),
        Rule("combine_norm/bn", "combine_l2_l3.0.bn"),
        Rule("combine_norm/act/slope", "combine_l2_l3.0.act.weight"),
        Rule(r"combine/([cd]\d+)", r"combine_l2_l3.1.\1.conv"),
        Rule("combine/norm/bn", "combine_l2_l3.1.bn.bn"),
        Rule("combine/norm/act/slope", "combine_l2_l3.1.bn.act.weight"),
        Rule("up2_norm/bn", "up_l2.1.bn"),
        Rule("up2_norm/act/slope", "up_l2.1.act.weight"),
        Rule("last", "conv.conv"),
        Rule("last_norm/bn", "conv.bn"),
        Rule("last_norm/act/slope", "conv.act.weight"),
    ),
    ignored=(r".*\.num_batches_tracked",),
)
