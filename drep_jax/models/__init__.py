"""Registry of backbones: plain Flax Linen modules, images in, logits out.

Every entry makes a module that is called as `module(x, train=False)` on normalized images (batch,
height, width, channels) and returns logits (batch, num_classes), or features when `num_classes=0`;
those for re-identification always return features, and their method `outputs` returns what the training
losses read. Those that classify every pixel return maps of logits (batch, rows, columns,
num_classes) of a lower resolution, and with `train=True` those of an auxiliary head too, where there
is one. Those that find objects are `drep_jax.models.detectors.base.Detector`s. To add a model, add
a line to `MODELS`. A module that is not in the registry is imported by name, see `imported`.
"""

import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from drep_jax.errors import ConfigError, lookup
from drep_jax.models import imported
from drep_jax.models.backbone import Backbone, BatchNormBackbone
from drep_jax.models.bilinear import resize_bilinear
from drep_jax.models.clip_reid import CLIPReID
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.detectors.atss import ATSS
from drep_jax.models.detectors.centernet import CenterNet
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.detr import DETR
from drep_jax.models.detectors.rcnn import RCNN
from drep_jax.models.detectors.yolov3 import yolov3
from drep_jax.models.fcn import FCN
from drep_jax.models.imported import abstract_variables, output_shape
from drep_jax.models.mcunet import MCUNet
from drep_jax.models.resnet import ResNet
from drep_jax.models.resnet_reid import ResNetReID
from drep_jax.models.segformer import SegFormer
from drep_jax.models.swin import SwinV2
from drep_jax.models.swin_v1 import Swin
from drep_jax.models.transreid import TransReID
from drep_jax.models.vit import ViT
from drep_jax.models.vmamba import VMamba

__all__ = [
    "MODELS",
    "Backbone",
    "BatchNormBackbone",
    "abstract_variables",
    "create_model",
    "depthwise_conv",
    "list_models",
    "output_shape",
    "resize_bilinear",
    "takes_classes",
]

_vit_ti = functools.partial(ViT, width=192, depth=12, num_heads=3, mlp_dim=768)
_vit_s = functools.partial(ViT, width=384, depth=12, num_heads=6, mlp_dim=1536)
_vit_b = functools.partial(ViT, width=768, depth=12, num_heads=12, mlp_dim=3072)
_vit_l = functools.partial(ViT, width=1024, depth=24, num_heads=16, mlp_dim=4096)

# As published at https://github.com/facebookresearch/dinov2; its backbones have no head
# (num_classes=0).
_DINOV2 = {"patch_size": 14, "layer_scale": True}
_DINOV2_REGISTERS = {**_DINOV2, "registers": 4}
# The plain ViT-S/16 of https://arxiv.org/abs/2205.01580, as in big_vision's vit_s16_i1k.
_GAP = {"pool": "gap", "class_token": False, "positions": "sincos2d", "pre_logits": True, "activation": "gelu_tanh"}

# The published ones: T[s1l8], S[s2l15] and B[s2l15], s being the ratio of scanned channels and l
# the depth of the third stage.
_vmamba_s2l15 = functools.partial(VMamba, depths=(2, 2, 15, 2), ssm_ratio=2.0)

# As published at https://github.com/damo-cv/TransReID; side_info is the number of cameras (and
# viewpoints) of the data.
_transreid_s = functools.partial(TransReID, patch_size=16, width=384, depth=12, num_heads=6, mlp_dim=1536)
_transreid_b = functools.partial(TransReID, patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072)

_cifar = functools.partial(ResNet, block="basic", width=16, stem="cifar", shortcut="pad")

