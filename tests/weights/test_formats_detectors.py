"""DETR, YOLOv3, ATSS and CenterNet-update as files: names of the public checkpoints, both ways, what is refused."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from drep_jax import weights
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.yolov3 import yolov3_cfg
from drep_jax.weights.formats import detr, mmdet_dense
from tests import foreign_files
from tests.command import same_bits
from tests.foreign_files import save
from tests.models.detectors.networks import abstract, tiny

FACEBOOK = {"implementation": "facebookresearch"}
# name: (format, registry entry, options, the tensor of a layer that is changed, that layer)
FORMATS = {
    "mmdet detr": (detr.MMDET_DETR, "detr_r50", {}, "decoder_1/cross_attn/value"),
    "facebook detr": (detr.FACEBOOK_DETR, "detr_r50", FACEBOOK, "encoder_0/attn/key"),
    "transformers detr": (detr.TRANSFORMERS_DETR, "detr_r50", FACEBOOK, "decoder_0/attn/query"),
    "mmdet atss": (mmdet_dense.MMDET_ATSS, "atss_r50", {}, "head/reg_conv_1"),
    "mmdet centernet": (mmdet_dense.MMDET_CENTERNET, "centernet_r50", {}, "neck/lateral_0"),
    "mmdet yolov3": (mmdet_dense.MMDET_YOLOV3, "yolov3_d53", {}, "conv_3"),
}
COUNTER = {"backbone.bn1.num_batches_tracked": np.int64(9)}
BESIDE = {
    "facebook detr": {},
    "mmdet yolov3": {"backbone.conv1.bn.num_batches_tracked": np.int64(9)},
}
# Names and shapes as the public files have them, written out by hand for the tiny networks of tests/models/detectors:
# stem 2, last stage 64, pyramid or transformer 8, MLP 12, 6 queries, 5 classes; YOLOv3: 2 to 64, 30 outputs.
TRUNK = {"layer1.0.downsample.0.weight": (8, 2, 1, 1), "layer4.0.conv2.weight": (16, 16, 3, 3), "bn1.running_var": (2,)}
PYRAMID = {
    **{f"backbone.{name}": shape for name, shape in TRUNK.items()},
    "neck.lateral_convs.0.conv.weight": (8, 16, 1, 1),
    "neck.lateral_convs.2.conv.bias": (8,),
    "neck.fpn_convs.4.conv.weight": (8, 8, 3, 3),
    "bbox_head.cls_convs.1.conv.weight": (8, 8, 3, 3),
    "bbox_head.reg_convs.0.gn.weight": (8,),
    "bbox_head.cls_convs.0.gn.bias": (8,),
    "bbox_head.scales.4.scale": (),
}
HAND = {
    "mmdet detr": {
        **{f"backbone.{name}": shape for name, shape in TRUNK.items()},
        "neck.convs.0.conv.weight": (8, 64, 1, 1),
        "neck.convs.0.conv.bias": (8,),
        "encoder.layers.1.self_attn.attn.in_proj_weight": (24, 8),
        "encoder.layers.1.self_attn.attn.in_proj_bias": (24,),
        "encoder.layers.1.self_attn.attn.out_proj.bias": (8,),
        "encoder.layers.0.ffn.layers.0.0.weight": (12, 8),
        "encoder.layers.0.ffn.layers.1.bias": (8,),
        "encoder.layers.0.norms.1.weight": (8,),
        "decoder.layers.1.cross_attn.attn.in_proj_weight": (24, 8),
        "decoder.layers.1.norms.2.bias": (8,),
        "decoder.post_norm.weight": (8,),
        "query_embedding.weight": (6, 8),
        "bbox_head.fc_cls.weight": (6, 8),
        "bbox_head.reg_ffn.layers.0.0.weight": (8, 8),
        "bbox_head.reg_ffn.layers.1.bias": (8,),
        "bbox_head.fc_reg.weight": (4, 8),
    },
    "facebook detr": {
        **{f"backbone.0.body.{name}": shape for name, shape in TRUNK.items()},
        "input_proj.weight": (8, 64, 1, 1),
        "transformer.encoder.layers.1.self_attn.in_proj_weight": (24, 8),
        "transformer.encoder.layers.1.linear1.weight": (12, 8),
        "transformer.encoder.layers.1.norm2.weight": (8,),
        "transformer.decoder.layers.0.multihead_attn.in_proj_bias": (24,),
        "transformer.decoder.layers.0.multihead_attn.out_proj.weight": (8, 8),
        "transformer.decoder.layers.0.linear2.bias": (8,),
        "transformer.decoder.layers.0.norm3.weight": (8,),
        "transformer.decoder.norm.bias": (8,),
        "query_embed.weight": (6, 8),
        "class_embed.bias": (6,),
        "bbox_embed.layers.2.weight": (4, 8),
    },
    "transformers detr": {
        **{f"model.backbone.conv_encoder.model.{name}": shape for name, shape in TRUNK.items()},
        "model.input_projection.weight": (8, 64, 1, 1),
        "model.query_position_embeddings.weight": (6, 8),
        "model.encoder.layers.0.self_attn.k_proj.weight": (8, 8),
        "model.encoder.layers.0.self_attn.out_proj.bias": (8,),
        "model.encoder.layers.0.self_attn_layer_norm.weight": (8,),
        "model.encoder.layers.0.fc1.weight": (12, 8),
        "model.encoder.layers.0.final_layer_norm.weight": (8,),
        "model.decoder.layers.1.encoder_attn.q_proj.weight": (8, 8),
        "model.decoder.layers.1.encoder_attn_layer_norm.bias": (8,),
        "model.decoder.layernorm.weight": (8,),
        "class_labels_classifier.weight": (6, 8),
        "bbox_predictor.layers.1.weight": (8, 8),
    },
    "mmdet atss": {
        **PYRAMID,
        "bbox_head.atss_cls.weight": (5, 8, 3, 3),
        "bbox_head.atss_reg.bias": (4,),
        "bbox_head.atss_centerness.weight": (1, 8, 3, 3),
    },
    "mmdet centernet": {**PYRAMID, "bbox_head.conv_cls.bias": (5,), "bbox_head.conv_reg.weight": (4, 8, 3, 3)},
    "mmdet yolov3": {
        "backbone.conv1.conv.weight": (2, 3, 3, 3),
        "backbone.conv_res_block1.conv.bn.weight": (4,),
        "backbone.conv_res_block5.res0.conv1.conv.weight": (32, 64, 1, 1),
        "backbone.conv_res_block5.res0.conv2.bn.running_mean": (64,),
        "neck.detect1.conv1.conv.weight": (32, 64, 1, 1),
        "neck.detect1.conv2.conv.weight": (64, 32, 3, 3),
        "neck.conv1.conv.weight": (16, 32, 1, 1),
        "neck.detect2.conv1.conv.weight": (16, 48, 1, 1),
        "neck.conv2.bn.bias": (8,),
        "neck.detect3.conv5.conv.weight": (8, 16, 1, 1),
        "bbox_head.convs_bridge.0.conv.weight": (64, 32, 3, 3),
        "bbox_head.convs_pred.2.weight": (30, 16, 1, 1),
        "bbox_head.convs_pred.2.bias": (30,),
    },
}


def network(name, **options):
    _, entry, needed, _ = FORMATS[name]
    return tiny(entry, **{**needed, **options})


def theirs(name, module):
    return foreign_files.theirs(FORMATS[name][0], module, abstract(module))


def load(path, module, **options):
    return foreign_files.load(path, module, abstract(module), **options)


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_shapes_are_those_of_the_public_files(name):
    shapes = {key: tensor.shape for key, tensor in theirs(name, network(name))[1].items()}
    assert {key: shapes.get(key) for key in HAND[name]} == HAND[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_recognized_read_and_written_back_to_the_bit(name, tmp_path):
    fmt, _, _, layer = FORMATS[name]
    module = network(name)
    variables, tensors = theirs(name, module)
    tensors |= BESIDE.get(name, COUNTER)
    found = load(save(tmp_path / "a.safetensors", tensors), module)
    assert found.format is fmt and same_bits(found.variables, variables)
    after = jax.tree.map(np.copy, found.variables)
    target = after["params"]
    for part in layer.split("/"):
        target = target[part]
    target["kernel"] += 1
    weights.write_back(found, str(tmp_path / "b.safetensors"), found.variables, after, {})
    again = safetensors.numpy.load_file(str(tmp_path / "b.safetensors"))
    changed = [key for key, array in tensors.items() if array.tobytes() != again[key].tobytes()]
    assert len(changed) == 1 and again.keys() == tensors.keys()
    assert all((a.shape, a.dtype) == (again[key].shape, again[key].dtype) for key, a in tensors.items())
    assert same_bits(load(str(tmp_path / "b.safetensors"), module, allow_fused=True).variables, after)


def test_rows_of_a_packed_projection_are_layers_of_their_own():
    variables, tensors = theirs("mmdet detr", network("mmdet detr"))
    layers = variables["params"]["decoder_1"]["cross_attn"]
    rows = np.concatenate([layers[part]["kernel"].T for part in ("query", "key", "value")])
    np.testing.assert_array_equal(tensors["decoder.layers.1.cross_attn.attn.in_proj_weight"], rows)


def test_the_first_convolution_of_caffe_reads_the_colors_in_the_other_order():
    variables, tensors = theirs("mmdet centernet", network("mmdet centernet"))
    kernel = variables["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(tensors["backbone.conv1.weight"], kernel[:, :, ::-1].transpose(3, 2, 0, 1))


OWN_TRUNK = {
    "conv1": "embedder.embedder.convolution",
    "bn1": "embedder.embedder.normalization",
    "layer1.0.downsample.0": "encoder.stages.0.layers.0.shortcut.convolution",
    "layer1.0.downsample.1": "encoder.stages.0.layers.0.shortcut.normalization",
    **{f"layer1.0.conv{i}": f"encoder.stages.0.layers.0.layer.{i - 1}.convolution" for i in (1, 2, 3)},
    **{f"layer1.0.bn{i}": f"encoder.stages.0.layers.0.layer.{i - 1}.normalization" for i in (1, 2, 3)},
}


def new_name(name, own_trunk):
    """The name in the modules of transformers 5, with timm's ResNet or its own, from tables written by hand."""
    prefix = "model.backbone.conv_encoder.model."
    if name.startswith(prefix):
        rest, leaf = name.removeprefix(prefix).rsplit(".", 1)
        if own_trunk:
            stage = rest[5] if rest.startswith("layer") else "1"
            rest = OWN_TRUNK[rest.replace(f"layer{stage}.", "layer1.")].replace("stages.0", f"stages.{int(stage) - 1}")
        return f"model.backbone.model.{rest}.{leaf}"
    return name.replace(".out_proj.", ".o_proj.").replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")


