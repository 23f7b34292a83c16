"""examples/espnet: the names and layouts of the published file, the network's form, and exact fusion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drep_jax
from drep_jax import weights
from drep_jax.trees import set_in
from drep_jax.weights import files
from examples.espnet.espnet import ESPNet, enlarge
from examples.espnet.names import FORMAT

SMALL = ESPNet(num_classes=12, p=1, q=1)
SIZE = (41, 54)


def norm(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves}


def normed(name, channels, bn="bn"):
    return {**norm(f"{name}.{bn}", channels), f"{name}.act.weight": (channels,)}


def pyramid(name, inputs, channels, size):
    n = channels // 5
    tensors = {f"{name}.c1.conv.weight": (n, inputs, size, size)}
    tensors[f"{name}.d1.conv.weight"] = (channels - 4 * n, n, 3, 3)
    return tensors | {f"{name}.d{d}.conv.weight": (n, n, 3, 3) for d in (2, 4, 8, 16)}


def published(classes, p, q):
    """Names and shapes of the authors' state dict, from the paper's description."""
    tensors = {"encoder.level1.conv.weight": (16, 3, 3, 3), **normed("encoder.level1", 16), **normed("encoder.b1", 19)}
    for level, inputs, channels, count in ((2, 19, 64, p), (3, 131, 128, q)):
        name = f"encoder.level{level}_0"
        tensors |= pyramid(name, inputs, channels, 3) | normed(name, channels)
        for i in range(count):
            name = f"encoder.level{level}.{i}"
            tensors |= pyramid(name, channels, channels, 1) | normed(f"{name}.bn", channels)
    tensors |= normed("encoder.b2", 131) | normed("encoder.b3", 256) | norm("br", classes)
    tensors |= {"encoder.classifier.conv.weight": (classes, 256, 1, 1), "level3_C.conv.weight": (classes, 131, 1, 1)}
    tensors |= {"conv.conv.weight": (classes, 19 + classes, 3, 3), **normed("conv", classes)}
    tensors |= {name: (classes, classes, 2, 2) for name in ("up_l3.0.weight", "up_l2.0.weight", "classifier.weight")}
    tensors |= normed("combine_l2_l3.0", 2 * classes) | pyramid("combine_l2_l3.1", 2 * classes, classes, 1)
    return tensors | normed("combine_l2_l3.1.bn", classes) | normed("up_l2.1", classes)


def random_variables(net):
    """Random ones, with statistics that are not those of an untrained network."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        kernel = leaf.shape[:-1] and path[-1].key == "kernel"
        scale = 1.5 / np.sqrt(np.prod(leaf.shape[:-1])) if kernel else 0.2
        positive = 0.0 if kernel or path[-1].key in ("bias", "mean") else 1.0
        return (positive + scale * rng.uniform(-1, 1, leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


@pytest.fixture(scope="module")
def variables():
    return random_variables(SMALL)


def test_the_file_has_the_published_names_and_comes_back_bit_for_bit(variables, tmp_path):
    path = weights.write(str(tmp_path / "espnet.pth"), variables, FORMAT, SMALL)
    tensors = files.read(path).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == published(12, 1, 1)
    back = weights.read(path, SMALL, SIZE, names="examples/espnet/names.py").variables
    jax.tree_util.tree_map(np.testing.assert_array_equal, back, variables)
    whole = published(12, 2, 8)
    assert sum(int(np.prod(shape)) for shape in whole.values()) == 358_193 and len(whole) == 189


def test_doubling_is_pytorchs_transposed_convolution(variables):
    kernel = variables["params"]["up3"]["kernel"]
    theirs = np.asarray(FORMAT.rules[0].layout.write(kernel), np.float64)
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 12))
    expected = np.zeros((2, 6, 8, 12))
    for row, column in np.ndindex(3, 4):  # every pixel writes its own window
        window = np.einsum("bc,coyx->byxo", x[:, row, column], theirs)
        expected[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += window

    class Doubling(nn.Module):
        @nn.compact
        def __call__(self, x):
            return enlarge(x, "up3")

    doubled = Doubling().apply({"params": {"up3": {"kernel": kernel}}}, x.astype(np.float32))
    np.testing.assert_allclose(doubled, expected, rtol=1e-4, atol=1e-5)


def test_every_convolution_is_a_site(variables):
    layers = drep_jax.find_layers(SMALL, jnp.zeros((1, *SIZE, 3)))
    kernels = [leaf for leaf in jax.tree_util.tree_leaves(variables["params"]) if leaf.ndim == 4]
    assert len(layers) == len(kernels) == 5 * 6 + 7 and not any(layer.refusal for layer in layers)


def test_fusion_is_exact_at_odd_sizes():
    """Dilated windows wider than their maps, pixels of a doubled map that are cut off."""
    net = ESPNet(num_classes=12, p=0, q=0)
    images = jax.random.normal(jax.random.key(1), (1, *SIZE, 3))
    sites = drep_jax.find_sites(net, images, pattern=r"level3_down/(c1|d16)|up\d|last|classes")
    rng = np.random.default_rng(2)
    tree = {}
    for site in sites:
        kernel = (0.3 * rng.normal(size=site.denoiser_shape) / np.sqrt(site.width)).astype(np.float32)
        tree = set_in(tree, site.path, {"kernel": kernel})
    certificate = drep_jax.certify(net, random_variables(net), tree, sites, drep_jax.Schedule(), images, rule="affine")
    assert certificate.passed, certificate
