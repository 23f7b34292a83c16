"""Average precision as COCO defines it, from statistics of single images and weights of the images."""

from drep_jax.metrics.detection.average_precision import (
    CURVES,
    METRICS,
    average_precision,
    average_recall,
    of_classes,
)
from drep_jax.metrics.detection.lists import Detected, Truths, statistics_of_lists
from drep_jax.metrics.detection.statistics import AREAS, THRESHOLDS, image_statistics

__all__ = [
    "AREAS",
    "CURVES",
    "METRICS",
    "THRESHOLDS",
    "Detected",
    "Truths",
    "average_precision",
    "average_recall",
    "image_statistics",
    "of_classes",
    "statistics_of_lists",
]
