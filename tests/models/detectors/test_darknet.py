"""Networks from a `.cfg`: every layer against plain NumPy, boxes against a loop, files there and back, and what is refused."""

import io
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from drep_jax.core.layers import find_layers
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.metrics.detection import METRICS, Detected, Truths, statistics_of_lists
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.darknet_cfg import parse_cfg
from drep_jax.models.detectors.yolo import decode, find_objects
from drep_jax.weights import files
from drep_jax.weights.foreign import load_foreign
from drep_jax.weights.translation import put_back
from tests.models.detectors.test_boxes import greedy

CFG = """
[net]
width=16
height=24
channels=3
[convolutional]
batch_normalize=1
filters=4
size=3
stride=2
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=4
groups=4
size=5
pad=1
activation=mish
[shortcut]
from=-2
activation=relu6
[maxpool]   # shifted by half a window, as darknet pads
size=2
stride=2
[dropout]
[convolutional]
filters=6
size=1
pad=1
groups=2
activation=swish
[upsample]
stride=2
[route]
layers=-1, 2
[route]
layers=-1
groups=2
group_id=1
[convolutional]
filters=14
size=3
pad=1
activation=linear
[yolo]
mask=1,2
anchors=1,2, 6,5, 9,11
classes=2
scale_x_y=1.5
[route]
layers=5
[convolutional]
filters=7
activation=linear
[yolo]
mask=0
anchors=3,4
classes=2
"""


def net_and_variables():
    net = Darknet(cfg=CFG)
    abstract = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 24, 16, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32) * 0.5
        return np.abs(values) + 0.5 if path[-1].key == "var" else values

    return net, jax.tree_util.tree_map_with_path(draw, abstract)


def windows(x, size, stride, pad, fill):
    low, high = pad
    x = np.pad(x, [(0, 0), (low, high), (low, high), (0, 0)], constant_values=fill)
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    return np.stack(
        [
            x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            for i in range(size)
            for j in range(size)
        ],
        axis=3,
    )


