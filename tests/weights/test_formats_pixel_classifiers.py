"""FCNs and SegFormers as files: names of the public checkpoints, both ways, encoders alone, what is refused."""

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.models import create_model
from drep_jax.weights import files
from drep_jax.weights.formats import fcn, segformer
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces
from tests import foreign_files
from tests.command import same_bits
from tests.foreign_files import save
from tests.pixel_classifiers import abstract, tiny

FORMATS = {
    "mmseg fcn": (fcn.MMSEG_FCN, lambda **o: tiny("fcn", **o)),
    "torchvision fcn": (fcn.TORCHVISION_FCN, lambda **o: tiny("fcn", implementation="torchvision", **o)),
    "mmseg segformer": (segformer.MMSEG_SEGFORMER, lambda **o: tiny("segformer", **o)),
    "nvlabs segformer": (segformer.NVLABS_SEGFORMER, lambda **o: tiny("segformer", implementation="nvlabs", **o)),
    "transformers segformer": (
        segformer.TRANSFORMERS_SEGFORMER,
        lambda **o: tiny("segformer", implementation="transformers", **o),
    ),
}
# What the public files have beside what the networks read.
BESIDE = {
    "mmseg fcn": {"decode_head.convs.0.bn.num_batches_tracked": np.int64(9)},
    "torchvision fcn": {"backbone.bn1.num_batches_tracked": np.int64(9)},
    "mmseg segformer": {"decode_head.convs.3.bn.num_batches_tracked": np.int64(9)},
    "nvlabs segformer": {
        "decode_head.conv_seg.weight": np.random.default_rng(4).normal(size=(5, 128, 1, 1)).astype(np.float32),
        "decode_head.conv_seg.bias": np.float32([1, 2, 3, 4, 5]),
    },
    "transformers segformer": {"decode_head.batch_norm.num_batches_tracked": np.int64(9)},
}


def theirs(fmt, module):
    return foreign_files.theirs(fmt, module, abstract(module))


def load(path, module, **options):
    return foreign_files.load(path, module, abstract(module), **options)


def refused(path, module, *parts, **options):
    foreign_files.refused(path, module, abstract(module), *parts, **options)


