"""Networks of darknet; `drep_jax.weights.files.darknet_file` gives the tensors their names."""

from drep_jax.models.detectors.darknet import Darknet
from drep_jax.weights.translation import Format, Rule

DARKNET = Format(
    name="darknet",
    family=Darknet,
    marks=(r"layer\d+\.conv\.weight",),
    rules=(Rule(r"(conv|bn)_(\d+)", r"layer\2.\1"),),
)
