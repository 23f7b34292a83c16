"""Files of TransReID: trained ones with what their network never reads, pre-trained ViTs to begin with, and what is refused."""

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError
from drep_jax.models import create_model
from drep_jax.weights import files, translation
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.formats.transreid import TRANSREID_NET, TRANSREID_SSL_TRUNK
from drep_jax.weights.native import names_of
from tests.command import same_bits
from tests.weights.vit_cases import foreign_shapes, foreign_weights, load, save, tiny

SIZE = (16, 24)
COMMON = {"patch_size": 8, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 24}
FULL = {"jigsaw": True, "side_info": 6, "patch_stride": 4, "jigsaw_shift": 2}


def net(num_classes=5, size=SIZE, **options):
    return create_model("transreid", num_classes=num_classes, image_size=size, **{**COMMON, **options})


def read(path, module, **options):
    shape = (1, *module.image_size, 4 if module.side_info else 3)
    like = jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape, np.float32))

    def fresh():
        return jax.tree_util.tree_map(lambda leaf: np.full(leaf.shape, 0.25, leaf.dtype), like)

    return weights.load_foreign(str(path), module, like, fresh=fresh, **options)


def refused(path, module, *texts, **options):
    with pytest.raises(CheckpointError) as error:
        read(path, module, **options)
    for text in texts:
        assert text in str(error.value), str(error.value)


def trained(module, seed=0):
    """{name: tensor} of a trained file, with all that the public code saves."""
    rng = np.random.default_rng(seed)
    shape = (1, *module.image_size, 4 if module.side_info else 3)
    like = names_of(jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape, np.float32)))
    pieces = translation.find_pieces(TRANSREID_NET, module, {n: leaf.shape for n, leaf in like.items()})
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in like.items()}
    shapes = {n: a.shape for n, a in translation.put_back(pieces, zeros).items()}
    tensors = {n: rng.uniform(0.1, 1.0, shape).astype(np.float32) for n, shape in shapes.items()}
    if module.jigsaw:
        last = {
            n.replace("b1.0.", f"base.blocks.{module.depth - 1}."): a + 1 for n, a in tensors.items() if "b1.0." in n
        }
        tensors |= {**last, "base.norm.weight": np.ones(12, np.float32), "base.norm.bias": np.ones(12, np.float32)}
    tensors |= {"base.fc.weight": np.ones((7, 12), np.float32), "base.fc.bias": np.ones(7, np.float32)}
    for name in [n for n in tensors if n.endswith("running_mean")]:
        if name.startswith("bottleneck"):
            tensors[name.replace("running_mean", "bias")] = np.zeros(12, np.float32)
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.array(9)
    return tensors


def pre_trained(size=SIZE, **options):
    """{name: tensor} of a plain ViT with timm's names."""
    return foreign_weights(TIMM_VIT, tiny(7, size, **options), size)


# --- trained files ---------------------------------------------------------------------------------------------------

NETS = {"full": FULL, "baseline": {}, "ics": {"stem": "ics"}, "cameras": {"side_info": 3}}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", NETS)
def test_a_trained_file_is_read_and_written_back_to_the_bit(name, prefix, tmp_path):
    module = net(**NETS[name])
    tensors = trained(module)
    found = read(save(tmp_path / "t.safetensors", {prefix + n: a for n, a in tensors.items()}), module)
    assert found.format.name == "transreid" and not any("left as initialized" in note for note in found.notes)
    params = found.variables["params"]
    np.testing.assert_array_equal(params["neck"]["classifier"]["kernel"], tensors["classifier.weight"].T)
    np.testing.assert_array_equal(
        found.variables["batch_stats"]["neck"]["bottleneck"]["var"], tensors["bottleneck.running_var"]
    )
    if name == "full":
        np.testing.assert_array_equal(params["local_block"]["mlp"]["fc1"]["kernel"], tensors["b2.0.mlp.fc1.weight"].T)
        np.testing.assert_array_equal(params["global_norm"]["bias"], tensors["b1.1.bias"])
        np.testing.assert_array_equal(params["neck_4"]["bottleneck"]["scale"], tensors["bottleneck_4.weight"])
        assert params["sie"].shape == (6, 1, 12)
    if name == "ics":
        np.testing.assert_array_equal(
            params["stem_norm2"]["instance"]["scale"], tensors["base.patch_embed.conv.4.IN.weight"]
        )
        mean = found.variables["batch_stats"]["stem_norm3"]["mean"]
        np.testing.assert_array_equal(mean, tensors["base.patch_embed.conv.7.running_mean"])

    again = str(tmp_path / "again.safetensors")
    after = jax.tree_util.tree_map(np.copy, found.variables)
    after["params"]["encoderblock_0"]["mlp"]["fc1"]["kernel"] += 1
    written = weights.write_back(found, again, found.variables, after, {})
    assert [n.removeprefix("base.") for n in written] == ["blocks.0.mlp.fc1.weight"]
    held = files.read(again).tensors
    assert held.keys() == found.source.tensors.keys()
    assert all(np.array_equal(held[n], a) for n, a in found.source.tensors.items() if n not in written)

    path = weights.write_new(module, found.variables, "transreid", str(tmp_path / "new"), {})
    assert same_bits(read(path, module, allow_fused=True).variables, found.variables)