# Names and shapes as the public files have them, written out by hand for the tiny networks of tests/pixel_classifiers.py:
# width 4 (FCN: last stage 128, third 64), stages 4, 6, 8, 12 and a head of 8 channels (SegFormer).
HAND = {
    "mmseg fcn": {
        "backbone.stem.0.weight": (2, 3, 3, 3),
        "backbone.stem.4.running_var": (2,),
        "backbone.stem.6.weight": (4, 2, 3, 3),
        "backbone.layer1.0.downsample.0.weight": (16, 4, 1, 1),
        "backbone.layer3.1.conv2.weight": (16, 16, 3, 3),
        "backbone.layer4.0.bn3.running_mean": (128,),
        "decode_head.convs.0.conv.weight": (32, 128, 3, 3),
        "decode_head.convs.1.bn.weight": (32,),
        "decode_head.conv_cat.conv.weight": (32, 160, 3, 3),
        "decode_head.conv_cat.bn.bias": (32,),
        "decode_head.conv_seg.weight": (5, 32, 1, 1),
        "auxiliary_head.convs.0.conv.weight": (16, 64, 3, 3),
        "auxiliary_head.convs.0.bn.running_var": (16,),
        "auxiliary_head.conv_seg.bias": (5,),
    },
    "torchvision fcn": {
        "backbone.conv1.weight": (4, 3, 7, 7),
        "backbone.layer4.0.downsample.1.weight": (128,),
        "classifier.0.weight": (32, 128, 3, 3),
        "classifier.1.running_mean": (32,),
        "classifier.4.weight": (5, 32, 1, 1),
        "aux_classifier.0.weight": (16, 64, 3, 3),
        "aux_classifier.4.bias": (5,),
    },
    "mmseg segformer": {
        "backbone.layers.0.0.projection.weight": (4, 3, 7, 7),
        "backbone.layers.1.0.norm.weight": (6,),
        "backbone.layers.1.1.0.norm2.bias": (6,),
        "backbone.layers.1.1.0.attn.attn.in_proj_weight": (18, 6),
        "backbone.layers.1.1.0.attn.attn.in_proj_bias": (18,),
        "backbone.layers.1.1.0.attn.attn.out_proj.weight": (6, 6),
        "backbone.layers.1.1.0.attn.sr.weight": (6, 6, 4, 4),
        "backbone.layers.1.1.0.attn.norm.weight": (6,),
        "backbone.layers.1.1.0.ffn.layers.0.weight": (12, 6, 1, 1),
        "backbone.layers.1.1.0.ffn.layers.1.weight": (12, 1, 3, 3),
        "backbone.layers.1.1.0.ffn.layers.4.bias": (6,),
        "backbone.layers.3.2.weight": (12,),
        "decode_head.convs.3.conv.weight": (8, 12, 1, 1),
        "decode_head.convs.3.bn.running_mean": (8,),
        "decode_head.fusion_conv.conv.weight": (8, 32, 1, 1),
        "decode_head.fusion_conv.bn.weight": (8,),
        "decode_head.conv_seg.weight": (5, 8, 1, 1),
    },
    "nvlabs segformer": {
        "backbone.patch_embed1.proj.weight": (4, 3, 7, 7),
        "backbone.patch_embed2.norm.bias": (6,),
        "backbone.block2.0.norm1.weight": (6,),
        "backbone.block2.0.attn.q.weight": (6, 6),
        "backbone.block2.0.attn.kv.weight": (12, 6),
        "backbone.block2.0.attn.proj.bias": (6,),
        "backbone.block2.0.attn.sr.weight": (6, 6, 4, 4),
        "backbone.block2.0.attn.norm.weight": (6,),
        "backbone.block2.0.mlp.fc1.weight": (12, 6),
        "backbone.block2.0.mlp.dwconv.dwconv.weight": (12, 1, 3, 3),
        "backbone.norm4.weight": (12,),
        "decode_head.linear_c4.proj.weight": (8, 12),
        "decode_head.linear_fuse.conv.weight": (8, 32, 1, 1),
        "decode_head.linear_fuse.bn.running_var": (8,),
        "decode_head.linear_pred.weight": (5, 8, 1, 1),
    },
    "transformers segformer": {
        "segformer.encoder.patch_embeddings.0.proj.weight": (4, 3, 7, 7),
        "segformer.encoder.patch_embeddings.1.layer_norm.weight": (6,),
        "segformer.encoder.block.1.0.layer_norm_1.weight": (6,),
        "segformer.encoder.block.1.0.attention.self.query.weight": (6, 6),
        "segformer.encoder.block.1.0.attention.self.value.bias": (6,),
        "segformer.encoder.block.1.0.attention.output.dense.weight": (6, 6),
        "segformer.encoder.block.1.0.attention.self.sr.weight": (6, 6, 4, 4),
        "segformer.encoder.block.1.0.attention.self.layer_norm.bias": (6,),
        "segformer.encoder.block.1.0.mlp.dense1.weight": (12, 6),
        "segformer.encoder.block.1.0.mlp.dwconv.dwconv.weight": (12, 1, 3, 3),
        "segformer.encoder.layer_norm.3.weight": (12,),
        "decode_head.linear_c.3.proj.weight": (8, 12),
        "decode_head.linear_fuse.weight": (8, 32, 1, 1),
        "decode_head.batch_norm.running_mean": (8,),
        "decode_head.classifier.weight": (5, 8, 1, 1),
    },
}
# Tensors of the public files, without the counters of the batch norms.
COUNTS = {
    "mmseg fcn": ("fcn_r50", 358 - 59),
    "mmseg segformer": ("segformer_b0", 192 - 5),
    "nvlabs segformer": ("segformer_b0", 176 + 15),
    "transformers segformer": ("segformer_b0", 208 - 1),
}


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_shapes_are_those_of_the_public_files(name):
    fmt, make = FORMATS[name]
    shapes = {key: tensor.shape for key, tensor in theirs(fmt, make())[1].items()}
    assert {key: shapes.get(key) for key in HAND[name]} == HAND[name]


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_tensors_is_that_of_the_public_files(name):
    fmt, (model, count) = FORMATS[name][0], COUNTS[name]
    options = {"implementation": fmt.name} if "segformer" in name else {}
    module = create_model(model, num_classes=150, image_size=(64, 64), **options)
    shapes = {key: leaf.shape for key, leaf in names_of(abstract(module)).items()}
    assert len({piece.theirs for piece in find_pieces(fmt, module, shapes)}) == count


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_recognized_read_and_written_back_to_the_bit(name, tmp_path):
    fmt, make = FORMATS[name]
    module = make()
    variables, tensors = theirs(fmt, module)
    tensors |= BESIDE[name]
    path = save(tmp_path / "a.safetensors", tensors)
    found = load(path, module)
    assert found.format is fmt and same_bits(found.variables, variables)
    after = jax.tree.map(np.copy, found.variables)
    layer, leaf = ("decode_head", "conv1") if "fcn" in name else ("block2_0", "attn")
    target = after["params"][layer][leaf] if "fcn" in name else after["params"][layer][leaf]["value"]
    target["kernel"] += 1
    weights.write_back(found, str(tmp_path / "b.safetensors"), found.variables, after, {})
    again = files.read(str(tmp_path / "b.safetensors"))
    changed = [key for key, array in again.tensors.items() if array.tobytes() != found.source.tensors[key].tobytes()]
    assert len(changed) == 1 and again.tensors.keys() == found.source.tensors.keys()
    assert same_bits(load(str(tmp_path / "b.safetensors"), module, allow_fused=True).variables, after)


