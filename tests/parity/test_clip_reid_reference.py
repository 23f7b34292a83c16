"""CLIP-ReID against its authors' PyTorch code; needs torch and CLIP_REID_REFERENCE (see `clip_reid_reference`)."""

import os

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
if "CLIP_REID_REFERENCE" not in os.environ:
    pytest.skip("needs a checkout of github.com/Syliz517/CLIP-ReID in CLIP_REID_REFERENCE", allow_module_level=True)

from drep_jax import weights
from drep_jax.models import create_model
from tests.parity import clip_reid_reference as reference

pytestmark = pytest.mark.parity
CLASSES = 11
# name: (image size, stride, cameras, views, factor of their embeddings)
CASES = {
    "person": ((256, 128), 16, 0, 0, 1.0),
    "person, cameras, stride 12": ((256, 128), 12, 6, 0, 1.0),
    "vehicle, cameras and views, factor 3": ((256, 256), 16, 3, 2, 3.0),
}


@pytest.fixture(scope="module")
def modules():
    return reference.load_reference(os.environ["CLIP_REID_REFERENCE"])


def ours(size, stride, side, factor=1.0):
    options = {"patch_stride": None if stride == 16 else stride, "side_info": side, "sie_coefficient": factor}
    return create_model("clip_reid_b16", num_classes=CLASSES, image_size=size, **options)


def abstract(module):
    channels = 4 if module.side_info else 3
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *module.image_size, channels), np.float32))


def outputs(module, variables, images, train=False):
    run = jax.jit(lambda v, x: module.apply(v, x, train=train, method="outputs", mutable=["batch_stats"]))
    return run(variables, images)


def error(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_features_logits_and_files_there_and_back(modules, name, tmp_path):
    size, stride, cameras, views, factor = CASES[name]
    net = reference.make_reference(modules, size, stride, CLASSES, cameras, views, factor)
    original = str(tmp_path / "ViT-B-16_60.pth")
    torch.save(net.state_dict(), original)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, *size, 3)).astype(np.float32)
    camera, view = (rng.integers(n, size=6) if n else None for n in (cameras, views))
    seen = images
    if cameras:
        number = camera if view is None else camera * views + view
        plane = np.broadcast_to(number.reshape(-1, 1, 1, 1), (6, *size, 1)).astype(np.float32)
        seen = np.concatenate([images, plane], axis=3)

    module = ours(size, stride, cameras * max(views, 1), factor)
    found = weights.load_foreign(original, module, abstract(module))
    trained = [p for n, p in net.named_parameters() if p.requires_grad and not n.startswith(("text_", "prompt_"))]
    assert sum(p.numel() for p in trained) == sum(a.size for a in jax.tree.leaves(found.variables["params"]))

    evaluated = []
    for feature in ("before", "after"):
        net.neck_feat, module = feature, module.clone(feature=feature)
        expected = reference.run(net, images, camera, view)
        evaluated.append(error(jax.jit(module.apply)(found.variables, seen), expected))
        assert np.ptp(expected, axis=1).min() > 0.1
    features, logits = reference.run(net.train(), images, camera, view)
    got, updated = outputs(module, found.variables, seen, train=True)
    assert (len(got["features"]), len(got["logits"])) == (len(features), len(logits)) == (3, 2)
    trained_on = max(map(error, (*got["features"], *got["logits"]), (*features, *logits)))
    means = updated["batch_stats"]["neck_proj"]["bottleneck"]["mean"]
    means_off = error(means, net.bottleneck_proj.running_mean.numpy())
    print(f"\n{name}: max|Δ| / max|output| {max(evaluated):.1e}, train {trained_on:.1e}, means {means_off:.1e}", end="")
    assert max(*evaluated, trained_on, means_off) < 1e-4

    after = jax.tree.map(np.copy, found.variables)
    after["params"]["encoderblock_3"]["mlp"]["fc1"]["kernel"] *= 1.5
    changed = weights.write_back(found, str(tmp_path / "fused.pth"), found.variables, after, {})
    assert changed == ("image_encoder.transformer.resblocks.3.mlp.c_fc.weight",)
    before, again = torch.load(original), torch.load(tmp_path / "fused.pth")
    assert all(name in changed or torch.equal(again[name], tensor) for name, tensor in before.items())
    net.load_state_dict(again)
    assert error(jax.jit(module.apply)(after, seen), reference.run(net.eval(), images, camera, view)) < 1e-4
    fresh = torch.load(weights.write_new(module, found.variables, "clip_reid", str(tmp_path / "new"), {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.items())


@pytest.mark.parametrize("stride", [16, 12])
def test_openai_clip_is_read_and_its_positions_are_resized_as_there(modules, stride, tmp_path):
    clip = modules[1]
    torch.save({name: t.half() for name, t in reference.make_clip(clip).state_dict().items()}, tmp_path / "ViT-B-16.pt")
    module = ours((256, 128), stride, 6)
    like = abstract(module)
    initial = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    found = weights.load_foreign(str(tmp_path / "ViT-B-16.pt"), module, like, fresh=lambda: initial)
    assert any("left as initialized" in note and "neck" in note for note in found.notes)
    state = {name: tensor.float() for name, tensor in torch.load(tmp_path / "ViT-B-16.pt").items()}
    theirs = reference.resized(clip, state, module.grid, stride).visual
    images = np.random.default_rng(1).normal(size=(2, 256, 128, 4)).astype(np.float32)
    images[..., 3] = 0  # its embedding is zero
    got = outputs(module, found.variables, images)[0]["features"]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.ascontiguousarray(images[..., :3].transpose(0, 3, 1, 2))))
    worst = max(error(a, b[:, 0].numpy()) for a, b in zip(got, expected, strict=True))
    print(f"\nCLIP at 256×128, stride {stride}: max|Δ| / max|output| = {worst:.1e}", end="")
    assert worst < 1e-4
