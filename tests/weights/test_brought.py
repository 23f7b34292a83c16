"""Checkpoints as people bring them: wrappers' names, shards, weights stored in parts, arrays in pickles, other channels."""

import json
import os
import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.weights import channels, files
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.native import is_native, names_of
from tests.command import same_bits
from tests.weights import pickles
from tests.weights.vit_cases import abstract, foreign_weights, tiny

VIT = tiny()
BASE = foreign_weights(TIMM_VIT, VIT)
LIKE = abstract(VIT)
FC1 = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The variables that the plain file gives."""
    return load(write(tmp_path_factory.mktemp("base") / "a.safetensors", BASE)).variables


def load(path, **options):
    return weights.load_foreign(str(path), VIT, LIKE, **options)


def write(path, tensors):
    files.create(str(path), {name: np.asarray(array, order="C") for name, array in tensors.items()}, None)
    return str(path)


def under(prefix, tensors=BASE):
    return {prefix + name: array for name, array in tensors.items()}


def inside(wrapper, where=("blocks.0.", "blocks.1.mlp.")):
    """A wrapper's part behind the modules that it wraps."""
    names = {name: next((part for part in where if name.startswith(part)), "") for name in BASE}
    return {(f"{p}{wrapper}.{n.removeprefix(p)}" if p else n): BASE[n] for n, p in names.items()}