def test_rows_of_a_packed_projection_are_layers_of_their_own():
    for name, tensor, order in (("mmseg", "in_proj_weight", 3), ("nvlabs", "kv.weight", 2)):
        fmt, make = FORMATS[f"{name} segformer"]
        variables, tensors = theirs(fmt, make())
        [packed] = [array for key, array in tensors.items() if key.endswith(tensor) and array.shape == (order * 6, 6)]
        layers = variables["params"]["block2_0"]["attn"]
        rows = [layers[part]["kernel"].T for part in ("query", "key", "value")][-order:]
        np.testing.assert_array_equal(packed, np.concatenate(rows))


def test_stages_lie_in_the_fusing_layer_as_the_public_heads_order_them():
    for name, key, order in (
        ("mmseg", "decode_head.fusion_conv.conv.weight", (1, 2, 3, 4)),
        ("nvlabs", "decode_head.linear_fuse.conv.weight", (4, 3, 2, 1)),
        ("transformers", "decode_head.linear_fuse.weight", (4, 3, 2, 1)),
    ):
        fmt, make = FORMATS[f"{name} segformer"]
        variables, tensors = theirs(fmt, make())
        head = variables["params"]["decode_head"]
        expected = np.concatenate([head[f"fuse{i}"]["kernel"] for i in order])
        np.testing.assert_array_equal(tensors[key][:, :, 0, 0].T, expected)


