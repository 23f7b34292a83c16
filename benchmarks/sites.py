"""Lists the denoising sites and time steps of the registered backbones, as in docs/models.md.

    PYTHONPATH=. python benchmarks/sites.py                     # one line a backbone
    PYTHONPATH=. python benchmarks/sites.py vmamba_t ".*"       # every site of one, for a pattern

Nothing is computed.
"""

import functools

import jax
import jax.numpy as jnp
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.core.idle import find_idle
from drep_jax.core.layers import find_layers
from drep_jax.core.sites import coverage, find_sites
from drep_jax.models import MODELS, create_model, list_models

DETECTORS = ("detr_r50", "yolov3_d53", "atss_r50", "centernet_r50")
"""They find objects."""


def image_size(name):
    """Returns the size that a backbone is published for."""
    if name.endswith("cifar"):
        return 32, 32
    if name.startswith("dinov2"):
        return 518, 518
    if name.startswith("transreid") or name in ("clip_reid_b16", "resnet50_reid"):
        return 256, 128
    if name.startswith(("fcn", "segformer")):
        return 512, 512
    if name in DETECTORS:
        return 320, 320
    return (256, 256) if name.startswith("swin") or name == "resnet50_vanet" else (224, 224)


def look(name, pattern=None):
    """Returns sites, parameters and coverage of one backbone."""
    classes = 0 if name.startswith("dinov2") else {(512, 512): 150, (320, 320): 80}.get(image_size(name), 1000)
    model = create_model(name, num_classes=classes, image_size=image_size(name))
    images = jax.ShapeDtypeStruct((1, *image_size(name), 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = variables["params"]
    sites = find_sites(model, images, pattern=pattern)
    covered = coverage(sites, params, find_idle(model, variables, images))
    return sites, params, covered, len(find_layers(model, images))


def main(command=None):
    """Prints the tables."""
    parser = Parser(__doc__, only=["resnet20_cifar"])
    parser.add_argument("model", nargs="?", help="every site of this one; without it, one line a backbone")
    parser.add_argument("pattern", nargs="?", help="regular expression over layers")
    parser.add_argument("--only", nargs="+", default=[], help="backbones to list; all without it")
    arguments = parser.parse_args(command)
    if arguments.model:
        sites, _, covered, _ = look(arguments.model, arguments.pattern)
        rows = [[s.times[0], ", ".join(layer.name for layer in s.layers), s.kind, s.width, s.groups] for s in sites]
        print(tabulate(rows, ["t", "layers that share the denoiser", "kind", "d", "groups"], tablefmt="github"))
        print(f"\n{len(sites)} sites, {100 * covered.kernel_share:.0f} % of the weights.")
        return
    rows = []
    # The families themselves have sizes to be given.
    names = [name for name in list_models() if isinstance(MODELS[name], functools.partial) or name == "yolov3_d53"]
    for name in arguments.only or names:
        sites, params, covered, layers = look(name)
        every = look(name, ".*")[0]
        millions = sum(leaf.size for leaf in jax.tree_util.tree_leaves(params)) / 1e6
        widths = ", ".join(map(str, sorted({site.width for site in sites})))
        percent = f"{100 * covered.kernel_share:.0f}"
        rows.append([name, f"{millions:.2f}", layers, len(sites), widths, percent, len(every)])
    headers = ["model", "M", "layers", "sites", "widths d", "weights, %", "all"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
