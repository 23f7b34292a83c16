"""mmdetection without its compiled operations: torchvision's stand in for the few of `mmcv.ops` that detectors here run.

    pip install --no-deps mmdet==3.3.0 mmcv-lite==2.1.0 mmengine; pip install addict yapf termcolor rich six scipy \\
        terminaltables shapely pycocotools opencv-python-headless matplotlib

Call `mmdet()` before importing anything of it; tests are skipped where it is missing.
"""

import importlib
import sys
import types
import warnings

import pytest
import torch
import torchvision


class RoIAlign(torch.nn.Module):
    """mmcv's layer by torchvision's function; they share the sampling, 0 standing for the adaptive one."""

    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True):
        super().__init__()
        self.output_size = (output_size,) * 2 if isinstance(output_size, int) else output_size
        self.spatial_scale, self.sampling_ratio, self.aligned = spatial_scale, sampling_ratio, aligned

    def forward(self, maps, rois):
        return roi_align(maps, rois, self.output_size, self.spatial_scale, self.sampling_ratio, "avg", self.aligned)


def roi_align(maps, rois, size, scale=1.0, samples=0, mode="avg", aligned=True):
    return torchvision.ops.roi_align(maps, rois, size, scale, samples if samples > 0 else -1, aligned)


def batched_nms(boxes, scores, classes, nms_cfg, class_agnostic=False):
    """Exact: classes are compared, and not told apart by shifted coordinates."""
    keep = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, nms_cfg["iou_threshold"])
    keep = keep[: nms_cfg.get("max_num", len(keep))]
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


class _Missing:
    """What is imported by name and never run here."""


SUBMODULES = (
    "multi_scale_deform_attn",
    "nms",
    "carafe",
    "merge_cells",
    "roi_align",
    "modulated_deform_conv",
    "deform_conv",
)


def mmdet():
    """Returns mmdetection with all its models registered, or skips the tests."""
    for name in ("mmengine", "mmcv"):
        pytest.importorskip(name, reason="needs mmdetection: see tests/parity/mmdet_side.py")
    if "mmcv.ops" not in sys.modules:

        class Operations(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (_Missing,), {})

        operations = Operations("mmcv.ops")
        operations.RoIAlign, operations.roi_align, operations.batched_nms = RoIAlign, roi_align, batched_nms
        operations.__path__ = []
        sys.modules["mmcv.ops"] = operations
        for name in SUBMODULES:
            sys.modules[f"mmcv.ops.{name}"] = Operations(f"mmcv.ops.{name}")
        sys.modules["mmcv.ops.roi_align"].roi_align = roi_align
        sys.modules["mmcv.ops.nms"].batched_nms = batched_nms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is not ours to mend
        pytest.importorskip("mmdet.models", reason="needs mmdetection: see tests/parity/mmdet_side.py")
        scopes = importlib.import_module("mmengine.registry").DefaultScope
        scopes.get_instance("mmdet", scope_name="mmdet")
        return importlib.import_module("mmdet")
