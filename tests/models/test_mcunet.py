"""MCUNet: read from an architecture file, against NumPy from the authors' names, both ways; the published accuracy."""

import json
import os

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.core.sites import find_sites
from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.weights import files


def conv(kernel, stride, channels, activation="relu6"):
    shared = {"dilation": 1, "groups": 1, "has_shuffle": False, "use_bn": True, "dropout_rate": 0}
    return {"kernel_size": kernel, "stride": stride, "out_channels": channels, "act_func": activation, **shared}


def block(entering, leaving, kernel, stride, ratio, *, mid=None, shortcut=False):
    shortcut = {"name": "IdentityLayer"} if shortcut else None
    inner = {"name": "MBInvertedConvLayer", "in_channels": entering, "out_channels": leaving, "kernel_size": kernel}
    inner |= {"stride": stride, "expand_ratio": ratio, "mid_channels": mid, "act_func": "relu6", "use_se": False}
    return {"name": "MobileInvertedResidualBlock", "mobile_inverted_conv": inner, "shortcut": shortcut}


def architecture(*, mix=None):
    return {
        "name": "ProxylessNASNets",
        "bn": {"momentum": 0.1, "eps": 1e-5, "ws_eps": None},
        "first_conv": conv(3, 2, 4),
        "feature_mix_layer": mix,
        "blocks": [block(4, 2, 3, 1, 1), block(2, 6, 5, 2, 3, mid=6), block(6, 6, 3, 1, 2, shortcut=True)],
        "classifier": {"name": "LinearLayer", "in_features": 6, "out_features": 5},
    }


def written(tmp_path, fields, name="net.json"):
    path = tmp_path / name
    path.write_text(json.dumps(fields))
    return str(path)


def made(path, **options):
    return create_model("mcunet", num_classes=5, image_size=(12, 10), architecture=path, **options)


SHAPE = jax.ShapeDtypeStruct((1, 12, 10, 3), np.float32)
THEIRS = [
    ("first_conv", (4, 3, 3, 3), 2, 1, True),
    ("blocks.0.mobile_inverted_conv.depth_conv", (4, 1, 3, 3), 1, 4, True),
    ("blocks.0.mobile_inverted_conv.point_linear", (2, 4, 1, 1), 1, 1, False),
    ("blocks.1.mobile_inverted_conv.inverted_bottleneck", (6, 2, 1, 1), 1, 1, True),
    ("blocks.1.mobile_inverted_conv.depth_conv", (6, 1, 5, 5), 2, 6, True),
    ("blocks.1.mobile_inverted_conv.point_linear", (6, 6, 1, 1), 1, 1, False),
    ("blocks.2.mobile_inverted_conv.inverted_bottleneck", (12, 6, 1, 1), 1, 1, True),
    ("blocks.2.mobile_inverted_conv.depth_conv", (12, 1, 3, 3), 1, 12, True),
    ("blocks.2.mobile_inverted_conv.point_linear", (6, 12, 1, 1), 1, 1, False),
]
"""The authors' layers in order: name, shape in PyTorch, stride, groups, whether ReLU6 follows."""


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    file = {}
    for name, shape, *_ in THEIRS:
        file[f"{name}.conv.weight"] = rng.normal(0, 0.5, shape)
        for leaf, low in (("weight", 0.5), ("bias", -1.0), ("running_mean", -0.5), ("running_var", 0.5)):
            file[f"{name}.bn.{leaf}"] = rng.uniform(low, 2.0, shape[0])
        file[f"{name}.bn.num_batches_tracked"] = np.array(3)
    file |= {"classifier.linear.weight": rng.normal(size=(5, 6)), "classifier.linear.bias": rng.normal(size=5)}
    return {name: array.astype(np.int64 if array.ndim == 0 else np.float32) for name, array in file.items()}


