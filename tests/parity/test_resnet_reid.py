"""ResNets of re-identification against torchvision's trunk with last stride 1, and the stems and necks of the projects."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from drep_jax import weights
from drep_jax.models import create_model
from tests.parity.torch_side import draw_weights, pictures

pytestmark = pytest.mark.parity
CLASSES = 13


class Heads(torch.nn.Module):
    """fast-reid's head: the neck in a sequence, the classifier as a matrix of its own."""

    def __init__(self, width):
        super().__init__()
        self.bottleneck = torch.nn.Sequential(torch.nn.BatchNorm1d(width))
        self.weight = torch.nn.Parameter(torch.zeros(CLASSES, width))


class Theirs(torch.nn.Module):
    """The baselines, under the names that they give their parts."""

    def __init__(self, stem, depth):
        super().__init__()
        net = getattr(torchvision.models, f"resnet{depth}")()
        first = net.layer4[0]
        (first.conv2 if depth >= 50 else first.conv1).stride = first.downsample[0].stride = (1, 1)
        width = net.fc.in_features
        net.fc = torch.nn.Identity()
        if stem == "fast_reid":
            net.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
            self.backbone, self.heads = net, Heads(width)
            neck = self.heads.bottleneck[0]
        else:
            if stem == "strong_baseline":
                net.relu = torch.nn.Identity()  # that of the stem: the blocks have their own
            self.base, self.bottleneck = net, torch.nn.BatchNorm1d(width)
            self.classifier = torch.nn.Linear(width, CLASSES, bias=False)
            neck = self.bottleneck
        draw_weights(self)
        torch.nn.init.zeros_(neck.bias)
        neck.bias.requires_grad_(False)

    def forward(self, x):
        if hasattr(self, "heads"):
            before = self.backbone(x)
            after = self.heads.bottleneck(before)
            return before, after, torch.nn.functional.linear(after, self.heads.weight)
        before = self.base(x)
        after = self.bottleneck(before)
        return before, after, self.classifier(after)


def run(net, images):
    with torch.no_grad():
        found = net(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return [tensor.numpy() for tensor in found]


def error(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def abstract(module, size):
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))


@pytest.mark.parametrize("size", [(256, 128), (97, 66)])
@pytest.mark.parametrize("stem", ["strong_baseline", "fast_reid"])
def test_features_logits_and_files_there_and_back(stem, size, tmp_path):
    net = Theirs(stem, 50).eval()
    original = str(tmp_path / "model.pth")
    torch.save({"model": net.state_dict()} if stem == "fast_reid" else net.state_dict(), original)
    module = create_model("resnet50_reid", num_classes=CLASSES, image_size=size, stem=stem)
    found = weights.load_foreign(original, module, abstract(module, size))
    assert found.format.name == stem
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == sum(a.size for a in jax.tree.leaves(found.variables["params"]))

    images, worst = pictures(4, size), {}
    for train in (False, True):
        before, after, logits = run(net.train(train), images)
        apply = jax.jit(lambda v, x, t=train: module.apply(v, x, t, method="outputs", mutable=["batch_stats"]))
        got = apply(found.variables, images)[0]
        worst[train] = max(error(got["features"][0], before), error(got["logits"][0], logits))
        if not train:
            assert np.ptp(after, axis=1).min() > 0.1
            for feature, expected in (("before", before), ("after", after)):
                retrieved = jax.jit(module.clone(feature=feature).apply)(found.variables, images)
                worst[train] = max(worst[train], error(retrieved, expected))
    print(f"\n{stem} {size}: max|Δ| / max|output| {worst[False]:.1e}, train {worst[True]:.1e}", end="")
    assert worst[False] < 1e-5 and worst[True] < 1e-3

    changed = jax.tree.map(np.copy, found.variables)
    changed["params"]["layer2_1"]["conv2"]["kernel"] *= 1.5
    names = weights.write_back(found, str(tmp_path / "fused.pth"), found.variables, changed, {})
    assert len(names) == 1 and names[0].endswith("layer2.1.conv2.weight")
    held, again = torch.load(original), torch.load(tmp_path / "fused.pth")
    held, again = (file.get("model", file) for file in (held, again))
    assert sum(not torch.equal(again[name], tensor) for name, tensor in held.items()) == 1
    new = torch.load(weights.write_new(module, found.variables, stem, str(tmp_path / "new"), {}))
    assert set(held) - set(new) == {n for n in held if n.endswith(("num_batches_tracked", "bottleneck.bias", "0.bias"))}
    assert all(torch.equal(held[name], tensor) for name, tensor in new.items())


@pytest.mark.parametrize("branches", [1, 2])
def test_torchvisions_weights_are_where_it_begins(branches, tmp_path):
    size, net = (128, 128), torchvision.models.resnet50()
    draw_weights(net)
    torch.save(net.state_dict(), tmp_path / "resnet50.pth")
    module = create_model("resnet50_reid", num_classes=CLASSES, image_size=size, branches=branches)
    like = abstract(module, size)
    initial = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), like)
    found = weights.load_foreign(str(tmp_path / "resnet50.pth"), module, like, fresh=lambda: initial)
    assert any("left as initialized" in note and "neck" in note for note in found.notes)
    first, net.fc = net.layer4[0], torch.nn.Identity()
    first.conv2.stride = first.downsample[0].stride = (1, 1)
    images = pictures(2, size)
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()
    features = jax.jit(lambda v, x: module.apply(v, x, method="outputs"))(found.variables, images)["features"]
    assert len(features) == branches and max(error(f, expected) for f in features) < 1e-5


def test_two_branches_are_two_last_stages_of_torchvision():
    size, nets = (96, 96), [Theirs("torchvision", 50).eval() for _ in range(2)]
    with torch.no_grad():
        for tensor in nets[1].base.layer4.parameters():
            tensor *= 1.2
        nets[1].bottleneck.weight *= 1.5
    module = create_model("resnet50_vanet", num_classes=CLASSES, image_size=size)
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    read = {}
    for path, shape in flatten_dict(abstract(module, size), sep="/").items():
        _, *owner, last = path.split("/")
        state = nets["different" in path].state_dict()
        name = "/".join(owner).replace("same_", "").replace("different_", "")
        if name.startswith("neck"):
            name = owner[-1]
        else:
            name = "base." + name.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
            name = name.replace("/", ".").replace("_", ".")
        tensor = state[f"{name}.{leaf[last]}"].numpy()
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim)
        read[path] = tensor.transpose(axes) if axes else tensor
        assert read[path].shape == shape.shape, path
    variables, images = unflatten_dict(read, sep="/"), pictures(3, size)
    got = jax.jit(lambda v, x: module.apply(v, x, method="outputs"))(variables, images)
    retrieved = np.asarray(jax.jit(module.apply)(variables, images))
    worst = 0.0
    for i, net in enumerate(nets):
        before, after, logits = run(net, images)
        halves = retrieved[:, 2048 * i : 2048 * (i + 1)]
        worst = max(worst, *map(error, (got["features"][i], halves, got["logits"][i]), (before, after, logits)))
    assert np.abs(retrieved[:, :2048] - retrieved[:, 2048:]).max() > 0.1
    print(f"\ntwo branches: max|Δ| / max|output| {worst:.1e}", end="")
    assert worst < 1e-5