@pytest.mark.parametrize("own_trunk", [False, True])
def test_the_new_names_of_transformers_are_read_and_stay_in_their_file(own_trunk, tmp_path):
    module = network("transformers detr")
    variables, tensors = theirs("transformers detr", module)
    renamed = {new_name(name, own_trunk): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    found = load(save(tmp_path / "new.safetensors", renamed), module)
    assert found.format is detr.TRANSFORMERS_DETR and same_bits(found.variables, variables)
    after = jax.tree.map(np.copy, variables)
    after["params"]["encoder_0"]["attn"]["query"]["kernel"] += 1
    weights.write_back(found, str(tmp_path / "b.safetensors"), variables, after, {})
    assert safetensors.numpy.load_file(str(tmp_path / "b.safetensors")).keys() == renamed.keys()


def test_files_of_mmdetection_and_of_darknet_are_one_network(tmp_path):
    """The same numbers in both formats, read by the registry's model and by a darknet network of the same structure."""
    module = network("mmdet yolov3")
    variables, tensors = theirs("mmdet yolov3", module)
    cfg = tmp_path / "yolov3.cfg"
    cfg.write_text(yolov3_cfg(5, stage_sizes=(1, 1, 1, 1, 1), width=2))
    other = Darknet(cfg=str(cfg))
    assert same_bits(load(save(tmp_path / "mmdet.safetensors", tensors), other).variables, variables)
    layers = [n for n, layer in enumerate(other.network.layers) if layer.kind == "convolutional"]
    numbers = []
    for n in layers:
        conv, norm = variables["params"][f"conv_{n}"], variables["params"].get(f"bn_{n}")
        if norm:
            statistics = variables["batch_stats"][f"bn_{n}"]
            numbers += [norm["bias"], norm["scale"], statistics["mean"], statistics["var"]]
        else:
            numbers.append(conv["bias"])
        numbers.append(conv["kernel"].transpose(3, 2, 0, 1))
    header = np.array([0, 2, 0], "<i4").tobytes() + np.array([7], "<i8").tobytes()
    path = tmp_path / "yolov3.weights"
    path.write_bytes(header + b"".join(np.asarray(a, "<f4", order="C").tobytes() for a in numbers))
    assert same_bits(load(str(path), module).variables, variables)


@pytest.mark.parametrize("name", ["mmdet detr", "mmdet centernet"])
def test_a_resnet_alone_leaves_the_rest_as_initialized_and_says_so(name, tmp_path):
    module = network(name)
    variables, tensors = theirs(name, module)
    trunk = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    trunk |= {"fc.weight": np.ones((7, 3), np.float32), "bn1.num_batches_tracked": np.int64(1)}
    found = load(save(tmp_path / "resnet.safetensors", trunk), module)
    assert same_bits(found.variables["params"]["backbone"], variables["params"]["backbone"])
    rest = {key: tree for key, tree in found.variables["params"].items() if key != "backbone"}
    assert rest and all((leaf == 7).all() for leaf in jax.tree.leaves(rest))
    assert any("left as initialized: " in note and "fc" not in note for note in found.notes)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_files_of_other_networks_say_what_to_set(tmp_path):
    for name, other, message in (
        ("mmdet detr", FACEBOOK, "set --config.model.implementation=mmdet (it is facebookresearch)"),
        ("facebook detr", {"implementation": "mmdet"}, "set --config.model.implementation=facebookresearch"),
    ):
        path = save(tmp_path / "a.safetensors", theirs(name, network(name))[1])
        module = tiny("detr_r50", **other)
        foreign_files.refused(path, module, abstract(module), message)
    atss = network("mmdet atss")
    path = save(tmp_path / "b.safetensors", theirs("mmdet atss", atss)[1])
    module = network("mmdet centernet")
    foreign_files.refused(
        path, module, abstract(module), "bbox_head.atss_cls.bias", "Choose the model that it is of, such as atss_r50"
    )
    small = Darknet(
        cfg=yolov3_cfg(5, stage_sizes=(1, 1, 1, 1, 1), width=2).replace("[shortcut]\nfrom=-3", "[route]\nlayers=-1")
    )
    path = save(tmp_path / "c.safetensors", theirs("mmdet yolov3", network("mmdet yolov3"))[1])
    foreign_files.refused(path, small, abstract(small), "choose the model yolov3_d53")


@pytest.mark.parametrize("name", ["mmdet detr", pytest.param("mmdet atss", marks=pytest.mark.slow)])
def test_another_number_of_classes_names_both_ways_out(name, tmp_path):
    path = save(tmp_path / "a.safetensors", theirs(name, network(name))[1])
    layer = "class_embed" if "detr" in name else "head/cls"
    module, pattern = network(name, num_classes=3), f".*{layer}/.*"
    foreign_files.refused(
        path,
        module,
        abstract(module),
        "The file is for 5 classes and the model for 3: --config.model.num_classes=5 reads it with its classifier",
        f"--config.backbone.init_allow=\"('{pattern}',)\"",
    )
    found = load(path, module, allow=(pattern,))
    assert same_bits(
        found.variables["params"]["backbone"]["conv1"],
        load(path, network(name)).variables["params"]["backbone"]["conv1"],
    )