OTHERS = {name: array + 1 for name, array in BASE.items()}
METRICS = {"train_acc.tp": np.zeros(2, np.int64), "val_f1_score.fp": np.zeros(1), "criterion.weight": np.ones(5)}
HEAD = {name.replace("head.", "head.modules_to_save.default."): array for name, array in BASE.items()}
ORIGINALS = {"head.original_module.weight": OTHERS["head.weight"], "head.original_module.bias": OTHERS["head.bias"]}
COPIES = {"ema_" + name.replace(".", "_"): array for name, array in OTHERS.items()}
NO_DOTS = {"model_ema." + name.replace(".", ""): array for name, array in OTHERS.items()}
COUNTERS = {"model_ema.decay": np.float32(0.9), "model_ema.num_updates": np.int64(3)}
ADAPTERS = {
    "blocks.0.attn.qkv.lora_A.default.weight": np.ones((2, 12), np.float32),
    "blocks.0.attn.qkv.lora_B.default.weight": np.zeros((36, 2), np.float32),
}
# name: (tensors of the file, what the notes say)
NAMES = {
    "averaged by PyTorch": (under("module.") | {"n_averaged": np.int64(7)}, ["not of the network: n_averaged"]),
    "compiled inside": (inside("_orig_mod"), ['wrapper "_orig_mod" taken out of 16 names']),
    "checkpointed inside": (inside("_checkpoint_wrapped_module"), ['"_checkpoint_wrapped_module" taken out of']),
    "sharded": (
        under("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module")),
        ['"_fsdp_wrapped_module" taken out of'],
    ),
    "all at once": (under("module._orig_mod.", inside("_fpw_module._checkpoint_wrapped_module")), ["_fpw_module"]),
    "a part compiled": ({n.replace("blocks.0.", "_orig_mod.blocks.0."): a for n, a in BASE.items()}, ["_orig_mod"]),
    "parallel inside": (inside("module"), ['wrapper "module" taken out of 16 names']),
    "Lightning": (
        under("model.") | METRICS,
        ["left out, of training, not of the network: criterion.weight; train_acc"],
    ),
    "a Lightning module itself": (BASE | METRICS, ["left out, of training"]),
    "averaged beside": (
        under("ema_model.module.") | under("online_model.", OTHERS) | {"initted": np.bool_(1), "step": np.int64(9)},
        ['names that begin with "ema_model." (also there: "online_model.")'],
    ),
    "averaged beside, without a prefix": (under("shadow.") | OTHERS, ['begin with "shadow."']),
    "copies beside": (BASE | COPIES, ["copies beside the weights, not used"]),
    "copies without dots": (under("model.") | NO_DOTS | COUNTERS, ["copies beside the weights, not used"]),
    "modules saved beside adapters": (under("base_model.model.", HEAD | ORIGINALS), ["take the place of 2 originals"]),
    "untrained adapters": (
        under("base_model.model.", {n.replace("qkv.", "qkv.base_layer."): a for n, a in BASE.items()} | ADAPTERS),
        ["of adapters that were never trained"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_wrappers(case, base, tmp_path):
    tensors, said = NAMES[case]
    checkpoint = load(write(tmp_path / "a.safetensors", tensors))
    assert same_bits(checkpoint.variables, base)
    for part in said:
        assert any(part in note for note in checkpoint.notes), checkpoint.notes
    # what goes back has the file's own names
    again = files.read(weights.write(str(tmp_path / "b.safetensors"), base, checkpoint))
    assert {*again.stored.values()} <= tensors.keys() and again.fused == {}


def test_other_states_of_a_training_checkpoint(base, tmp_path):
    """Averages as a dictionary called "shadow" are taken; a list of them has no names and is not."""
    plain, averaged = b"", b""
    storages, states = [], {}
    for where, source in (("plain", OTHERS), ("shadow", BASE)):
        states[where] = b"}("
        for name, array in source.items():
            key = str(len(storages))
            storages.append((key, array.tobytes()))
            strides = [step // 4 for step in array.strides]
            text = b"X" + len(name).to_bytes(4, "little") + name.encode()
            states[where] += text + pickles.tensor(array.shape, strides, size=array.size, key=key)
        states[where] += b"u"
    plain, averaged = states["plain"], states["shadow"]
    nested = b"\x80\x02}(U\x05model" + plain + b"U\x03ema}(U\x06shadow" + averaged + b"U\x05decayK\x01uu."
    checkpoint = load(pickles.zip_file(tmp_path / "a.pth", nested, storages))
    assert same_bits(checkpoint.variables, base)
    first = pickles.tensor(BASE["head.bias"].shape, (1,), size=5, key=str(list(BASE).index("head.bias")))
    listed = b"\x80\x02}(U\x05model" + averaged + b"U\x03ema}U\x0dshadow_params(" + first + b"lsu."
    checkpoint = load(pickles.zip_file(tmp_path / "b.pth", listed, storages))
    assert same_bits(checkpoint.variables, base)
    assert 'tensors without names not used: "ema/shadow_params"' in checkpoint.notes
    alone = b"\x80\x02}U\x0dshadow_params(" + first + b"ls."
    with pytest.raises(CheckpointError, match="in a list, without names"):
        files.read(pickles.zip_file(tmp_path / "c.pth", alone, storages))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="fc")(x)


class Wrapping(nn.Module):
    """A network whose own names look like wrappers'."""

    @nn.compact
    def __call__(self, x):
        return Inner(name="module")(Inner(name="model")(x))


class OnlyModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Inner(name="model")(x)


def test_a_network_whose_own_names_look_like_wrappers(tmp_path):
    like = jax.eval_shape(Wrapping().init, jax.random.key(0), np.zeros((1, 2), np.float32))
    tensors = {f"model.fc.{n}": np.full((2, 2)[: 1 + (n == "weight")], 3, np.float32) for n in ("weight", "bias")}
    both = tensors | {n.replace("model", "module"): 2 * a for n, a in tensors.items()}
    checkpoint = weights.load_foreign(write(tmp_path / "a.npz", both), Wrapping(), like)
    assert checkpoint.variables["params"]["module"]["fc"]["bias"].tolist() == [6, 6]
    alone = jax.eval_shape(OnlyModel().init, jax.random.key(0), np.zeros((1, 2), np.float32))
    checkpoint = weights.load_foreign(write(tmp_path / "b.npz", tensors), OnlyModel(), alone)
    assert "names taken as they stand in the file" in checkpoint.notes
    weights.write(str(tmp_path / "c.npz"), jax.tree.map(lambda leaf: leaf + 1, checkpoint.variables), checkpoint)
    assert np.load(tmp_path / "c.npz")["model.fc.bias"].tolist() == [4, 4]


def trained(tensors, value=1.0):
    return {name: np.full_like(array, value) if "lora_B" in name else array for name, array in tensors.items()}


REFUSED = {
    "an unknown prefix": (under("net."), ['Behind "net." its names are those of format timm', "init_state=net reads"]),
    "two unknown parts": (under("lit.net.") | METRICS, ["--config.backbone.init_state=lit.net reads them"]),
    "adapters": (BASE | trained(ADAPTERS), ["alpha / r", "merge_and_unload", "init_allow"]),
    "adapters only": (under("base_model.model.", trained(ADAPTERS)), ["holds adapters only"]),
    "flattened": (
        {"_fsdp_wrapped_module._flat_param": np.zeros(9, np.float32)},
        ["flattened for sharding", "FULL_STATE"],
    ),
    "quantized": (BASE | {FC1: BASE[FC1].astype(np.int8)}, ["quantized or complex numbers", f"{FC1} (int8)"]),
    "one channel": (
        BASE | {"patch_embed.proj.weight": BASE["patch_embed.proj.weight"][:, :1]},
        ["the model expects images of 3 channels, and the file is for 1", "--config.backbone.init_channels=sum"],
    ),
    "a parametrization of unknown code": (
        {n: a for n, a in BASE.items() if n != FC1}
        | {FC1.replace("weight", "parametrizations.weight.original"): BASE[FC1]},
        [f"{FC1} is computed from", "remove_parametrizations"],
    ),
    "half a pruned pair": (
        {n: a for n, a in BASE.items() if n != FC1} | {FC1 + "_orig": BASE[FC1]},
        [f"{FC1} is computed from {FC1}_orig in a way that is not known"],
    ),
    "a mask of another shape": (
        {n: a for n, a in BASE.items() if n != FC1}
        | {FC1 + "_orig": BASE[FC1], FC1 + "_mask": np.ones((3, 5), np.float32)},
        ["the parts' shapes do not fit", f"{FC1}_mask (3, 5)"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_what_would_be(case, tmp_path):
    tensors, parts = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "a.safetensors", tensors))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_the_ways_out_work(base, tmp_path):
    path = write(tmp_path / "a.safetensors", under("lit.net.") | METRICS)
    assert same_bits(load(path, state="lit.net").variables, base)
    path = write(tmp_path / "b.safetensors", BASE | trained(ADAPTERS))
    assert same_bits(load(path, allow=(".*(lora|hada|lokr|ia3|oft|vera)_.*",)).variables, base)


# ---------------------------------------------------------------------------------------------------------------------
# Stored in parts
# ---------------------------------------------------------------------------------------------------------------------


def normalized(v, axis):
    """V / ‖V‖ row by row, written out."""
    rows = np.moveaxis(v.astype(np.float64), axis, 0)
    return np.moveaxis(np.stack([row / np.sqrt((row * row).sum()) for row in rows]), 0, axis)


def pruned(weight, rng):
    mask = rng.integers(0, 2, weight.shape).astype(np.float32)
    return {"weight_orig": weight, "weight_mask": mask}, weight * mask


def weight_norm(names, axis):
    def parts(weight, rng):
        shape = [size if i == axis else 1 for i, size in enumerate(weight.shape)]
        g = rng.uniform(0.5, 2, shape).astype(np.float32)
        return dict(zip(names, (g, weight), strict=True)), g * normalized(weight, axis)

    return parts


def spectral(names):
    def parts(weight, rng):
        matrix = weight.reshape(len(weight), -1).astype(np.float64)
        u, v = rng.normal(size=len(matrix)), rng.normal(size=matrix.shape[1])
        sigma = sum(u[i] * matrix[i, j] * v[j] for i in range(len(u)) for j in range(len(v)))
        arrays = (weight, u.astype(np.float32), v.astype(np.float32))
        return dict(zip(names, arrays, strict=True)), weight / sigma

    return parts


OLD, NEW = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
PARTS = {
    "pruned": (pruned, True),
    "weight norm": (weight_norm(OLD, 0), True),
    "weight norm, new": (weight_norm(NEW, 0), True),
    "weight norm of the inputs": (weight_norm(OLD, 1), True),
    "spectral norm": (spectral(("weight_orig", "weight_u", "weight_v")), False),
    "spectral norm, new": (
        spectral(("parametrizations.weight.original", *(f"parametrizations.weight.0._{s}" for s in "uv"))),
        False,
    ),
}
LAYERS = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", FC1)


@pytest.mark.parametrize("kind", PARTS)
def test_weights_stored_in_parts(kind, tmp_path):
    """They are read as the weight that PyTorch computes; fused ones give the fused weight again, or are refused."""
    make, can_write = PARTS[kind]
    rng = np.random.default_rng(3)
    stored, plain = dict(BASE), dict(BASE)
    for name in LAYERS:
        parts, plain[name] = make(stored.pop(name), rng)
        stored |= {name.removesuffix("weight") + part: array for part, array in parts.items()}
    checkpoint = load(write(tmp_path / "a.pth", stored))
    expected = load(write(tmp_path / "plain.npz", {n: a.astype(np.float32) for n, a in plain.items()})).variables
    for name, leaf in names_of(expected).items():
        np.testing.assert_allclose(names_of(checkpoint.variables)[name], leaf, rtol=2e-6, atol=1e-7, err_msg=name)
    assert any("3 weights computed from their parts" in note for note in checkpoint.notes)
    changed = {n: np.asarray(leaf) for n, leaf in names_of(checkpoint.variables).items()}
    fused = ["params/encoderblock_0/mlp/fc1/kernel", "params/encoderblock_0/attn/key/kernel"]
    changed |= {name: rng.normal(size=changed[name].shape).astype(np.float32) for name in fused}
    changed[fused[0]][:, 0] = 0  # a row that has no direction
    tree = jax_tree(changed, checkpoint.variables)
    path = str(tmp_path / "b.pth")
    if not can_write:
        for attempt in (
            lambda: weights.write(path, tree, checkpoint),
            lambda: weights.check_can_write_back(checkpoint, fused),
        ):
            with pytest.raises(CheckpointError, match=r"spectral norm, which scales.*--export=FORMAT.*sites.pattern"):
                attempt()
        assert not os.path.exists(path)
        return
    weights.check_can_write_back(checkpoint, fused)
    weights.write(path, tree, checkpoint)
    again = load(path, allow_fused=True)
    for name, leaf in names_of(again.variables).items():
        np.testing.assert_allclose(leaf, changed[name], rtol=2e-6, atol=1e-7, err_msg=name)
    old, new = files.read(str(tmp_path / "a.pth")).tensors, files.read(path).tensors
    touched = {name for name in old if not np.array_equal(old[name], new[name])}
    assert touched and all(name.startswith(("blocks.0.mlp.fc1", "blocks.0.attn.qkv")) for name in touched)
    if kind == "pruned":
        assert (new[FC1 + "_mask"] == 1).all() and "dense" in "".join(
            weights.remarks_on(checkpoint, checkpoint.variables, tree)
        )


def jax_tree(leaves, like):
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), [leaves[name] for name in names_of(like)])


# ---------------------------------------------------------------------------------------------------------------------
# Several files
# ---------------------------------------------------------------------------------------------------------------------


def shards(folder, suffix, index=True, stem="model"):
    folder.mkdir(exist_ok=True)
    names = [f"{stem}-0000{i + 1}-of-00002{suffix}" for i in range(2)]
    halves = [dict(list(BASE.items())[i::2]) for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        write(folder / name, half)
    where = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    path = folder / f"{stem}{suffix}.index.json"
    if index:
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return str(path), [str(folder / name) for name in names]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_as_one_and_written_as_shards(suffix, index, base, tmp_path):
    path, parts = shards(tmp_path / "a", suffix, index)
    for given in ([path] if index else []) + parts:
        assert not is_native(given)
        checkpoint = load(given)
        assert same_bits(checkpoint.variables, base) and "2 shards read as one" in checkpoint.notes
    changed = {n: np.asarray(leaf) for n, leaf in names_of(base).items()}
    changed |= {n: 2 * a for n, a in changed.items() if n.endswith("mlp/fc1/kernel")}
    out = str(tmp_path / weights.fused_name(checkpoint))
    weights.write(out, jax_tree(changed, base), checkpoint, fusion={"rule": "ddpm"})
    assert sorted(os.listdir(os.path.dirname(out))) == sorted(os.listdir(tmp_path / "a"))
    assert same_bits(load(out, allow_fused=True).variables, jax_tree(changed, base))
    with pytest.raises(CheckpointError, match="already fused"):
        load(out)


def test_incomplete_shards_are_named(tmp_path):
    path, parts = shards(tmp_path / "a", ".safetensors")
    os.remove(parts[1])
    for given in (path, parts[0]):
        with pytest.raises(CheckpointError, match=r"2 files, of which 1 are missing beside it: model-00002-of-00002"):
            load(given)
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match='without a "weight_map"'):
        load(tmp_path / "a" / "config.json")
    (tmp_path / "b.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names the shard '../x.safetensors'"):
        load(tmp_path / "b.index.json")
    path, parts = shards(tmp_path / "c", ".safetensors", index=False)
    write(parts[1], BASE)
    with pytest.raises(
        CheckpointError, match=r"is in .*00001-of-00002.safetensors and in .*00002-of-00002.safetensors"
    ):
        load(parts[0])


def test_folders_of_other_projects_name_the_file_or_the_command(tmp_path):
    path, _ = shards(tmp_path / "a", ".safetensors")
    with pytest.raises(CheckpointError, match=f"Give a file in it: {path}"):
        is_native(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".metadata").touch()
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        is_native(str(tmp_path / "b"))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays in pickles, channels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_inside_a_torch_file(protocol, base, tmp_path):
    """They are read; they lie within the program, so a file that holds them is not written again."""
    arrays = {name: np.asfortranarray(array) if i % 2 else array for i, (name, array) in enumerate(BASE.items())}
    arrays["head.bias"] = arrays["head.bias"].astype(">f4")
    program = pickle.dumps({"state_dict": arrays, "epoch": 3}, protocol)
    checkpoint = load(pickles.zip_file(tmp_path / "a.pth", program))
    assert same_bits(checkpoint.variables, base)
    assert f"{len(BASE)} NumPy arrays inside the pickle; fused ones need a new file" in checkpoint.notes
    changed = {n: np.asarray(leaf) for n, leaf in names_of(base).items()}
    changed["params/head/kernel"] = changed["params/head/kernel"] + 1
    for attempt in (
        lambda: weights.check_can_write_back(checkpoint, ["params/head/kernel"]),
        lambda: weights.write(str(tmp_path / "b.pth"), jax_tree(changed, base), checkpoint),
    ):
        with pytest.raises(CheckpointError, match=r"NumPy arrays inside its pickle \(head.weight\).*--export=FORMAT"):
            attempt()
    assert not os.path.exists(tmp_path / "b.pth")


def test_arrays_that_cannot_be(tmp_path):
    whole = pickle.dumps({"a": np.arange(6, dtype=np.float32)}, 2)
    assert files.read(pickles.zip_file(tmp_path / "a.pth", whole)).tensors["a"].tolist() == [0, 1, 2, 3, 4, 5]
    short = whole.replace(b"K\x06\x85", b"K\x07\x85")
    assert short != whole
    with pytest.raises(CheckpointError, match="a NumPy array whose type, shape or size cannot be"):
        files.read(pickles.zip_file(tmp_path / "b.pth", short))
    objects = pickle.dumps({"a": np.array([None, "x"], dtype=object)}, 2)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        files.read(pickles.zip_file(tmp_path / "c.pth", objects))


def test_other_numbers_of_channels(base, tmp_path):
    """A gray image gives with "sum" what it gave in the file's network; the other ways are as they are written."""
    name, leaf = "patch_embed.proj.weight", "params/embedding/kernel"
    rng = np.random.default_rng(5)
    for count in (1, 2, 4):
        kernel = rng.normal(size=(12, count, 8, 8)).astype(np.float32)
        path = write(tmp_path / f"{count}.safetensors", BASE | {name: kernel})
        ours = {
            way: names_of(load(path, input_channels=way).variables)[leaf].transpose(3, 2, 0, 1) for way in channels.WAYS
        }
        np.testing.assert_allclose(ours["sum"].sum(1), kernel.sum(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours["mean"], np.repeat(kernel.mean(1, keepdims=True), 3, 1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours["repeat"][:, 2], kernel[:, 2 % count] * count / 3, rtol=1e-6)
    checkpoint = load(path, input_channels="sum")
    assert f"{name} converted from 4 to 3 input channels (sum)" in checkpoint.notes
    weights.write(str(tmp_path / "again.safetensors"), checkpoint.variables, checkpoint)
    assert np.array_equal(files.read(str(tmp_path / "again.safetensors")).tensors[name], kernel)
    with pytest.raises(CheckpointError, match=r"params/embedding/kernel was fused, but .* of its shape"):
        weights.check_can_write_back(checkpoint, [leaf])
    with pytest.raises(ConfigError, match=r'Unknown init_channels "summ". Did you mean "sum"?'):
        load(path, input_channels="summ")
    plain = load(write(tmp_path / "plain.safetensors", BASE), input_channels="sum")
    assert same_bits(plain.variables, base) and any("was not needed" in note for note in plain.notes)
