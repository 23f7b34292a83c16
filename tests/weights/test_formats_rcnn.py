"""Files of R-CNNs and of Swin Transformers: names, layouts, round trips to the bit, trunks alone, what is refused."""

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.models import create_model
from drep_jax.weights import files
from drep_jax.weights.formats import named_format
from drep_jax.weights.formats.rcnn import MMDET_RCNN, TORCHVISION_RCNN
from drep_jax.weights.formats.swin_v1 import SWIN_V1, TIMM_SWIN
from tests.command import same_bits
from tests.foreign_files import load, refused, save, theirs
from tests.models.detectors.networks import abstract
from tests.models.detectors.rcnns import tiny

SWIN = {"width": 4, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2, "patch_size": 2}


def swin(**options):
    return create_model("swin", num_classes=5, image_size=(64, 64), **{**SWIN, **options})


CASES = {
    "mmdet": (MMDET_RCNN, lambda **options: tiny(**{"masks": True, **options})),
    "mmdet swin": (MMDET_RCNN, lambda **options: tiny(**{"masks": True, "trunk": "swin", **options})),
    "torchvision": (
        TORCHVISION_RCNN,
        lambda **options: tiny(**{"masks": True, "implementation": "torchvision", **options}),
    ),
    "swin": (SWIN_V1, swin),
    "timm": (TIMM_SWIN, swin),
}
# Written by hand from the public files; shapes of the tiny networks.
HAND = {
    "mmdet": {
        "backbone.conv1.weight": (2, 3, 7, 7),
        "backbone.layer1.0.downsample.0.weight": (8, 2, 1, 1),
        "backbone.layer4.0.bn3.running_var": (64,),
        "neck.lateral_convs.3.conv.weight": (4, 64, 1, 1),
        "neck.fpn_convs.0.conv.bias": (4,),
        "rpn_head.rpn_conv.weight": (4, 4, 3, 3),
        "rpn_head.rpn_cls.weight": (3, 4, 1, 1),
        "rpn_head.rpn_reg.bias": (12,),
        "roi_head.bbox_head.shared_fcs.0.weight": (6, 196),
        "roi_head.bbox_head.shared_fcs.1.weight": (6, 6),
        "roi_head.bbox_head.fc_cls.weight": (4, 6),
        "roi_head.bbox_head.fc_reg.weight": (12, 6),
        "roi_head.mask_head.convs.3.conv.weight": (4, 4, 3, 3),
        "roi_head.mask_head.upsample.weight": (4, 4, 2, 2),
        "roi_head.mask_head.upsample.bias": (4,),
        "roi_head.mask_head.conv_logits.weight": (3, 4, 1, 1),
    },
    "mmdet swin": {
        "backbone.patch_embed.projection.weight": (4, 3, 4, 4),
        "backbone.patch_embed.norm.bias": (4,),
        "backbone.stages.1.blocks.0.attn.w_msa.qkv.weight": (24, 8),
        "backbone.stages.1.blocks.0.attn.w_msa.qkv.bias": (24,),
        "backbone.stages.1.blocks.0.attn.w_msa.proj.weight": (8, 8),
        "backbone.stages.1.blocks.0.attn.w_msa.relative_position_bias_table": (49, 2),
        "backbone.stages.1.blocks.0.ffn.layers.0.0.weight": (32, 8),
        "backbone.stages.1.blocks.0.ffn.layers.1.bias": (8,),
        "backbone.stages.0.downsample.norm.weight": (16,),
        "backbone.stages.0.downsample.reduction.weight": (8, 16),
        "backbone.norm3.weight": (32,),
    },
    "torchvision": {
        "backbone.body.layer2.0.downsample.1.weight": (16,),
        "backbone.fpn.inner_blocks.0.0.weight": (4, 8, 1, 1),
        "backbone.fpn.layer_blocks.3.0.bias": (4,),
        "rpn.head.conv.0.0.weight": (4, 4, 3, 3),
        "rpn.head.cls_logits.bias": (3,),
        "rpn.head.bbox_pred.weight": (12, 4, 1, 1),
        "roi_heads.box_head.fc6.weight": (6, 196),
        "roi_heads.box_head.fc7.bias": (6,),
        "roi_heads.box_predictor.cls_score.weight": (4, 6),
        "roi_heads.box_predictor.bbox_pred.weight": (16, 6),
        "roi_heads.mask_head.0.0.weight": (4, 4, 3, 3),
        "roi_heads.mask_predictor.conv5_mask.weight": (4, 4, 2, 2),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": (4, 4, 1, 1),
    },
    "swin": {
        "patch_embed.proj.weight": (4, 3, 2, 2),
        "layers.1.blocks.0.attn.qkv.weight": (24, 8),
        "layers.1.blocks.0.attn.relative_position_bias_table": (9, 2),
        "layers.0.downsample.reduction.weight": (8, 16),
        "layers.0.downsample.norm.weight": (16,),
        "layers.3.blocks.0.mlp.fc1.weight": (128, 32),
        "norm.weight": (32,),
        "head.weight": (5, 32),
    },
    "timm": {"layers.1.downsample.norm.weight": (16,), "head.fc.bias": (5,), "layers.3.blocks.0.norm2.bias": (32,)},
}
BESIDE = {
    "mmdet": {"backbone.bn1.num_batches_tracked": np.asarray(7)},
    "mmdet swin": {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": np.ones((16, 16), np.int64)},
    "torchvision": {},
    "swin": {"layers.0.blocks.0.attn.relative_position_index": np.ones((4, 4), np.int64)},
    "timm": {},
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_the_public_names_is_recognized_and_comes_back_to_the_bit(name, tmp_path):
    fmt, make = CASES[name]
    module = make()
    like = abstract(module)
    variables, tensors = theirs(fmt, module, like)
    assert {key: tensors[key].shape for key in HAND[name]} == HAND[name]
    path = save(tmp_path / "a.safetensors", {**tensors, **BESIDE[name]})
    found = load(path, module, like)
    assert found.format is fmt and same_bits(found.variables, variables)
    written = weights.write_new(module, found.variables, fmt.name, str(tmp_path / "b"), {})
    again = load(written, module, like).source.tensors
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, strict=True, err_msg=key)


def test_layouts():
    """Regions are flattened channel by channel, a transposed convolution is a layer of four pixels, patches are permuted."""
    module = tiny(masks=True)
    variables, tensors = theirs(MMDET_RCNN, module, abstract(module))
    params = variables["params"]
    regions = np.random.default_rng(0).normal(size=(5, 7, 7, 4)).astype(np.float32)
    kernel = params["box_head"]["fc1"]["kernel"]
    np.testing.assert_allclose(
        regions.transpose(0, 3, 1, 2).reshape(5, -1) @ tensors["roi_head.bbox_head.shared_fcs.0.weight"].T,
        np.einsum("nhwc,hwco->no", regions, kernel),
        rtol=1e-4,
        atol=1e-4,
    )
    doubled = params["mask_head"]["upsample"]["kernel"].reshape(4, 2, 2, 4)
    theirs_doubled = tensors["roi_head.mask_head.upsample.weight"]
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(theirs_doubled[:, :, row, column], doubled[:, row, column])
    module = tiny(trunk="swin")
    variables, tensors = theirs(MMDET_RCNN, module, abstract(module))
    merge = variables["params"]["backbone"]["stage1_merge"]
    for row in (0, 1):
        for column in (0, 1):
            # Ours lays pixel (row, column) at place 2·column + row; theirs channel c at 4·c + 2·row + column.
            ours, other = slice(4 * (2 * column + row), 4 * (2 * column + row) + 4), slice(2 * row + column, 16, 4)
            weight = tensors["backbone.stages.0.downsample.reduction.weight"]
            np.testing.assert_array_equal(merge["reduction"]["kernel"][ours], weight[:, other].T)
            scale = tensors["backbone.stages.0.downsample.norm.weight"]
            np.testing.assert_array_equal(merge["norm"]["scale"][ours], scale[other])


def test_old_names_of_torchvision_are_read_and_stay_in_their_file(tmp_path):
    fmt, make = CASES["torchvision"]
    module = make()
    variables, tensors = theirs(fmt, module, abstract(module))

    def old(name):
        for i in range(4):
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
            name = name.replace(f"blocks.{i}.0.", f"blocks.{i}.")
        return name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")

    renamed = {old(name): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 16 + 8 + 2
    found = load(save(tmp_path / "old.safetensors", renamed), module, abstract(module))
    assert found.format is fmt and same_bits(found.variables, variables)
    after = {**variables, "params": {**variables["params"]}}
    rpn = variables["params"]["rpn"]
    after["params"]["rpn"] = {**rpn, "conv": {**rpn["conv"], "kernel": rpn["conv"]["kernel"] + 1}}
    changed = weights.write_back(found, str(tmp_path / "b.safetensors"), variables, after, {})
    assert changed == ("rpn.head.conv.weight",)
    assert files.read(str(tmp_path / "b.safetensors")).tensors.keys() == renamed.keys()


@pytest.mark.parametrize("trunk", ["resnet", "swin", "swinv2"])
def test_training_begins_with_a_trunk_alone(trunk, tmp_path):
    base = {"resnet": {"stage_sizes": (1, 1, 1, 1), "block": "bottleneck", "width": 2}}.get(
        trunk, {**SWIN, "patch_size": 4}
    )
    base = base if trunk == "resnet" else {**base, "num_heads": (1, 2, 2, 2), "window_size": 4}
    classifier = create_model(trunk, num_classes=5, image_size=(64, 64), **base)
    fmt = {"resnet": "torchvision", "swin": "swin", "swinv2": "swin"}[trunk]
    variables, tensors = theirs(named_format(classifier, fmt), classifier, abstract(classifier))
    module = tiny(trunk=trunk, masks=True)
    found = load(save(tmp_path / "trunk.safetensors", tensors), module, abstract(module))
    assert found.format.name == {"resnet": "resnet"}.get(trunk, "swin")
    trunk_of = found.variables["params"]["backbone"]
    for name, leaves in variables["params"].items():
        if name not in ("fc", "head", "norm"):
            assert same_bits(trunk_of[name], leaves), name
    rest = {name: tree for name, tree in found.variables["params"].items() if name != "backbone"}
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(rest))
    assert any("left as initialized" in note for note in found.notes)


def test_files_of_another_network_name_the_way_out(tmp_path):
    fmt, make = CASES["mmdet"]
    module = make()
    path = save(tmp_path / "a.safetensors", theirs(fmt, module, abstract(module))[1])
    for other, message in (
        ({"implementation": "torchvision"}, "set --config.model.implementation=mmdet (it is torchvision)"),
        ({"trunk": "swinv2"}, "mmdetection has no SwinV2"),
        ({"num_classes": 5}, "roi_head.bbox_head.fc_cls.weight is (4, 6) in the file, (6, 6) in the model"),
    ):
        network = make(**other)
        refused(path, network, abstract(network), message)
    faster = make(masks=False)
    found = load(path, faster, abstract(faster))  # the mask head is passed over
    assert "mask_head" not in found.variables["params"]
