"""Published weights of CLIP, CLIP-ReID and the ResNet baselines: what is read, what is left, what is refused."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from drep_jax import weights
from drep_jax.models import create_model
from drep_jax.weights.formats.clip_reid import CLIP, CLIP_REID
from drep_jax.weights.formats.resnet_reid import FAST_REID, STRONG_BASELINE, TORCHVISION_REID
from drep_jax.weights.positions import bilinear_weights
from tests import foreign_files
from tests.command import same_bits
from tests.foreign_files import save

CLIP_OPTIONS = {"patch_size": 16, "width": 8, "depth": 2, "num_heads": 2, "projection": 6}
RESNET_OPTIONS = {"stage_sizes": (1, 1), "block": "basic", "width": 4}
SIZE = (64, 32)


def clip(num_classes=3, **options):
    return create_model("clip_reid", num_classes=num_classes, image_size=SIZE, **{**CLIP_OPTIONS, **options})


def resnet(num_classes=3, **options):
    return create_model("resnet_reid", num_classes=num_classes, image_size=SIZE, **{**RESNET_OPTIONS, **options})


def abstract(module):
    channels = 4 if getattr(module, "side_info", 0) else 3
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *SIZE, channels), np.float32))


def theirs(fmt, module):
    return foreign_files.theirs(fmt, module, abstract(module))


def load(path, module, **options):
    return foreign_files.load(path, module, abstract(module), **options)


def refused(path, module, *parts, **options):
    foreign_files.refused(path, module, abstract(module), *parts, **options)


CLIP_REID_REST = {
    "bottleneck.bias": np.zeros(8, np.float32),
    "bottleneck_proj.bias": np.zeros(6, np.float32),
    "bottleneck.num_batches_tracked": np.int64(9),
    "text_encoder.ln_final.weight": np.ones(4, np.float32),
    "text_encoder.positional_embedding": np.ones((7, 4), np.float32),
    "prompt_learner.cls_ctx": np.ones((3, 4, 4), np.float32),
}


def test_clip_reid_is_read_and_written_back_to_the_bit(tmp_path):
    module = clip(side_info=2)
    variables, tensors = theirs(CLIP_REID, module)
    assert tensors["image_encoder.positional_embedding"].shape == (9, 8) and tensors["cv_embed"].shape == (2, 8)
    assert tensors["image_encoder.class_embedding"].shape == (8,) and tensors["image_encoder.proj"].shape == (8, 6)
    path = save(tmp_path / "a.safetensors", {**tensors, **CLIP_REID_REST})
    found = load(path, module)
    assert found.format is CLIP_REID and same_bits(found.variables, variables)
    after = jax.tree.map(np.copy, found.variables)
    after["params"]["encoderblock_1"]["attn"]["key"]["kernel"] += 1
    changed = weights.write_back(found, str(tmp_path / "b.safetensors"), found.variables, after, {})
    assert changed == ("image_encoder.transformer.resblocks.1.attn.in_proj_weight",)
    again = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert again.keys() == {**tensors, **CLIP_REID_REST}.keys()
    np.testing.assert_array_equal(again["text_encoder.ln_final.weight"], 1)
    np.testing.assert_array_equal(again[changed[0]][8:16], tensors[changed[0]][8:16] + 1)


def test_what_a_clip_reid_file_may_and_may_not_be(tmp_path):
    _, tensors = theirs(CLIP_REID, clip())
    path = save(tmp_path / "a.safetensors", {**tensors, **CLIP_REID_REST})
    load(path, clip(0))  # without classifiers theirs are left
    refused(path, clip(4), "classifier.weight is (3, 8) in the file, (4, 8) in the model", "init_allow")
    found = load(path, clip(4), allow=(r"classifier.*",))
    np.testing.assert_array_equal(found.variables["params"]["neck"]["classifier"]["kernel"], 7)
    refused(path, clip(side_info=2), "cv_embed (for params/sie)")
    shifted = {**tensors, **CLIP_REID_REST, "bottleneck.bias": np.full(8, 0.1, np.float32)}
    refused(save(tmp_path / "b.safetensors", shifted), clip(), "bottleneck.bias", "shift is held at 0")
    _, with_cameras = theirs(CLIP_REID, clip(side_info=2))
    refused(save(tmp_path / "c.safetensors", {**with_cameras, **CLIP_REID_REST}), clip(), "unexpected: \n    cv_embed")


def test_openai_clip_gives_the_encoder_and_its_square_of_positions(tmp_path):
    module = clip(side_info=2)
    variables, tensors = theirs(CLIP, module)
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    square = np.random.default_rng(1).normal(size=(197, 8)).astype(np.float16)
    state |= {
        "visual.positional_embedding": square,
        "positional_embedding": np.ones((7, 4), np.float32),
        "transformer.resblocks.0.attn.in_proj_weight": np.ones((12, 4), np.float32),
        "token_embedding.weight": np.ones((9, 4), np.float32),
        "logit_scale": np.float32(4),
        "context_length": np.int64(77),
    }
    found = load(save(tmp_path / "clip.safetensors", state), module)
    assert found.format is CLIP
    params = found.variables["params"]
    assert same_bits(params["encoderblock_0"], variables["params"]["encoderblock_0"])
    expected = np.einsum(
        "ih,jw,hwd->ijd", bilinear_weights(14, 4), bilinear_weights(14, 2), square[1:].astype(float).reshape(14, 14, 8)
    )
    np.testing.assert_allclose(params["pos_embedding"][0, 1:], expected.reshape(8, 8), rtol=1e-6)
    np.testing.assert_array_equal(params["pos_embedding"][0, 0], square[0].astype(np.float32))
    fresh = [note for note in found.notes if "left as initialized" in note]
    assert len(fresh) == 1 and "neck" in fresh[0]
    assert {float(params[name].ravel()[0]) for name in ("sie",)} == {7.0}
    notes = "\n".join(found.notes)
    assert "resized from 14×14 to 4×2 patches (bilinear)" in notes


@pytest.mark.parametrize(
    ("fmt", "prefix", "bias"),
    [(STRONG_BASELINE, "base.", "bottleneck.bias"), (FAST_REID, "backbone.", "heads.bottleneck.0.bias")],
)
def test_baselines_are_read_by_networks_of_their_stem_only(fmt, prefix, bias, tmp_path):
    module = resnet(stem=fmt.name)
    variables, tensors = theirs(fmt, module)
    assert f"{prefix}layer2.0.downsample.1.running_var" in tensors
    path = save(tmp_path / "a.safetensors", {**tensors, bias: np.zeros(8, np.float32)})
    found = load(path, module)
    assert found.format is fmt and same_bits(found.variables, variables)
    new = weights.write_new(module, variables, fmt.name, str(tmp_path / "new"), {})
    assert weights.names_of(load(new, module).variables).keys() == weights.names_of(variables).keys()
    load(path, resnet(0, stem=fmt.name))
    refused(path, resnet(), f"set --config.model.stem={fmt.name}")
    both = load(path, resnet(stem=fmt.name, branches=2)).variables["params"]
    assert same_bits(both["same_layer2_0"], both["different_layer2_0"])
    shifted = {**tensors, bias: np.full(8, 0.1, np.float32)}
    refused(save(tmp_path / "b.safetensors", shifted), module, "bias", "shift is held at 0")


def test_older_names_of_fast_reid_are_known_and_its_variants_named(tmp_path):
    module = resnet(stem="fast_reid")
    variables, tensors = theirs(FAST_REID, module)
    old = {
        n.replace("heads.bottleneck.0.", "heads.bnneck.").replace("heads.weight", "heads.classifier.weight"): tensor
        for n, tensor in tensors.items()
    }
    old |= {"heads.bnneck.bias": np.zeros(8, np.float32), "pixel_mean": np.ones((1, 3, 1, 1), np.float32)}
    assert same_bits(load(save(tmp_path / "a.safetensors", old), module).variables, variables)
    for name, reason in (("layer1.0.bn1.IN.weight", "IBN"), ("NL_2.0.g.weight", "non-local")):
        more = {**tensors, f"backbone.{name}": np.ones(2, np.float32)}
        refused(save(tmp_path / "b.safetensors", more), module, reason)


@pytest.mark.parametrize("branches", [1, 2])
def test_torchvisions_resnet_gives_the_trunk(branches, tmp_path):
    _, tensors = theirs(TORCHVISION_REID, resnet())
    state = {name: t for name, t in tensors.items() if not name.startswith(("bottleneck", "classifier"))}
    state |= {"fc.weight": np.ones((10, 8), np.float32), "fc.bias": np.ones(10, np.float32)}
    found = load(save(tmp_path / "a.safetensors", state), resnet(branches=branches))
    assert found.format is TORCHVISION_REID
    params = found.variables["params"]
    prefixes = ("same_", "different_") if branches == 2 else ("",)
    for prefix in prefixes:
        kernel = params[f"{prefix}layer2_0"]["conv1"]["kernel"]
        np.testing.assert_array_equal(kernel, state["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    necks = [name for name in params if name.startswith("neck")]
    assert len(necks) == branches and all(params[n]["classifier"]["kernel"].ravel()[0] == 7 for n in necks)
    assert any("left as initialized" in note for note in found.notes)
