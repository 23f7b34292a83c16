"""TransReID and TransReID-SSL against their authors' code; needs torch and checkouts (see `transreid_reference`)."""

import os

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.models import create_model
from drep_jax.weights.native import names_of

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")

from tests.parity import transreid_reference as reference
from tests.parity.torch_side import fused, save_network

for variable in reference.VARIABLES.values():
    if variable not in os.environ:
        pytest.skip(f"needs a checkout in {variable}", allow_module_level=True)

pytestmark = pytest.mark.parity

VEHICLE, PERSON, TALL = (256, 256), (256, 128), (384, 128)
STRIDE = {"STRIDE_SIZE": [12, 12]}
SIE = {"SIE_CAMERA": True}
SMALL = "vit_small_patch16_224_TransReID"
# name: (repository, size, their options, cameras, views, our model, our options)
CASES = {
    "ViT-B baseline": ("transreid", PERSON, {}, 0, 0, "transreid_b16_baseline", {}),
    "ViT-B + cameras": ("transreid", PERSON, SIE, 6, 0, "transreid_b16_baseline", {"side_info": 6}),
    "ViT-B + jigsaw": ("transreid", PERSON, {"JPM": True}, 0, 0, "transreid_b16", {}),
    "TransReID, stride 12": (
        "transreid",
        PERSON,
        {"JPM": True, **SIE, **STRIDE},
        6,
        0,
        "transreid_b16_stride12",
        {"side_info": 6},
    ),
    "TransReID, vehicles, cameras × views": (
        "transreid",
        VEHICLE,
        {"JPM": True, **SIE, "SIE_VIEW": True, "SHIFT_NUM": 8, **STRIDE},
        20,
        8,
        "transreid_b16_stride12",
        {"side_info": 160, "jigsaw_shift": 8},
    ),
    "SSL ViT-S": ("transreid_ssl", PERSON, {"kind": SMALL}, 0, 0, "transreid_ssl_s16", {}),
    "SSL ViT-S, ICS": (
        "transreid_ssl",
        PERSON,
        {"kind": SMALL, "STEM_CONV": True},
        0,
        0,
        "transreid_ssl_s16_ics",
        {},
    ),
    "SSL ViT-B, ICS, 384": ("transreid_ssl", TALL, {"STEM_CONV": True}, 0, 0, "transreid_ssl_b16_ics", {}),
}
CLASSES = 751


def make(name):
    """Their network at random, its tensors, and our module."""
    repository, size, options, cameras, views, model, ours = CASES[name]
    net = reference.make_reference(repository, reference.config(size, **options), CLASSES, cameras, views)
    module = create_model(model, num_classes=CLASSES, image_size=size, drop_path=0.0, **ours)
    return net, reference.draw(net), module


def batch(module, views, count=4):
    """Pictures, indices of side information, and both as our module takes them."""
    rng = np.random.default_rng(count)
    pictures = rng.normal(size=(count, *module.image_size, 3)).astype(np.float32)
    if not module.side_info:
        return pictures, None, pictures
    index = rng.permutation(module.side_info)[:count]
    plane = np.broadcast_to(index[:, None, None, None], (*pictures.shape[:3], 1)).astype(np.float32)
    return pictures, index, np.concatenate([pictures, plane], axis=-1)


def read(path, module):
    channels = 4 if module.side_info else 3
    like = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *module.image_size, channels), np.float32))
    return weights.load_foreign(path, module, like)