RENAMED = {
    "patch_embeddings.1.": "stages.1.patch_embeddings.",
    "block.1.0.layer_norm_1": "stages.1.blocks.0.layernorm_before",
    "block.1.0.layer_norm_2": "stages.1.blocks.0.layernorm_after",
    "block.1.0.attention.self.query": "stages.1.blocks.0.attention.q_proj",
    "block.1.0.attention.self.key": "stages.1.blocks.0.attention.k_proj",
    "block.1.0.attention.self.value": "stages.1.blocks.0.attention.v_proj",
    "block.1.0.attention.output.dense": "stages.1.blocks.0.attention.o_proj",
    "block.1.0.attention.self.sr": "stages.1.blocks.0.attention.sequence_reduction.sequence_reduction",
    "block.1.0.attention.self.layer_norm": "stages.1.blocks.0.attention.sequence_reduction.layer_norm",
    "block.1.0.mlp.dense1": "stages.1.blocks.0.mlp.fc1",
    "block.1.0.mlp.dense2": "stages.1.blocks.0.mlp.fc2",
    "block.1.0.mlp.dwconv": "stages.1.blocks.0.mlp.dwconv",
    "layer_norm.1.": "stages.1.layer_norm.",
}


def new_name(name):
    """The name since transformers 5, from a table written by hand for stage 1."""
    if name.startswith("decode_head.linear_c."):
        return name.replace("linear_c", "linear_projections")
    for s in range(4):
        for old, new in RENAMED.items():
            start = "segformer.encoder." + old.replace(".1.", f".{s}.", 1)
            if name.startswith(start):
                return "segformer." + new.replace(".1.", f".{s}.", 1) + name.removeprefix(start)
    return name


def test_the_new_names_of_transformers_are_read_and_stay_in_their_file(tmp_path):
    fmt, make = FORMATS["transformers segformer"]
    module = make()
    variables, tensors = theirs(fmt, module)
    renamed = {new_name(name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors) and not [name for name in renamed if ".encoder." in name]
    found = load(save(tmp_path / "new.safetensors", renamed), module)
    assert found.format is fmt and same_bits(found.variables, variables)
    after = jax.tree.map(np.copy, variables)
    after["params"]["block2_0"]["attn"]["query"]["kernel"] += 1
    weights.write_back(found, str(tmp_path / "b.safetensors"), variables, after, {})
    assert files.read(str(tmp_path / "b.safetensors")).tensors.keys() == renamed.keys()
    path = weights.write_new(module, variables, "transformers", str(tmp_path / "old"), {})
    assert path.endswith(".safetensors") and files.read(path).tensors.keys() == tensors.keys()


def encoder_of(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "prefix", "classifier", "format_name"),
    [
        ("mmseg fcn", "backbone.", "fc", "mmseg_encoder"),
        ("torchvision fcn", "backbone.", "fc", "torchvision_encoder"),
        ("mmseg segformer", "backbone.", "head", "mmseg_encoder"),
        ("nvlabs segformer", "backbone.", "head", "nvlabs_encoder"),
        ("transformers segformer", "segformer.", "", "transformers_encoder"),
        ("transformers segformer", "", "classifier", "transformers_encoder"),
    ],
)
def test_an_encoder_alone_leaves_the_heads_as_initialized_and_says_so(name, prefix, classifier, format_name, tmp_path):
    fmt, make = FORMATS[name]
    module = make()
    variables, tensors = theirs(fmt, module)
    encoder = encoder_of({n: t for n, t in tensors.items() if "head" not in n and "classifier" not in n}, prefix)
    if classifier:
        encoder |= {f"{classifier}.weight": np.ones((7, 3), np.float32), f"{classifier}.bias": np.ones(7, np.float32)}
    found = load(save(tmp_path / "encoder.safetensors", encoder), module)
    assert found.format.name == format_name
    for collection, tree in found.variables.items():
        for part, leaves in tree.items():
            if part.endswith("_head"):
                assert all((leaf == 7).all() for leaf in jax.tree.leaves(leaves)), (collection, part)
            else:
                assert same_bits(leaves, variables[collection][part]), part
    heads = "auxiliary_head, decode_head" if "fcn" in name else "decode_head"
    assert f"not in files of this format, and left as initialized: {heads}" in found.notes