def test_a_baseline_gives_the_feature_of_a_plain_vit(tmp_path):
    path = save(tmp_path / "t.safetensors", trained(net()))
    found, plain = read(path, net()), load(path, tiny(0), SIZE)
    assert plain.format.name == "transreid"
    x = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    feature = jax.jit(net().apply)(found.variables, x)
    assert np.ptp(feature) > 0.1
    np.testing.assert_allclose(feature, jax.jit(tiny(0).apply)(plain.variables, x), atol=1e-5)


def test_classifiers_of_other_identities_are_left_when_there_are_no_classes(tmp_path):
    path = save(tmp_path / "t.safetensors", trained(net(5, **FULL)))
    assert "neck_1" in read(path, net(0, **FULL)).variables["params"]
    wrong = net(6, **FULL)
    refused(path, wrong, "classifier_2.weight is (5, 12) in the file, (6, 12) in the model")
    allowed = read(path, wrong, allow=(r"params/neck.*/classifier/kernel",))
    assert (allowed.variables["params"]["neck"]["classifier"]["kernel"] == 0.25).all()


def test_a_shift_that_was_trained_is_refused(tmp_path):
    tensors = trained(net(**FULL))
    tensors["bottleneck_3.bias"][2] = 0.1
    path = save(tmp_path / "t.safetensors", tensors)
    refused(path, net(**FULL), "other than 0 in bottleneck_3.bias", "held at 0")


def test_files_of_other_options_are_refused_by_name(tmp_path):
    full = save(tmp_path / "full.safetensors", trained(net(**FULL)))
    bare = save(tmp_path / "bare.safetensors", trained(net(patch_stride=4)))
    refused(full, net(**{**FULL, "jigsaw": False}), "unexpected: ", "b1.0.attn.proj.bias", "(44 in all)")
    refused(full, net(**{**FULL, "side_info": 0}), "unexpected: \n    base.sie_embed")
    refused(full, net(**{**FULL, "side_info": 8}), "base.sie_embed is (6, 1, 12) in the file, (8, 1, 12) in the model")
    refused(full, net(**{**FULL, "depth": 3}), "missing: none", "unexpected: \n    base.norm.bias")
    refused(full, net(**{**FULL, "depth": 1}), "missing: none", "unexpected: \n    base.blocks.1.attn.proj.bias")
    refused(
        bare, net(**FULL), "bottleneck_1.running_mean (for batch_stats/neck_1/bottleneck/mean)", "b1.0.attn.proj.bias"
    )
    refused(
        bare, net(patch_stride=4, side_info=6), "missing: \n    base.sie_embed (for params/sie)\n  unexpected: none"
    )
    refused(bare, net(stem="ics"), "patch_embed.conv.0.weight (for params/stem_conv1/kernel)")
    with pytest.raises(CheckpointError, match="holds a TransReID in the format transreid"):
        load(full, tiny(0), SIZE)


def test_positions_of_another_image_size_need_the_grid(tmp_path):
    path = save(tmp_path / "t.safetensors", trained(net(**FULL)))
    other = net(size=(32, 16), **FULL)
    refused(path, other, "base.pos_embed is (1, 16, 12) in the file", "7×3", 'init_grid="(14, 14)"')
    found = read(path, other, grid=(3, 5))
    assert any("resized from 3×5 to 7×3 patches (bilinear)" in note for note in found.notes)


