"""Registry of foreign checkpoint formats; another one is a file here and a line in `FORMATS`."""

from collections.abc import Collection, Sequence

import flax.linen as nn

from drep_jax.errors import CheckpointError, ConfigError, did_you_mean
from drep_jax.weights.formats.cifar_resnet import CIFAR_RESNET
from drep_jax.weights.formats.clip_reid import CLIP, CLIP_REID
from drep_jax.weights.formats.darknet import DARKNET
from drep_jax.weights.formats.detr import FACEBOOK_DETR, MMDET_DETR, RESNET_DETR, TRANSFORMERS_DETR
from drep_jax.weights.formats.dinov2 import DINOV2
from drep_jax.weights.formats.fcn import MMSEG_FCN, MMSEG_FCN_ENCODER, TORCHVISION_FCN, TORCHVISION_FCN_ENCODER
from drep_jax.weights.formats.generic import GENERIC, generic_format
from drep_jax.weights.formats.mcunet import MCUNET
from drep_jax.weights.formats.mmdet_dense import (
    MMDET_ATSS,
    MMDET_CENTERNET,
    MMDET_YOLOV3,
    RESNET_ATSS,
    RESNET_CENTERNET,
)
from drep_jax.weights.formats.rcnn import MMDET_RCNN, RESNET_RCNN, SWIN_RCNN, SWINV2_RCNN, TORCHVISION_RCNN
from drep_jax.weights.formats.resnet_reid import FAST_REID, STRONG_BASELINE, TORCHVISION_REID
from drep_jax.weights.formats.segformer import (
    MMSEG_SEGFORMER,
    MMSEG_SEGFORMER_ENCODER,
    NVLABS_SEGFORMER,
    NVLABS_SEGFORMER_ENCODER,
    TRANSFORMERS_SEGFORMER,
    TRANSFORMERS_SEGFORMER_ENCODER,
)
from drep_jax.weights.formats.swin import SWIN
from drep_jax.weights.formats.swin_v1 import SWIN_V1, TIMM_SWIN
from drep_jax.weights.formats.timm_swinv2 import TIMM_SWINV2
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.formats.torch_encoder_vit import TORCH_ENCODER_VIT
from drep_jax.weights.formats.torchvision_resnet import TIMM_RESNET, TORCHVISION_RESNET
from drep_jax.weights.formats.transreid import TRANSREID_NET, TRANSREID_SSL_TRUNK, TRANSREID_TIMM_TRUNK
from drep_jax.weights.formats.transreid_ssl import TRANSREID, TRANSREID_SSL
from drep_jax.weights.formats.vision_transformer import BIG_VISION, VISION_TRANSFORMER
from drep_jax.weights.formats.vmamba import VMAMBA
from drep_jax.weights.translation import Format, some

# Where the names of two formats are alike, the more special one stands first.
FORMATS: tuple[Format, ...] = (
    DINOV2,
    TRANSREID_SSL,
    TRANSREID,
    TIMM_VIT,
    TRANSREID_NET,
    TRANSREID_SSL_TRUNK,
    TRANSREID_TIMM_TRUNK,
    TORCH_ENCODER_VIT,
    VISION_TRANSFORMER,
    BIG_VISION,
    CIFAR_RESNET,
    TORCHVISION_RESNET,
    TIMM_RESNET,
    MCUNET,
    VMAMBA,
    SWIN,
    TIMM_SWINV2,
    TIMM_SWIN,
    SWIN_V1,
    CLIP,
    CLIP_REID,
    STRONG_BASELINE,
    FAST_REID,
    TORCHVISION_REID,
    DARKNET,
    MMSEG_FCN,
    TORCHVISION_FCN,
    MMSEG_SEGFORMER,
    NVLABS_SEGFORMER,
    TRANSFORMERS_SEGFORMER,
    MMSEG_FCN_ENCODER,
    TORCHVISION_FCN_ENCODER,
    MMSEG_SEGFORMER_ENCODER,
    NVLABS_SEGFORMER_ENCODER,
    TRANSFORMERS_SEGFORMER_ENCODER,
    MMDET_DETR,
    FACEBOOK_DETR,
    TRANSFORMERS_DETR,
    MMDET_ATSS,
    MMDET_CENTERNET,
    MMDET_YOLOV3,
    RESNET_DETR,
    RESNET_ATSS,
    RESNET_CENTERNET,
    MMDET_RCNN,
    TORCHVISION_RCNN,
    RESNET_RCNN,
    SWIN_RCNN,
    SWINV2_RCNN,
)


def find_format(
    module: nn.Module,
    leaves: Collection[str],
    names: Collection[str],
    path: str,
    name: str = "",
    table: Sequence[Format] = (),
) -> Format:
    """Returns the format of a file.

    Args:
      module: the backbone that it is to be read into.
      leaves: paths of its variables with their collections.
      names: of the file's tensors.
      path: of the file, for messages.
      name: of the format, if the user gave it; else it is recognized by the names.
      table: formats to choose among instead of `FORMATS`; of a single one no mark is required.

    Raises:
      ConfigError: if there is no such format for this family of backbones.
      CheckpointError: if the file is of none of the family's formats; says what it is, if that is
        known.
    """
    if known := formats_for(module, leaves, names, name, table):
        return known[0]
    others = [fmt for fmt in FORMATS if fmt.recognizes(names)]
    if others:
        seen = f"It holds a {others[0].family.__name__} in the format {others[0].name}: choose a model of that family."
    else:
        seen = (
            f"Its first names are: {some(sorted(names), 5)}. Those of the module are: {some(sorted(leaves), 5)}. Say how they "
            "correspond in a name table, --config.backbone.init_names=FILE.py (docs/own_model.md)."
        )
    families = ", ".join(sorted({fmt.name for fmt in table or FORMATS if isinstance(module, fmt.family)})) or "none"
    raise CheckpointError(f"{path} is in none of the formats known for a {type(module).__name__} ({families}). {seen}")


def formats_for(
    module: nn.Module, leaves: Collection[str], names: Collection[str], name: str = "", table: Sequence[Format] = ()
) -> list[Format]:
    """Returns the format of names as these: the one asked for, or the first that is recognized; none if there is none.

    Args:
      module: the backbone.
      leaves: paths of its variables with their collections.
      names: of a file's tensors.
      name: of the format, if the user gave it.
      table: formats to choose among instead of `FORMATS`; of a single one no mark is required.

    Raises:
      ConfigError: if there is no format called `name` for this family of backbones.
    """
    if name:
        return [named_format(module, name, table)]
    if len(table) == 1:
        return [table[0]]
    for fmt in table or FORMATS:
        if isinstance(module, fmt.family) and fmt.recognizes(names):
            return [fmt]
    generic = None if table else generic_format(module, leaves, names)
    return [generic] if generic else []


def formats_of(module: nn.Module, table: Sequence[Format] = ()) -> list[str]:
    """Returns the names of the formats for a family of backbones, those of a user's table included."""
    return sorted({fmt.name for fmt in (*table, *FORMATS, *GENERIC) if isinstance(module, fmt.family)})


def named_format(module: nn.Module, name: str, table: Sequence[Format] = ()) -> Format:
    """Returns the format called `name` for this family of backbones, a user's table first.

    Raises:
      ConfigError: if there is none; names those that there are.
    """
    for fmt in (*table, *FORMATS, *GENERIC):
        if fmt.name == name and isinstance(module, fmt.family):
            return fmt
    known = formats_of(module, table)
    raise ConfigError(f'There is no format "{name}" for a {type(module).__name__}.{did_you_mean(name, known)}')