def test_an_encoder_of_another_implementation_may_begin_a_segformer(tmp_path):
    fmt, make = FORMATS["nvlabs segformer"]
    variables, tensors = theirs(fmt, make())
    path = save(tmp_path / "mit.safetensors", encoder_of(tensors, "backbone."))
    found = load(path, tiny("segformer"))
    assert same_bits(found.variables["params"]["block1_0"], variables["params"]["block1_0"])


def test_heads_that_a_network_does_not_have_are_passed_over_and_missing_ones_said(tmp_path):
    fmt, make = FORMATS["torchvision fcn"]
    variables, tensors = theirs(fmt, make())
    path = save(tmp_path / "a.safetensors", tensors)
    for options in ({"auxiliary": False}, {"num_classes": 0}):
        found = load(path, make(**options))
        assert "auxiliary_head" not in found.variables["params"]
        assert same_bits(found.variables["params"]["layer1_0"], variables["params"]["layer1_0"])
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("aux")}
    found = load(save(tmp_path / "b.safetensors", without), make())
    assert "not in files of this format, and left as initialized: auxiliary_head" in found.notes


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("mmseg fcn", {"implementation": "torchvision"}, "set --config.model.implementation=mmseg (it is torchvision)"),
        ("torchvision fcn", {"implementation": "mmseg"}, "such as fcn_resnet50"),
        ("mmseg segformer", {"implementation": "nvlabs"}, "set --config.model.implementation=mmseg (it is nvlabs)"),
        ("nvlabs segformer", {"implementation": "transformers"}, "set --config.model.implementation=nvlabs"),
        ("transformers segformer", {"implementation": "mmseg"}, "set --config.model.implementation=transformers"),
    ],
)
def test_a_file_of_another_implementation_names_the_setting(name, other, message, tmp_path):
    fmt, make = FORMATS[name]
    path = save(tmp_path / "a.safetensors", theirs(fmt, make())[1])
    refused(path, tiny(name.split()[1], **other), message)


@pytest.mark.parametrize("name", FORMATS)
def test_another_number_of_classes_names_both_ways_out(name, tmp_path):
    fmt, make = FORMATS[name]
    variables, tensors = theirs(fmt, make())
    path, module = save(tmp_path / "a.safetensors", tensors), make(num_classes=3)
    heads = "(auxiliary_head/classifier|decode_head/classifier)" if "fcn" in name else "decode_head/classifier"
    pattern = f".*{heads}/.*"
    refused(
        path,
        module,
        "The file is for 5 classes and the model for 3: --config.model.num_classes=5 reads it with its classifier",
        f"--config.backbone.init_allow=\"('{pattern}',)\"",
    )
    found = load(path, module, allow=(pattern,))
    assert (found.variables["params"]["decode_head"]["classifier"]["kernel"] == 7).all()
    assert same_bits(
        found.variables["params"]["layer1_0" if "fcn" in name else "block1_0"],
        variables["params"]["layer1_0" if "fcn" in name else "block1_0"],
    )


def test_another_size_of_network_gets_no_hint_about_classes(tmp_path):
    fmt, make = FORMATS["mmseg segformer"]
    path = save(tmp_path / "a.safetensors", theirs(fmt, make())[1])
    with pytest.raises(CheckpointError, match="mis-shaped") as caught:
        load(path, make(num_classes=3, head_width=16))
    assert "classes and the model" not in str(caught.value)
    wanted = "decode_head.fusion_conv.conv.weight is (8, 32, 1, 1) in the file, (16, 64, 1, 1) in the model"
    assert wanted in str(caught.value)


def test_a_resnet_is_still_a_resnet_and_formats_are_named(tmp_path):
    fmt, make = FORMATS["torchvision fcn"]
    encoder = encoder_of(theirs(fmt, make())[1], "backbone.")
    refused(save(tmp_path / "a.safetensors", encoder), tiny("segformer"), "holds a ResNet in the format torchvision")
    with pytest.raises(ConfigError, match='Did you mean "nvlabs"'):
        load(save(tmp_path / "b.safetensors", encoder), tiny("segformer"), format_name="nvlab")