def error(got, expected):
    assert got.shape == expected.shape and np.ptp(expected, axis=1).min() > 0.1
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_outputs_running_means_and_parameter_counts(name, tmp_path):
    net, _, module = make(name)
    views = CASES[name][4]
    found = read(save_network(net, tmp_path / "transformer_120.pth"), module)
    pictures, index, x = batch(module, views)
    errors = {}
    for feature in ("before", "after"):
        net.neck_feat = feature
        got = jax.jit(module.clone(feature=feature).apply)(found.variables, x)
        errors[feature] = error(np.asarray(got), reference.run(net, pictures, index, views))
    # Batch norms over few images that are alike make much of rounding, so that training is compared in float64.
    features, logits = reference.run(net.double(), np.float64(pictures), index, views, train=True)
    with jax.enable_x64(True):
        wide = module.clone(dtype="float64", param_dtype="float64")
        train = jax.jit(lambda v, x: wide.apply(v, x, train=True, method="outputs", mutable=["batch_stats"]))
        ours, stats = train(jax.tree_util.tree_map(np.float64, found.variables), np.float64(x))
        pairs = zip(ours["features"] + ours["logits"], features + logits, strict=True)
        errors["training, float64"] = max(error(np.asarray(got), expected) for got, expected in pairs)
        stats = {n: np.asarray(leaf) for n, leaf in names_of({"batch_stats": stats["batch_stats"]}).items()}
    theirs = {name.removeprefix("base."): tensor.numpy() for name, tensor in net.state_dict().items()}
    means = {p.ours: p.theirs.removeprefix("base.") for p in found.pieces if p.ours.endswith("/mean")}
    errors["running means"] = max(np.abs(stats[ours] - theirs[name]).max() for ours, name in means.items())
    print(f"\n{name}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in errors.items()), end="")
    assert (
        max(errors["before"], errors["after"]) < 1e-5
        and max(errors["training, float64"], errors["running means"]) < 1e-9
    )

    ours = sum(leaf.size for leaf in jax.tree_util.tree_leaves(found.variables["params"]))
    theirs = sum(p.numel() for p in net.parameters())
    # What their network holds and never reads, and the shifts that are held at 0.
    dead = ["base.fc.", f"base.blocks.{module.depth - 1}.", "base.norm."] if module.jigsaw else ["base.fc."]
    unread = sum(p.numel() for n, p in net.named_parameters() if n.startswith(tuple(dead)))
    shifts = sum(p.numel() for n, p in net.named_parameters() if n.startswith("bottleneck") and n.endswith("bias"))
    print(f"; {ours:,} of their {theirs:,} parameters ({unread:,} never read, {shifts:,} held at 0)", end="")
    assert ours == theirs - unread - shifts


@pytest.mark.parametrize("name", ["TransReID, stride 12", "SSL ViT-S, ICS"])
def test_a_fused_file_runs_in_their_code(name, tmp_path):
    net, drawn, module = make(name)
    found = read(save_network(net, tmp_path / "transformer_120.pth"), module)
    pictures, index, x = batch(module, CASES[name][4], 2)
    channels = 4 if module.side_info else 3
    after = fused(module, found.variables, module.image_size, ".*/mlp/fc1", channels=channels)
    written = weights.write_back(found, str(tmp_path / "fused.pth"), found.variables, after, {})
    assert "b2.0.mlp.fc1.weight" in written or not module.jigsaw
    state = torch.load(tmp_path / "fused.pth", weights_only=False)["state_dict"]
    assert state.keys() == net.state_dict().keys()
    for key, tensor in drawn.items():
        short = key.removeprefix("base.")
        assert (key in written or short in written) or np.array_equal(state[key].numpy(), tensor), key
    before = reference.run(net, pictures, index)
    net.load_state_dict(state)
    expected = reference.run(net, pictures, index)
    got = np.asarray(jax.jit(module.apply)(after, x))
    print(f"\n{name}, fused: {error(got, expected):.1e}", end="")
    assert error(got, expected) < 1e-4 < error(before, expected)

    # A file without an original holds what their loader asks for.
    path = weights.write_new(module, after, "transreid", str(tmp_path / "new"), {})
    net.load_state_dict({k: torch.zeros_like(t) if k.startswith("bottleneck") else t for k, t in state.items()})
    tensors = torch.load(path, weights_only=False)
    assert tensors.keys() <= net.state_dict().keys()
    torch.save(tensors, tmp_path / "plain.pth")
    net.load_param(str(tmp_path / "plain.pth"))
    assert error(reference.run(net, pictures, index), expected) < 1e-6


@pytest.mark.parametrize("jigsaw", [False, True])
def test_pre_trained_files_begin_with_the_same_network(jigsaw, tmp_path):
    size, options = (96, 64), {"kind": "vit_base_patch16_224_TransReID", **STRIDE, "JPM": jigsaw}
    plain = reference.make_reference("transreid", reference.config((224, 224), **{**options, "STRIDE_SIZE": 16}), 5)
    reference.draw(plain)
    tensors = {n.removeprefix("base."): t for n, t in plain.state_dict().items() if n.startswith("base.")}
    tensors = {n.replace("fc.", "head.") if n.startswith("fc.") else n: t for n, t in tensors.items()}
    torch.save(tensors, tmp_path / "jx_vit.pth")
    net = reference.make_reference(
        "transreid",
        reference.config(size, **options, PRETRAIN_CHOICE="imagenet", PRETRAIN_PATH=str(tmp_path / "jx_vit.pth")),
        5,
    )
    name = "transreid_b16_stride12" if jigsaw else "transreid_b16_baseline"
    module = create_model(name, num_classes=5, image_size=size, drop_path=0.0, patch_stride=12)
    like = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
    path = str(tmp_path / "jx_vit.pth")

    def fresh():
        return module.init(jax.random.key(0), np.zeros((1, *size, 3), np.float32))

    found = weights.load_foreign(path, module, like, grid=(14, 14), fresh=fresh)
    assert any("left as initialized" in note for note in found.notes)
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    got = np.asarray(jax.jit(module.apply)(found.variables, x))
    print(f"\njigsaw {jigsaw}, from a pre-trained ViT: {error(got, reference.run(net, x)):.1e}", end="")
    assert error(got, reference.run(net, x)) < 1e-4
