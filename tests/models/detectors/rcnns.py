"""R-CNNs at full size with the parameters of the public networks, and tiny ones."""

from drep_jax.models import create_model

TRUNK = {"backbone": 23_508_032}
COMMON = {"rpn": 593_935, "box_head": 14_306_705}
R50 = {**TRUNK, **COMMON, "neck": 3_344_384}
SWIN = {**COMMON, "neck": 2_729_984, "mask_head": 2_643_280}
# name: (classes, trainable parameters, those of some parts, tensors of the public files without counters and buffers),
# of mmdetection 3.3.0 and torchvision 0.29.1.
RCNNS = {
    "faster_rcnn_r50": (80, 41_753_056, R50, ("mmdet", 348 - 53)),
    "mask_rcnn_r50": (80, 44_396_336, {**R50, "mask_head": 2_643_280}, ("mmdet", 360 - 53)),
    "mask_rcnn_swinv2_t": (80, 47_850_522, {**SWIN, "backbone": 27_576_618}, None),
    "mask_rcnn_swinv2_s": (80, 69_231_786, {**SWIN, "backbone": 48_957_882}, None),
    "mask_rcnn_swin_t": (80, 47_794_602, {**SWIN, "backbone": 27_520_698}, ("mmdet", 223)),
    "mask_rcnn_swin_s": (80, 69_112_506, {**SWIN, "backbone": 48_838_602}, ("mmdet", 379)),
    "fasterrcnn_resnet50_fpn": (90, 41_808_406, TRUNK, ("torchvision", 295)),
    "maskrcnn_resnet50_fpn": (90, 44_454_513, TRUNK, ("torchvision", 307)),
}
TINY = {
    "depths": (1, 1, 1, 1),
    "width": 2,
    "pyramid_width": 4,
    "head_width": 6,
    "per_level": 12,
    "proposals": 9,
    "keep": 5,
    "candidates": 40,
}
TINY_SWIN = {**TINY, "width": 4, "num_heads": (1, 2, 2, 2), "window_size": 4}


def tiny(num_classes=3, **options):
    """Returns the smallest R-CNN on a trunk."""
    base = TINY if options.get("trunk", "resnet") == "resnet" else TINY_SWIN
    return create_model("rcnn", num_classes=num_classes, image_size=(64, 64), **{**base, **options})
