"""Values that fit a data set: image size, anchors, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nst_det.data.annotation import VocAnnotation, usable_boxes
from nst_det.detect.dataset import resized_shape

STRIDES = (4, 8, 16, 32, 64)
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
# longest side of an image in pixels, by device
LARGEST = {"cpu": 320, "cuda": 640}
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Schedule:
    """Steps and images a step."""

    iterations: int
    batch: int


def fit_size(annotations: Sequence[VocAnnotation], largest: int) -> tuple[int, int]:
    """(shortest, longest) side of the resized images, in pixels.

    The typical image (medians of both sides) is made no longer than ``largest`` and never blown up, except where its
    shortest side would fall below :data:`SMALLEST_SIDE`.

    Example:
        >>> fit_size([VocAnnotation("a", 640, 480, ())], 320)
        (240, 320)
    """
    short = float(np.median([min(item.width, item.height) for item in annotations]))
    long = float(np.median([max(item.width, item.height) for item in annotations]))
    scale = max(min(1.0, largest / long), SMALLEST_SIDE / short)
    return round(short * scale), round(long * scale)


def box_sizes(annotations: Sequence[VocAnnotation], shortest: int, longest: int) -> np.ndarray:
    """Square root of the area of every box that is trained on, in pixels of the resized images, (N,) float64."""
    sizes = []
    for item in annotations:
        keep, _ = usable_boxes(item)
        boxes = item.boxes[keep & ~item.difficult].astype(np.float64)
        height, width = resized_shape(item.height, item.width, shortest, longest)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (width / item.width, height / item.height)
        sizes.append(np.sqrt(sides.prod(axis=1)))
    return np.concatenate(sizes) if sizes else np.zeros(0)


def fit_anchors(sizes: np.ndarray) -> list[int]:
    """One anchor size a level, ``p2`` .. ``p6``, in pixels.

    They are the quantiles :data:`QUANTILES` of the boxes' sizes, so that each serves about a fifth of the boxes, but
    none smaller than its level's stride: its map has no finer places.

    Args:
        sizes: from :func:`box_sizes`, at least one.

    Example:
        >>> fit_anchors(np.arange(1.0, 101.0))
        [11, 31, 50, 70, 90]
    """
    quantiles = np.quantile(sizes, QUANTILES).tolist()
    return [max(round(size), stride) for size, stride in zip(quantiles, STRIDES)]


def fit_detection(images: int, device: str) -> Schedule:
    """Steps of stage two: six passes over the images on a CPU (150 to 600 steps), 24 on a GPU (500 to 18000)."""
    batch = min(8 if images >= 64 else 4, images)
    if device == "cpu":
        return Schedule(_between(6 * images / batch, 150, 600), batch)
    return Schedule(_between(24 * images / batch, 500, 18000), batch)


def fit_distillation(images: int, device: str) -> tuple[Schedule, Schedule]:
    """Steps of stage one, for teacher and students: 15 and 10 passes over the images, within bounds."""
    batch = 64 if images >= 256 else 16 if images >= 64 else max(2, min(8, images))
    longer = 1 if device == "cpu" else 10
    teacher = _between(15 * images / batch, 300, 1500 * longer)
    return Schedule(teacher, batch), Schedule(_between(10 * images / batch, 150, 900 * longer), batch)


def _between(value: float, low: int, high: int) -> int:
    return min(max(math.ceil(value), low), high)
