"""YOLOv3 on DarkNet-53 (Redmon and Farhadi 2018), the network that both darknet and mmdetection build.

It is written as darknet's `.cfg`, so weights of either fit: darknet's `yolov3.weights` and
mmdetection's files. Layers are numbered as in darknet's own `yolov3.cfg`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import whole
from drep_jax.models.detectors.anchors import YOLOV3_SIZES
from drep_jax.models.detectors.darknet import Darknet

STAGE_SIZES = (1, 2, 8, 8, 4)
"""Residual blocks of the five groups of DarkNet-53."""

COCO_CLASSES = 80


def yolov3(
    num_classes: int = COCO_CLASSES,
    stage_sizes: Sequence[int] = STAGE_SIZES,
    width: int = 32,
    rule: str = "class",
    score: float = 0.05,
    objectness: float = 0.005,
    iou: float = 0.45,
    candidates: int = 1000,
    keep: int = 100,
    clip: bool = False,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    remat: bool = False,
    dtype: Any = "float32",
    param_dtype: Any = "float32",
) -> Darknet:
    """Returns a YOLOv3, whose objects are found as mmdetection does.

    Args:
      num_classes: number of classes; 0, which stands for a network without its head, is COCO's 80,
        as there is none.
      stage_sizes, width: see `yolov3_cfg`.
      rule, score, objectness, iou, candidates, keep: of what is found, see
        `drep_jax.models.detectors.yolo.find_objects`; as darknet does with rule="product",
        score=0.005.
      clip: whether boxes are clipped to the image; mmdetection does not.
      epsilon: of the batch norms.
      axis_name, remat, dtype, param_dtype: as for every backbone.
    """
    return Darknet(
        cfg=yolov3_cfg(num_classes or COCO_CLASSES, stage_sizes=stage_sizes, width=width),
        rule=rule,
        score=score,
        objectness=objectness,
        iou=iou,
        candidates=candidates,
        keep=keep,
        clip=clip,
        epsilon=epsilon,
        axis_name=axis_name,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def yolov3_cfg(num_classes: int, *, stage_sizes: Sequence[int] = STAGE_SIZES, width: int = 32) -> str:
    """Returns the `.cfg` of a YOLOv3.

    Args:
      num_classes: number of classes.
      stage_sizes: residual blocks of each of the five groups; each group halves the maps and doubles
        the channels.
      width: channels of the first convolution, an even number.

    Raises:
      ConfigError: for numbers that cannot work.
    """
    if not whole(stage_sizes, 1) or len(stage_sizes) != len(STAGE_SIZES):
        raise ConfigError(f"stage_sizes must be the number of blocks of each of 5 groups, got {stage_sizes!r}.")
    if not whole((width,), 2) or width % 2:
        raise ConfigError(f"width must be an even number of channels, got {width!r}.")
    if not whole((num_classes,), 1):
        raise ConfigError(f"num_classes must be at least 1, got {num_classes!r}.")
    lines = ["[net]", "width=320", "height=320", "channels=3"]
    sections = _sections(num_classes, stage_sizes, width)
    return "\n".join([*lines, *(line for section in sections for line in section)])


def _sections(num_classes: int, stage_sizes: Sequence[int], width: int) -> Iterator[list[str]]:
    """Yields the sections after [net]."""
    yield _conv(width, 3)
    number, ends = 0, []
    for group, blocks in enumerate(stage_sizes, 1):
        channels = width * 2**group
        yield _conv(channels, 3, stride=2)
        for _ in range(blocks):
            yield _conv(channels // 2, 1)
            yield _conv(channels, 3)
            yield ["[shortcut]", "from=-3", "activation=linear"]
        number += 1 + 3 * blocks
        ends.append(number)
    anchors = ", ".join(f"{w},{h}" for level in YOLOV3_SIZES for w, h in level)
    for level, end in enumerate((None, ends[3], ends[2])):
        channels = width * 2 ** (4 - level)
        if end is not None:
            yield ["[route]", "layers=-4"]
            yield _conv(channels, 1)
            yield ["[upsample]", "stride=2"]
            yield ["[route]", f"layers=-1, {end}"]
        for i in range(6):
            yield _conv(2 * channels, 3) if i % 2 else _conv(channels, 1)
        yield _conv(3 * (5 + num_classes), 1, norm=False)
        mask = ",".join(str(3 * level + i) for i in range(3))
        yield ["[yolo]", f"mask={mask}", f"anchors={anchors}", f"classes={num_classes}"]


def _conv(filters: int, size: int, *, stride: int = 1, norm: bool = True) -> list[str]:
    shape = [f"filters={filters}", f"size={size}", f"stride={stride}", "pad=1"]
    if not norm:
        return ["[convolutional]", *shape, "activation=linear"]
    return ["[convolutional]", "batch_normalize=1", *shape, "activation=leaky"]