def convolve(x, leaves, *, stride=1, groups=1):
    kernel = leaves["kernel"].astype(np.float64)
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    patches = windows(x, size, stride, (pad, pad), 0.0)
    kernel = kernel.reshape(size * size, *kernel.shape[2:])
    parts = zip(np.split(patches, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True)
    y = np.concatenate([np.einsum("bhwkc,kcd->bhwd", part, weights) for part, weights in parts], axis=-1)
    return y + leaves.get("bias", 0.0)


def by_hand(x, variables):
    """The network of CFG in float64."""
    params, statistics = variables["params"], variables["batch_stats"]

    def norm(y, name):
        scaled = (y - statistics[name]["mean"]) / np.sqrt(statistics[name]["var"].astype(np.float64) + 1e-5)
        return scaled * params[name]["scale"] + params[name]["bias"]

    first = norm(convolve(x, params["conv_0"], stride=2), "bn_0")
    first = np.where(first > 0, first, 0.1 * first)
    second = norm(convolve(first, params["conv_1"], groups=4), "bn_1")
    second = second * np.tanh(np.log1p(np.exp(second)))
    third = np.clip(first + second, 0, 6)
    pooled = windows(third, 2, 2, (0, 1), -np.inf).max(axis=3)
    fifth = convolve(pooled, params["conv_5"], groups=2)
    fifth = fifth / (1 + np.exp(-fifth))
    joined = np.concatenate([fifth.repeat(2, axis=1).repeat(2, axis=2), third], axis=-1)
    return convolve(joined[..., 5:], params["conv_9"]), convolve(fifth, params["conv_12"])


def test_every_kind_of_layer_and_the_boxes():
    net, variables = net_and_variables()
    x = np.random.default_rng(1).uniform(size=(2, 24, 16, 3)).astype(np.float32)
    heads = net.network.heads
    assert heads[0].anchors == ((6, 5), (9, 11)) and (net.network.height, net.network.width) == (24, 16)

    @jax.jit
    def run(variables, x):
        outputs = net.apply(variables, x)
        size = jnp.array([[24.0, 16.0], [20.0, 12.0]])
        options = {"valid_size": size, "candidates": 400, "keep": 30, "score": 0.2}
        found = [
            find_objects(outputs, heads, (24, 16), rule=rule, objectness=0.4, **options)
            for rule in ("product", "class")
        ]
        return outputs, decode(outputs, heads, (24, 16)), found

    outputs, (boxes, objectness, classes), found = run(variables, x)
    for ours, expected in zip(outputs, by_hand(x, variables), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert boxes.shape == (2, 12 * 8 * 2 + 6 * 4, 4)

    # One cell by hand: row 5, column 3, second anchor of the first head, which is magnified.
    tx, ty, tw, th, confidence, *labels = np.asarray(outputs[0])[1, 5, 3, 7:].astype(np.float64)
    center = [(3.5 + (1 / (1 + np.exp(-tx)) - 0.5) * 1.5) * 2, (5.5 + (1 / (1 + np.exp(-ty)) - 0.5) * 1.5) * 2]
    half = [9 * np.exp(tw) / 2, 11 * np.exp(th) / 2]
    place = (5 * 8 + 3) * 2 + 1
    expected = [center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]]
    np.testing.assert_allclose(boxes[1, place], expected, rtol=1e-4)
    np.testing.assert_allclose(objectness[1, place], 1 / (1 + np.exp(-confidence)), rtol=1e-5)
    np.testing.assert_allclose(classes[1, place], 1 / (1 + np.exp(-np.array(labels))), rtol=1e-5)

    for rule, objects in zip(("product", "class"), found, strict=True):
        for image, size in ((0, (24, 16)), (1, (20, 12))):
            clipped = np.clip(np.asarray(boxes)[image], 0, [size[1], size[0]] * 2)
            shown = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
            products = np.asarray(objectness)[image][:, None] * np.asarray(classes)[image]
            chosen = products > 0.2
            if rule == "class":
                chosen = (np.asarray(classes)[image] > 0.2) & (np.asarray(objectness)[image][:, None] >= 0.4)
            box, label = np.nonzero(chosen & shown[:, None])
            keep = greedy(clipped[box], products[box, label], label, np.ones(len(box), bool), 0.45)[:30]
            assert objects.valid[image].sum() == len(keep) > 10 and objects.left_out[image] == 0
            np.testing.assert_allclose(objects.scores[image][: len(keep)], products[box, label][keep], rtol=1e-5)
            np.testing.assert_allclose(objects.boxes[image][: len(keep)], clipped[box][keep], atol=1e-4)
            assert objects.classes[image][: len(keep)].tolist() == label[keep].tolist()
    with pytest.raises(ConfigError, match='"class"'):
        find_objects(outputs, heads, (24, 16), rule="x")


def darknet_bytes(variables, *, version=(0, 2, 5), until=None):
    """The numbers in the order that darknet's parser writes them."""
    numbers = []
    for number in (0, 1, 5, 9, 12):
        params = variables["params"][f"conv_{number}"]
        if "bias" in params:
            numbers.append(params["bias"])
        else:
            norm, statistics = variables["params"][f"bn_{number}"], variables["batch_stats"][f"bn_{number}"]
            numbers += [norm["bias"], norm["scale"], statistics["mean"], statistics["var"]]
        numbers.append(params["kernel"].transpose(3, 2, 0, 1))
        if number == until:
            break
    header = struct.pack("<3i", *version) + struct.pack("<q" if version[1] >= 2 else "<i", 77)
    return header + b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in numbers)


def written(tmp_path, content, cfg=CFG):
    path = tmp_path / "net.weights"
    path.write_bytes(content)
    (tmp_path / "net.cfg").write_text(cfg)
    return str(path)