# --- pre-trained ViTs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FULL, {}], ids=["full", "baseline"])
def test_a_pre_trained_vit_is_enough_to_begin_with(options, tmp_path):
    tensors = pre_trained(patch_stride=options.get("patch_stride"))
    found = read(save(tmp_path / "jx_vit.safetensors", tensors), net(**options))
    assert found.format.name == "timm"
    (note,) = [n for n in found.notes if "left as initialized" in n]
    names = {"neck", *(("neck_1", "neck_2", "neck_3", "neck_4", "sie") if options else ())}
    assert set(note.split(": ")[1].split(", ")) == names
    params = found.variables["params"]
    last = tensors["blocks.1.mlp.fc2.weight"].T
    for name in ("global_block", "local_block") if options else ("encoderblock_1",):
        np.testing.assert_array_equal(params[name]["mlp"]["fc2"]["kernel"], last)
    for name in ("global_norm", "local_norm") if options else ("norm",):
        np.testing.assert_array_equal(params[name]["bias"], tensors["norm.bias"])
    assert (params["neck"]["classifier"]["kernel"] == 0.25).all() and ("sie" in params) == bool(options)

    left = {n: a for n, a in tensors.items() if n != "blocks.0.norm1.bias"}
    refused(
        save(tmp_path / "less.safetensors", left),
        net(**options),
        "blocks.0.norm1.bias (for params/encoderblock_0/norm1",
    )


def test_copies_that_have_gone_apart_are_not_written_as_one_block(tmp_path):
    module = net(**FULL)
    found = read(save(tmp_path / "jx_vit.safetensors", pre_trained(patch_stride=4)), module)
    after = jax.tree_util.tree_map(np.copy, found.variables)
    after["params"]["local_block"]["mlp"]["fc1"]["kernel"] += 1
    with pytest.raises(CheckpointError, match=r"are one tensor in this format \(blocks.1.mlp.fc1.weight\)"):
        weights.write_new(module, after, "timm", str(tmp_path / "new"), {})


@pytest.mark.parametrize("options", [{}, {"stem": "ics"}], ids=["patches", "ics"])
def test_the_teacher_of_transreid_ssl_with_and_without_its_stem(options, tmp_path):
    size = (256, 128)
    module = net(size=size, **{**options, "patch_size": 16, "depth": 1})
    shapes = foreign_shapes(TRANSREID_SSL_TRUNK, module, size)
    rng = np.random.default_rng(0)
    trunk = {n: rng.uniform(0.1, 1, s).astype(np.float32) for n, s in shapes.items() if n.split(".")[0] not in HEADS}
    assert ("patch_embed.conv.4.IN.weight" in trunk) == bool(options)
    tensors = {f"teacher.backbone.{n}": a for n, a in trunk.items()}
    tensors |= {f"student.module.backbone.{n}": a + 1 for n, a in trunk.items()}
    tensors |= {
        "teacher.head.mlp.0.weight": np.ones((3, 12), np.float32),
        "teacher.head.last_layer.weight_g": np.ones(2),
    }
    path = save(tmp_path / "dino.safetensors", tensors)
    found = read(path, module)
    assert found.format.name == "transreid_ssl"
    np.testing.assert_array_equal(found.variables["params"]["norm"]["bias"], trunk["norm.bias"])
    (note,) = [n for n in found.notes if "left as initialized" in n]
    assert "stem" not in note

    taller = net(size=(384, 128), **{**options, "patch_size": 16, "depth": 1})
    assert any("16×8 to 24×8 patches (bilinear)" in note for note in read(path, taller).notes)
    other = net(size=size, **{"patch_size": 16, "depth": 1, **({} if options else {"stem": "ics"})})
    refused(path, other, "patch_embed.conv.1.BN.weight")


HEADS = ("bottleneck", "classifier")


def test_a_distilled_deit_is_refused(tmp_path):
    tensors = pre_trained() | {"dist_token": np.ones((1, 1, 12), np.float32)}
    refused(save(tmp_path / "deit.safetensors", tensors), net(), "dist_token", "Take the plain DeiT")