# Microsoft's Swin-T and -S at 224 pixels.
_swin = functools.partial(Swin, width=96, num_heads=(3, 6, 12, 24), window_size=7)
_swinv2_t = functools.partial(SwinV2, width=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_swinv2_s = functools.partial(SwinV2, width=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
_swinv2_b = functools.partial(SwinV2, width=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))

_resnet50_reid = functools.partial(ResNetReID, stage_sizes=(3, 4, 6, 3), block="bottleneck")

# mmsegmentation's R-50-D8 and R-101-D8, and torchvision's networks of the same name.
_fcn_r50 = functools.partial(FCN, stage_sizes=(3, 4, 6, 3))
_fcn_r101 = functools.partial(FCN, stage_sizes=(3, 4, 23, 3))

_segformer = functools.partial(SegFormer, widths=(64, 128, 320, 512))
# mmsegmentation's heads are 256 wide throughout.
_segformer_wide = functools.partial(_segformer, head_width=(256, 768))

_mask_rcnn_swin = functools.partial(RCNN, masks=True, trunk="swin", width=96)
_mask_rcnn_swinv2 = functools.partial(RCNN, masks=True, trunk="swinv2", width=96, window_size=8)
# As torchvision's published COCO weights were trained: frozen batch norms without eps.
_torchvision_rcnn = functools.partial(RCNN, implementation="torchvision", norm_eps=0.0)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": ViT,
    "vit_ti16": functools.partial(_vit_ti, patch_size=16),
    "vit_s8": functools.partial(_vit_s, patch_size=8),
    "vit_s16": functools.partial(_vit_s, patch_size=16),
    "vit_s16_gap": functools.partial(_vit_s, patch_size=16, **_GAP),
    "vit_s32": functools.partial(_vit_s, patch_size=32),
    "vit_b8": functools.partial(_vit_b, patch_size=8),
    "vit_b16": functools.partial(_vit_b, patch_size=16),
    "vit_b32": functools.partial(_vit_b, patch_size=32),
    "vit_l16": functools.partial(_vit_l, patch_size=16),
    "dinov2_s14": functools.partial(_vit_s, **_DINOV2),
    "dinov2_s14_reg": functools.partial(_vit_s, **_DINOV2_REGISTERS),
    "dinov2_b14": functools.partial(_vit_b, **_DINOV2),
    "dinov2_b14_reg": functools.partial(_vit_b, **_DINOV2_REGISTERS),
    "dinov2_l14": functools.partial(_vit_l, **_DINOV2),
    "dinov2_l14_reg": functools.partial(_vit_l, **_DINOV2_REGISTERS),
    "resnet": ResNet,
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block="basic"),
    "resnet34": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block="basic"),
    "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block="bottleneck"),
    "resnet101": functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block="bottleneck"),
    "resnet20_cifar": functools.partial(_cifar, stage_sizes=(3, 3, 3)),
    "resnet32_cifar": functools.partial(_cifar, stage_sizes=(5, 5, 5)),
    "resnet44_cifar": functools.partial(_cifar, stage_sizes=(7, 7, 7)),
    "resnet56_cifar": functools.partial(_cifar, stage_sizes=(9, 9, 9)),
    "mcunet": MCUNet,
    "transreid": TransReID,
    "transreid_b16": functools.partial(_transreid_b, jigsaw=True),
    "transreid_b16_stride12": functools.partial(_transreid_b, jigsaw=True, patch_stride=12),
    "transreid_b16_baseline": _transreid_b,
    # As published at https://github.com/damo-cv/TransReID-SSL.
    "transreid_ssl_s16": _transreid_s,
    "transreid_ssl_s16_ics": functools.partial(_transreid_s, stem="ics"),
    "transreid_ssl_b16": _transreid_b,
    "transreid_ssl_b16_ics": functools.partial(_transreid_b, stem="ics"),
    "vmamba": VMamba,
    "vmamba_t": functools.partial(VMamba, depths=(2, 2, 8, 2), ssm_ratio=1.0, width=96),
    "vmamba_s": functools.partial(_vmamba_s2l15, width=96),
    "vmamba_b": functools.partial(_vmamba_s2l15, width=128),
    "swin": Swin,
    "swin_t": functools.partial(_swin, depths=(2, 2, 6, 2)),
    "swin_s": functools.partial(_swin, depths=(2, 2, 18, 2)),
    "swinv2": SwinV2,
    "swinv2_t_w8": functools.partial(_swinv2_t, window_size=8),
    "swinv2_t_w16": functools.partial(_swinv2_t, window_size=16),
    "swinv2_s_w8": functools.partial(_swinv2_s, window_size=8),
    "swinv2_s_w16": functools.partial(_swinv2_s, window_size=16),
    "swinv2_b_w8": functools.partial(_swinv2_b, window_size=8),
    "swinv2_b_w16": functools.partial(_swinv2_b, window_size=16),
    "clip_reid": CLIPReID,
    "clip_reid_b16": functools.partial(CLIPReID, patch_size=16, width=768, depth=12, num_heads=12, projection=512),
    "resnet_reid": ResNetReID,
    "resnet50_reid": _resnet50_reid,
    "resnet50_vanet": functools.partial(_resnet50_reid, branches=2),
    "fcn": FCN,
    "fcn_r50": _fcn_r50,
    "fcn_r101": _fcn_r101,
    "fcn_resnet50": functools.partial(_fcn_r50, implementation="torchvision"),
    "fcn_resnet101": functools.partial(_fcn_r101, implementation="torchvision"),
    "segformer": SegFormer,
    "segformer_b0": functools.partial(SegFormer, widths=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "segformer_b1": functools.partial(_segformer, depths=(2, 2, 2, 2)),
    "segformer_b2": functools.partial(_segformer_wide, depths=(3, 4, 6, 3)),
    "segformer_b3": functools.partial(_segformer_wide, depths=(3, 4, 18, 3)),
    "segformer_b4": functools.partial(_segformer_wide, depths=(3, 8, 27, 3)),
    "segformer_b5": functools.partial(_segformer_wide, depths=(3, 6, 40, 3)),
    "rcnn": RCNN,
    "faster_rcnn_r50": RCNN,
    "mask_rcnn_r50": functools.partial(RCNN, masks=True),
    "mask_rcnn_swin_t": functools.partial(_mask_rcnn_swin, depths=(2, 2, 6, 2)),
    "mask_rcnn_swin_s": functools.partial(_mask_rcnn_swin, depths=(2, 2, 18, 2)),
    "mask_rcnn_swinv2_t": functools.partial(_mask_rcnn_swinv2, depths=(2, 2, 6, 2)),
    "mask_rcnn_swinv2_s": functools.partial(_mask_rcnn_swinv2, depths=(2, 2, 18, 2)),
    "fasterrcnn_resnet50_fpn": _torchvision_rcnn,
    "maskrcnn_resnet50_fpn": functools.partial(_torchvision_rcnn, masks=True),
    "darknet": Darknet,
    # As published by mmdetection; detr_r50 also by facebookresearch and transformers (implementation="facebookresearch").
    "detr": DETR,
    "detr_r50": functools.partial(DETR, stage_sizes=(3, 4, 6, 3)),
    "yolov3_d53": yolov3,
    "atss": ATSS,
    "atss_r50": functools.partial(ATSS, stage_sizes=(3, 4, 6, 3)),
    "centernet": CenterNet,
    "centernet_r50": functools.partial(CenterNet, stage_sizes=(3, 4, 6, 3)),
}


