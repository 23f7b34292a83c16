"""Formats of ViTs and ResNets: timm's outputs, a Flax ViT with Google's names, round trips, and what is refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from drep_jax import weights
from drep_jax.errors import CheckpointError
from drep_jax.models import create_model
from drep_jax.weights import files
from drep_jax.weights.formats.dinov2 import DINOV2
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.formats.torchvision_resnet import TORCHVISION_RESNET
from drep_jax.weights.formats.vision_transformer import BIG_VISION, VISION_TRANSFORMER
from tests.command import same_bits
from tests.named_weights import named_weights
from tests.weights.vit_cases import CASES, COMMON, GOLDEN, SIZE, foreign_weights, images, load, save, tiny


def refused(path, module, *texts, size=SIZE, **options):
    with pytest.raises(CheckpointError) as error:
        load(path, module, size, **options)
    for text in texts:
        assert text in str(error.value), str(error.value)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_timm(name, tmp_path):
    module = tiny(**CASES[name][0])
    found = load(save(tmp_path / "net.safetensors", foreign_weights(TIMM_VIT, module)), module)
    assert found.format.name == "timm"
    logits = jax.jit(module.apply)(found.variables, images())
    np.testing.assert_allclose(logits, GOLDEN[name], atol=2e-5)


def test_layer_scales_of_deit3_have_another_name(tmp_path):
    module = tiny(layer_scale=True, position_class_token=False)
    tensors = foreign_weights(TIMM_VIT, module)
    old = {re.sub(r"\.ls([12])\.gamma", r".gamma_\1", name): tensor for name, tensor in tensors.items()}
    assert "blocks.1.gamma_2" in old
    expected = load(save(tmp_path / "new.safetensors", tensors), module)
    assert same_bits(load(save(tmp_path / "old.safetensors", old), module).variables, expected.variables)


# --- round trips -----------------------------------------------------------------------------------------------------

RESNET = {"stage_sizes": (1, 1), "block": "bottleneck", "width": 4}
CIFAR = {"stage_sizes": (1, 1), "block": "basic", "width": 4, "stem": "cifar", "shortcut": "pad"}
POST_NORM = {"post_norm": True, "activation": "relu", "norm_eps": 1e-5}
ROUND_TRIPS = [
    ("timm", "vit", {"pool": "mean", "registers": 2, "position_class_token": False, "layer_scale": True}),
    ("dinov2", "vit", {"registers": 2, "layer_scale": True}),
    ("transreid_ssl", "vit", {"patch_stride": 4}),
    ("vision_transformer", "vit", {"pre_logits": True}),
    ("big_vision", "vit", {"pool": "gap", "class_token": False, "positions": "sincos2d", "pre_logits": True}),
    ("torch_encoder", "vit", POST_NORM),
    ("torchvision", "resnet", RESNET),
    ("timm", "resnet", RESNET),
    ("cifar_resnet", "resnet", CIFAR),
]


@pytest.mark.parametrize(("name", "family", "options"), ROUND_TRIPS, ids=[f"{n}-{f}" for n, f, _ in ROUND_TRIPS])
def test_a_new_file_reads_back_to_the_bit(name, family, options, tmp_path):
    if family == "vit":
        options = {**COMMON, **options}
    module = create_model(family, num_classes=5, image_size=SIZE, **options)
    shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), images()), sep="/")
    variables = unflatten_dict(named_weights({path: leaf.shape for path, leaf in shapes.items()}), sep="/")
    path = weights.write_new(module, variables, name, str(tmp_path / "net"), {})
    found = load(path, module, format_name=name, allow_fused=True)
    assert same_bits(found.variables, variables)
    assert weights.write_back(found, f"{tmp_path}/again.{path.rpartition('.')[2]}", variables, variables, {}) == ()


# --- Google ----------------------------------------------------------------------------------------------------------


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(24)(x))
        return nn.Dense(x.shape[-1])(y)


class FlaxBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=3)(nn.LayerNorm()(x))
        return x + MlpBlock()(nn.LayerNorm()(x))


class FlaxEncoder(nn.Module):
    token_first: bool

    @nn.compact
    def __call__(self, x):
        if self.token_first:
            x = x + Added(name="posembed_input")(x.shape[1])
        for i in range(2):
            x = FlaxBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Added(nn.Module):
    @nn.compact
    def __call__(self, count):
        return self.param("pos_embedding", nn.initializers.normal(0.5), (1, count, 12))


class FlaxViT(nn.Module):
    """A ViT of Flax's own layers; `token_first`: with positions and pooling of vision_transformer, else big_vision's."""

    token_first: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (8, 8), (8, 8), "VALID", name="embedding")(x).reshape(len(x), -1, 12)
        if self.token_first:
            cls = self.param("cls", nn.initializers.normal(0.5), (1, 1, 12))
            x = jnp.concatenate([jnp.tile(cls, [len(x), 1, 1]), x], axis=1)
        else:
            x = x + self.param("pos_embedding", nn.initializers.normal(0.5), (1, x.shape[1], 12))
        x = FlaxEncoder(self.token_first, name="Transformer")(x)
        x = x[:, 0] if self.token_first else x.mean(1)
        return nn.Dense(5, name="head")(nn.tanh(nn.Dense(12, name="pre_logits")(x)))


GOOGLE = {
    "vision_transformer": {"pre_logits": True, "activation": "gelu_tanh"},
    "big_vision": {"pre_logits": True, "activation": "gelu_tanh", "pool": "gap", "class_token": False},
}
NUMBERED_ON = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "LayerNorm_1": "LayerNorm_2"}
NUMBERED_ON["MlpBlock_0"] = "MlpBlock_3"


@pytest.fixture(scope="module", params=GOOGLE)
def google(request):
    """(format, our module, tensors by the names that Flax gives, logits of the Flax network)."""
    net = FlaxViT(request.param == "vision_transformer")
    shapes = flatten_dict(jax.eval_shape(net.init, jax.random.key(0), images()), sep="/")
    drawn = named_weights({name: leaf.shape for name, leaf in shapes.items()}, spread=0.5)
    logits = jax.jit(net.apply)(unflatten_dict(drawn, sep="/"), images())
    tensors = {name.removeprefix("params/"): array for name, array in drawn.items()}
    return request.param, tiny(**GOOGLE[request.param]), tensors, logits


def test_outputs_are_those_of_flax(google, tmp_path):
    name, module, tensors, expected = google
    found = load(save(tmp_path / "net.npz", tensors), module)
    assert found.format.name == name
    logits = jax.jit(module.apply)(found.variables, images())
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/"])
@pytest.mark.parametrize("numbered_on", [False, True])
def test_all_numberings_and_prefixes_are_the_same_network(google, prefix, numbered_on, tmp_path):
    _, module, tensors, _ = google
    expected = load(save(tmp_path / "plain.npz", tensors), module).variables

    def renamed(name):
        parts = [NUMBERED_ON.get(part, part) if numbered_on else part for part in name.split("/")]
        return prefix + "/".join(parts)

    others = {"params/txt/head/kernel": np.ones(3)} if prefix == "params/img/" else {}
    path = save(tmp_path / "other.npz", {**{renamed(name): array for name, array in tensors.items()}, **others})
    found = load(path, module)
    assert same_bits(found.variables, expected)
    after = jax.tree_util.tree_map(np.copy, expected)
    after["params"]["encoderblock_1"]["attn"]["out"]["kernel"] *= 2
    (changed,) = weights.write_back(found, str(tmp_path / "fused.npz"), expected, after, {})
    assert changed == renamed("Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out/kernel")
    assert same_bits(load(tmp_path / "fused.npz", module, allow_fused=True).variables, after)


def test_positions_lay_elsewhere_in_older_files_of_big_vision(tmp_path):
    module = tiny(position_class_token=False)
    tensors = foreign_weights(BIG_VISION, module)
    expected = load(save(tmp_path / "new.npz", tensors), module).variables
    old = {name.replace("params/pos_", "params/Transformer/pos_"): array for name, array in tensors.items()}
    assert "params/Transformer/pos_embedding" in old
    assert same_bits(load(save(tmp_path / "old.npz", old), module).variables, expected)


def test_another_number_of_heads_does_not_pass_for_a_reshape(tmp_path):
    path = save(tmp_path / "net.npz", foreign_weights(VISION_TRANSFORMER, tiny(num_heads=4)))
    refused(path, tiny(num_heads=3), "attn/query/kernel", "is (12, 4, 3) in the file, (12, 3, 4) in the model")


def test_pre_logits_are_not_dropped_silently(tmp_path):
    path = save(tmp_path / "net.npz", foreign_weights(VISION_TRANSFORMER, tiny(pre_logits=True)))
    refused(path, tiny(), "unexpected: \n    pre_logits/bias\n    pre_logits/kernel")


# --- DINOv2 and TransReID-SSL ----------------------------------------------------------------------------------------

DINO_OPTIONS = {"layer_scale": True, "registers": 2, "depth": 4}


def test_blocks_of_dinov2_may_lie_in_chunks(tmp_path):
    module = tiny(0, **DINO_OPTIONS)
    plain = foreign_weights(DINOV2, module) | {"mask_token": np.zeros((1, 12), np.float32)}
    chunked = {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", n): a for n, a in plain.items()}
    assert "blocks.1.3.attn.qkv.weight" in chunked and "register_tokens" in chunked
    expected = load(save(tmp_path / "plain.safetensors", plain), module)
    found = load(save(tmp_path / "chunked.safetensors", chunked), module)
    assert expected.format.name == found.format.name == "dinov2"
    assert same_bits(found.variables, expected.variables)
    after = jax.tree_util.tree_map(np.copy, found.variables)
    after["params"]["encoderblock_3"]["attn"]["key"]["kernel"] += 1
    fused = str(tmp_path / "fused.safetensors")
    assert weights.write_back(found, fused, found.variables, after, {}) == ("blocks.1.3.attn.qkv.weight",)
    assert files.read(fused).tensors.keys() == chunked.keys()


def test_the_teacher_of_transreid_ssl_is_read_without_its_head(tmp_path):
    module = tiny(0)
    teacher = foreign_weights(TIMM_VIT, module)
    head = {"mlp.0.weight": 3, "mlp.0.bias": 1, "last_layer.weight_g": 2, "last_layer.weight_v": 2}
    tensors = {f"teacher.backbone.{name}": array for name, array in teacher.items()}
    tensors |= {f"student.module.backbone.{name}": array + 1 for name, array in teacher.items()}
    tensors |= {f"teacher.head.{name}": np.ones(size, np.float32) for name, size in head.items()}
    found = load(save(tmp_path / "net.safetensors", tensors), module)
    assert found.format.name == "transreid_ssl"
    plain = load(save(tmp_path / "plain.safetensors", teacher), module)
    assert plain.format.name == "timm" and same_bits(found.variables, plain.variables)


def test_a_trained_transreid_is_read_without_its_classifier(tmp_path):
    module = tiny(0)
    plain = foreign_weights(TIMM_VIT, module)
    head = ("base.fc.weight", "classifier.weight", "bottleneck.weight", "bottleneck.bias", "bottleneck.running_mean")
    tensors = {f"base.{name}": array for name, array in plain.items()} | dict.fromkeys(head, np.ones(3, np.float32))
    found = load(save(tmp_path / "net.safetensors", tensors), module)
    assert found.format.name == "transreid"
    assert same_bits(found.variables, load(save(tmp_path / "plain.safetensors", plain), module).variables)
    tensors["base.sie_embed"] = np.ones((6, 1, 12), np.float32)
    refused(save(tmp_path / "sie.safetensors", tensors), module, "sie_embed", "cameras and viewpoints")


def test_the_convolutional_stem_of_transreid_ssl_is_named(tmp_path):
    tensors = foreign_weights(TIMM_VIT, tiny(0)) | {"patch_embed.conv.0.weight": np.ones((4, 3, 7, 7), np.float32)}
    path = save(tmp_path / "net.safetensors", tensors)
    refused(path, tiny(0), "patch_embed.conv.0.weight", "ICS", "which this ViT has not")


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_larger_variant_is_listed_side_by_side(tmp_path):
    path = save(tmp_path / "net.safetensors", foreign_weights(TIMM_VIT, tiny(width=24, depth=3, mlp_dim=48)))
    refused(
        path,
        tiny(),
        "blocks.0.attn.qkv.weight is (72, 24) in the file, (36, 12) in the model (params/encoderblock_0/attn/query/kernel)",
        "cls_token is (1, 1, 24) in the file, (1, 1, 12) in the model (params/cls)",
        "unexpected: \n    blocks.2.attn.proj.bias",
    )


def test_a_head_of_another_size_or_none_is_listed_and_may_be_allowed(tmp_path):
    path = save(tmp_path / "net.safetensors", foreign_weights(TIMM_VIT, tiny(5)))
    refused(path, tiny(3), "head.weight is (5, 12) in the file, (3, 12) in the model", "init_allow")
    refused(path, tiny(0), "unexpected: \n    head.bias\n    head.weight")
    found = load(path, tiny(0), allow=(r"head\..*",))
    assert "in the file, but not in the model: head.bias; head.weight" in found.notes


def test_a_file_of_another_family_is_told_what_it_is(tmp_path):
    resnet = create_model("resnet", num_classes=5, image_size=SIZE, **RESNET)
    for fmt, own, other, said in (
        (TIMM_VIT, tiny(), resnet, "It holds a ViT in the format timm"),
        (TORCHVISION_RESNET, resnet, tiny(), "It holds a ResNet in the format torchvision"),
    ):
        path = save(tmp_path / f"{fmt.name}.safetensors", foreign_weights(fmt, own))
        refused(path, other, said, "choose a model of that family")
    save(tmp_path / "odd.safetensors", {"w": np.ones(3, np.float32)})
    refused(tmp_path / "odd.safetensors", tiny(), "(big_vision, dinov2, timm", "Its first names are: w")


def test_what_a_format_has_no_name_for_is_refused(tmp_path):
    module = tiny(pre_logits=True)
    path = save(tmp_path / "net.safetensors", foreign_weights(TIMM_VIT, tiny()))
    refused(path, module, 'Format "timm" cannot express', "params/pre_logits/kernel")