@pytest.mark.parametrize("version", [(0, 2, 5), (0, 1, 0)])
def test_files_there_and_back(version, tmp_path):
    net, variables = net_and_variables()
    content = darknet_bytes(variables, version=version)
    path = written(tmp_path, content)
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 24, 16, 3)))
    foreign = load_foreign(path, net, like)
    assert foreign.format.name == "darknet" and foreign.notes[1] == "names from net.cfg"
    jax.tree.map(np.testing.assert_array_equal, foreign.variables, variables)
    changed = put_back(foreign.pieces, {"params/conv_1/kernel": variables["params"]["conv_1"]["kernel"] * 2})
    target = str(tmp_path / "other" / "fused.weights")
    os.mkdir(tmp_path / "other")
    files.write_changed(foreign.source, target, changed, {"sites": 1})
    again = files.read(target)
    assert again.fused == {"sites": 1}
    np.testing.assert_array_equal(again.tensors["layer1.conv.weight"], 2 * foreign.tensors["layer1.conv.weight"])
    doubled = {
        **variables,
        "params": {**variables["params"], "conv_1": jax.tree.map(lambda a: 2 * a, variables["params"]["conv_1"])},
    }
    with open(target, "rb") as file:
        assert file.read().startswith(darknet_bytes(doubled, version=version))  # darknet reads no further
    files.write_changed(again, str(tmp_path / "other" / "third.weights"), changed, {"sites": 2})
    assert files.read(str(tmp_path / "other" / "third.weights")).fused == {"sites": 2}
    with pytest.raises(CheckpointError, match="already fused"):
        load_foreign(target, net, like)
    (tmp_path / "other" / "taken.cfg").write_text("[net]")
    with pytest.raises(CheckpointError, match="describes another network"):
        files.write_changed(foreign.source, str(tmp_path / "other" / "taken.weights"), changed, {})


def test_files_that_do_not_fit(tmp_path):
    net, variables = net_and_variables()
    content = darknet_bytes(variables)
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 24, 16, 3)))
    start = written(tmp_path, darknet_bytes(variables, until=5))
    assert "the file ends before layer9" in files.read(start).notes
    with pytest.raises(CheckpointError, match="conv_9"):
        load_foreign(start, net, like)
    for wrong, message in (
        (content[:-4], r'ends inside "layer12\.conv\.weight": it has \d+ numbers, and the layers .* need \d+'),
        (content + bytes(8), "has numbers left over"),
        (b"\x80\x02hello" * 4, "version of darknet"),
        (content[:20], "numbers left over"),
    ):
        with pytest.raises(CheckpointError, match=message):
            files.read(written(tmp_path, wrong))
    written(tmp_path, content, "[net]\n[lstm]")
    with pytest.raises(CheckpointError, match=r"line 2, \[lstm\]"):
        files.read(str(tmp_path / "net.weights"))
    os.remove(tmp_path / "net.cfg")
    with pytest.raises(CheckpointError, match=r"Put the network's \.cfg beside it"):
        files.read(str(tmp_path / "net.weights"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convolutional]\nfilters=2", r"does not begin with \[net\]"),
        ("[net]\nwidth", r"line 2: expected \[section\] or name=value"),
        ("[net]\n[region]", r"line 2, \[region\]: this layer is not known"),
        ("[net]\n[convolutional]\nactivation=leeky", 'Did you mean "leaky"'),
        ("[net]\n[convolutional]\nfilters=two", "filters=two is not a number"),
        ("[net]\n[convolutional]\nfilters=4\ngroups=2", "groups=2 divides 3 channels in"),
        ("[net]\n[convolutional]\nfilters=4\nxnor=1", "xnor=1 makes a layer that is not known"),
        ("[net]\n[convolutional]\nsize=0", "size=0; expected at least 1"),
        ("[net]\n[convolutional]\n[route]\nlayers=-2", "layers=-2 does not name layers before it"),
        ("[net]\n[convolutional]\n[route]\nlayers=0\ngroups=2", "no part 0 of 2 equal ones"),
        (
            "[net]\n[convolutional]\nfilters=2\n[convolutional]\nfilters=3\n[shortcut]\nfrom=-2",
            "adds maps of 3, 2 channels",
        ),
        (
            "[net]\n[convolutional]\nfilters=9\n[yolo]\nanchors=1,2\nclasses=2",
            "reads 9 channels; 1 anchors of 2 classes need 7",
        ),
        ("[net]\n[convolutional]\nfilters=7\n[yolo]\nanchors=1,2\nmask=1\nclasses=2", r"mask=\[1\] does not choose"),
        ("[net]\n", "has no layers"),
    ],
)
def test_configurations_that_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_cfg(text + "\n")