def by_hand(file, x):
    """The authors' network in NumPy, in their layout (channels first)."""

    def layer(x, name, shape, stride, groups, active):
        out, _, kernel, _ = shape
        pad = kernel // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
        w = file[f"{name}.conv.weight"].astype(np.float64)
        y = (
            np.einsum("bchwij,cij->bchw", windows, w[:, 0])
            if groups > 1
            else np.einsum("bchwij,ocij->bohw", windows, w)
        )
        norm = {leaf: file[f"{name}.bn.{leaf}"].reshape(1, out, 1, 1) for leaf in ("weight", "bias")}
        mean, var = (file[f"{name}.bn.running_{leaf}"].reshape(1, out, 1, 1) for leaf in ("mean", "var"))
        y = (y - mean) / np.sqrt(var + 1e-5) * norm["weight"] + norm["bias"]
        return np.clip(y, 0, 6) if active else y

    for name, *options in THEIRS[:6]:
        x = layer(x, name, *options)
    y = x
    for name, *options in THEIRS[6:]:
        y = layer(y, name, *options)
    pooled = (x + y).mean((2, 3))
    return pooled @ file["classifier.linear.weight"].T + file["classifier.linear.bias"]


def test_is_the_authors_network_and_is_written_back(tmp_path):
    """Run in NumPy from the foreign arrays; parameters are counted, and the file comes back to the bit."""
    path, file = str(tmp_path / "net.pth"), tensors()
    files.create(path, file, {})
    net = made(written(tmp_path, architecture()))
    read = weights.read(path, net, (12, 10))
    variables = read.variables
    trained = sum(array.size for name, array in file.items() if "running" not in name and array.ndim)
    assert sum(leaf.size for leaf in jax.tree_util.tree_leaves(variables["params"])) == trained
    x = np.random.default_rng(1).normal(size=(3, 12, 10, 3)).astype(np.float32)
    expected = by_hand(file, x.transpose(0, 3, 1, 2).astype(np.float64))
    np.testing.assert_allclose(jax.jit(net.apply)(variables, x), expected, rtol=2e-4, atol=2e-4)
    back = str(tmp_path / "back.pth")
    weights.write(back, variables, read)
    again = files.read(back).tensors
    assert all(np.array_equal(again[name], array) for name, array in files.read(path).tensors.items())


def test_every_layer_is_a_site(tmp_path):
    mix = conv(1, 1, 8)
    net = made(written(tmp_path, architecture(mix=mix)))
    names = [layer.name for site in find_sites(net, SHAPE) for layer in site.layers]
    assert len(names) == len(THEIRS) + 2 and names[0] == "first_conv" and names[-2:] == ["last_conv", "classifier"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [{**block(4, 2, 3, 1, 1), "shortcut": {"name": "ConvLayer"}}]}, "shortcut of blocks.0. is a"),
        ({"first_conv": conv(3, 2, 4, "swish")}, "first_conv has act_func='swish'"),
        ({"first_conv": {**conv(3, 2, 4), "groups": 2}}, "first_conv has groups=2, and only 1"),
        ({"first_conv": conv(3, 2, "4")}, "'4' instead of a whole number from 1"),
        ({"bn": None}, "is no architecture of an MCUNet"),
        ({"bn": {"momentum": 0.1}}, "KeyError: 'eps'"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        made(written(tmp_path, architecture() | change))


def test_a_file_that_is_no_architecture_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        made(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ConfigError, match="is no architecture of an MCUNet"):
        made(str(tmp_path / "bad.json"))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DREP_DATA"), reason="DREP_DATA is not set: no photographs and weights here")
def test_the_published_weights_have_their_accuracy():
    """68.1 % of the 1,000 photographs by another implementation; resampling may move a few images."""
    from configs import mcunet_imagenet
    from drep_jax.data import open_source

    config = mcunet_imagenet.get_config()
    options = {"image_size": config.data.image_size, "resize": config.data.resize}
    model = dict(config.model)
    net = create_model(model.pop("name"), image_size=config.data.image_size, **model)
    variables = weights.read(config.backbone.init_from, net, config.data.image_size).variables
    assert sum(leaf.size for leaf in jax.tree_util.tree_leaves(variables["params"])) == 737_408
    apply, hits, count = jax.jit(net.apply), 0, 0
    for split in ("train", "validation", "test"):
        source = open_source(config.data.source, split, **options)
        for start in range(0, len(source), 100):
            items = [source[i] for i in range(start, start + 100)]
            x = (np.stack([item["image"] for item in items]) / 255.0 - 0.5) / 0.5
            hits += int(
                np.sum(np.argmax(apply(variables, x.astype(np.float32)), -1) == [item["label"] for item in items])
            )
            count += len(items)
    assert count == 1000 and abs(hits - 681) <= 5