def list_models(pattern: str = "*") -> list[str]:
    """Returns the sorted names that match a shell pattern.

    >>> list_models("resnet*_cifar")
    ['resnet20_cifar', 'resnet32_cifar', 'resnet44_cifar', 'resnet56_cifar']
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, *, num_classes: int, image_size: tuple[int, int], **overrides: Any) -> nn.Module:
    """Makes a backbone by name.

    >>> create_model("resnet20_cifar", num_classes=10, image_size=(32, 32)).stage_sizes
    (3, 3, 3)

    Args:
      name: an entry of `MODELS`, or `PACKAGE.MODULE:NAME` or `FILE.py:NAME` of any Linen module,
        its class or a function that makes it (docs/own_model.md).
      num_classes: number of logits; 0 for features. Passed on if the module has such a field.
      image_size: (height, width) in pixels, likewise.
      **overrides: further fields of the module, such as `dtype`, or `depth` for a smaller ViT.

    Returns:
      The module, without parameters, called as `module(x, train=False)`.

    Raises:
      ConfigError: for an unknown name or option, a module that cannot be imported or is no Linen
        module, a field left unset, or a value that cannot work.
    """
    entry = _entry(name)
    known, any_other = imported.options_of(entry)
    imported.check_options(name, overrides, known, any_other)
    for key in {"dtype", "param_dtype"} & overrides.keys():
        _check_dtype(key, overrides[key])
    given: dict[str, Any] = {**overrides}
    for key, value in (("num_classes", num_classes), ("image_size", image_size)):
        if key in known:
            given.setdefault(key, value)
    # Configuration files give lists; these would make the module unhashable, so that jit could not
    # take it as static.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    missing = [key for key, required in known.items() if required and key not in given]
    if missing:
        raise ConfigError(f'Model "{name}" needs {", ".join(missing)}; give each of them as --config.model.NAME=VALUE.')
    return imported.make(name, entry, given) if imported.is_imported(name) else entry(**given)


def takes_classes(name: str) -> bool:
    """Returns whether a model has a field `num_classes`; of another its output says how many classes there are.

    Raises:
      ConfigError: for an unknown name, or a module that cannot be imported.
    """
    return "num_classes" in imported.options_of(_entry(name))[0]


def _entry(name: str) -> Callable[..., nn.Module]:
    return imported.import_entry(name) if imported.is_imported(name) else lookup(MODELS, name, "model")


def _check_dtype(key: str, value: Any) -> None:
    """Raises ConfigError unless `value` names a floating dtype (or is None)."""
    try:
        floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ConfigError(f'{key} must be a floating dtype such as "float32" or "bfloat16", got {value!r}.')