def test_networks_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no \[yolo\] layer"):
        Darknet(cfg="[net]\n[convolutional]\n")
    with pytest.raises(ConfigError, match="Cannot read darknet's configuration"):
        Darknet(cfg=str(tmp_path / "absent.cfg"))
    (tmp_path / "net.cfg").write_text(CFG)
    net = Darknet(cfg=str(tmp_path / "net.cfg"))
    assert net.network.layers == Darknet(cfg=CFG).network.layers
    layers = find_layers(net, jax.ShapeDtypeStruct((1, 24, 16, 3), jnp.float32))
    assert len(layers) == 5 and not any(layer.refusal for layer in layers)
    with pytest.raises(ConfigError, match=r"joins maps of sizes .* multiples of 32, such as 24 x 16"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 22, 16, 3)))


@pytest.mark.slow
def test_published_weights_find_what_they_are_said_to_find():
    """Yolo-Fastest-1.1-xl on 128 pictures of COCO's val2017: AP 22.0 ± 0.3."""
    folder = os.environ.get("DREP_DATA")
    if not folder or not os.path.isfile(f"{folder}/weights/yolo-fastest-1.1-xl.weights"):
        pytest.skip("needs yolo-fastest-1.1-xl.weights and coco256_detseg.npz in DREP_DATA")
    net = Darknet(cfg=f"{folder}/weights/yolo-fastest-1.1-xl.cfg")
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 320, 320, 3)))
    variables = load_foreign(f"{folder}/weights/yolo-fastest-1.1-xl.weights", net, like).variables
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 923_486
    stored = np.load(f"{folder}/coco256_detseg.npz")
    chosen = np.flatnonzero(stored["split"] == 1)
    starts = stored["jpeg_offsets"]
    images = [
        Image.open(io.BytesIO(stored["jpeg"][starts[i] : starts[i + 1]].tobytes())).convert("RGB") for i in chosen
    ]
    size = np.array([image.size for image in images], np.float64)
    pixels = np.stack([np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR)) for image in images])
    run = jax.jit(
        lambda v, x: find_objects(
            net.apply(v, x / 255.0), net.network.heads, (320, 320), valid_size=jnp.full((len(x), 2), 320.0)
        )
    )
    parts = [jax.device_get(run(variables, pixels[i : i + 32].astype(np.float32))) for i in range(0, 128, 32)]
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    assert found.left_out.sum() == 0
    image, place = np.nonzero(found.valid)
    boxes = found.boxes[image, place].astype(np.float64) * np.tile(size[image], 2) / 320
    detected = Detected(image, boxes, found.classes[image, place], found.scores[image, place])
    of_split = np.isin(stored["box_image"], chosen)
    owner = np.searchsorted(chosen, stored["box_image"][of_split])
    center = stored["box_cxcywh"][of_split].astype(np.float64) * np.tile(size[owner], 2)
    truth = np.concatenate([center[:, :2] - center[:, 2:] / 2, center[:, :2] + center[:, 2:] / 2], axis=1)
    truths = Truths(owner, truth, stored["box_class"][of_split].astype(int))
    statistics = statistics_of_lists(detected, truths, images=128, num_classes=80)
    assert abs(float(METRICS["AP"](statistics, np.ones(128))) - 0.220) < 0.003
    assert abs(float(METRICS["AP50"](statistics, np.ones(128))) - 0.431) < 0.01
