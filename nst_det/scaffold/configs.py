"""The three YAMLs of a project: whole, commented, and depending on no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nst_det.data.annotation import VocAnnotation, usable_boxes
from nst_det.detection.data import resized_shape

STRIDES = (4, 8, 16, 32, 64)
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
SMALLEST_SIDE = 64
DISTILL = """\
# Stage one: a teacher, and one student a transfer method.
#   nst-det distill --config-file {file}
NAME: {name}
OUTPUT_DIR: {output_distill}
METHODS: [ce, kd, fitnet, at, nst-poly, kd+nst-poly]
SEED: 0
DATA:
  # {images_note}
  ROOT: {images}
  IMAGE_SIZE: {image_size}
  MEAN: [0.485, 0.456, 0.406]
  STD: [0.229, 0.224, 0.225]
  AUGMENT: {{SHIFT: {shift}, HFLIP: 0.5}}
TEACHER:
  ARCH: nst_resnet18_w48
  # your own teacher: a backbone file or a plain state dict of ARCH
  WEIGHTS: ""
  # raise it, and a teacher that is worse stops the run before its students learn from it
  EXPECTED_TOP1: 0.0
  SOLVER: {{MAX_ITER: {teacher.iterations}, BASE_LR: 0.004}}
STUDENT:
  ARCH: nst_resnet10_w32
TRANSFER:
  LEVELS: [res3, res4]
  WEIGHTS: {{kd: 1.0, at: 10.0, fitnet: 30.0, nst-linear: 100.0, nst-poly: 100.0, nst-gaussian: 100.0}}
SOLVER:
  OPTIMIZER: ADAMW
  BASE_LR: 0.006
  WEIGHT_DECAY: 0.05
  SCHEDULE: onecycle
  MAX_ITER: {student.iterations}
  IMS_PER_BATCH: {student.batch}
  CLIP_GRADIENTS: 5.0
DATALOADER:
  # none on a CPU; with a GPU one a core, up to 8
  NUM_WORKERS: -1
CHECKPOINT_PERIOD: 100
LOG_PERIOD: 10
"""
DETECT = """\
# Stage two: a small Faster R-CNN with FPN, {size[0]} x {size[1]} pixels.
#   nst-det train-det --config-file {file} MODEL.WEIGHTS backbone://NAME
ENGINE: torchvision
OUTPUT_DIR: {output_detect}
MODEL:
  # a GPU where there is one
  DEVICE: auto
  META_ARCHITECTURE: GeneralizedRCNN
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE:
    NAME: build_timm_fpn_backbone
    FREEZE_AT: 0
  TIMM:
    ARCH: nst_resnet10_w32
    NORM: BN
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN:
    IN_FEATURES: [res2, res3, res4, res5]
    OUT_CHANNELS: 64
  ANCHOR_GENERATOR:
    # quantiles .1 .3 .5 .7 .9 of the boxes' sizes after resizing (classes weigh the same), at least the level's stride
    SIZES: {anchors}
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    BATCH_SIZE_PER_IMAGE: 64
    PRE_NMS_TOPK_TRAIN: 400
    PRE_NMS_TOPK_TEST: 400
    POST_NMS_TOPK_TRAIN: 150
    POST_NMS_TOPK_TEST: 100
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    NUM_CLASSES: {num_classes}
    BATCH_SIZE_PER_IMAGE: 64
    SCORE_THRESH_TEST: 0.02
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_FC: 2
    FC_DIM: 256
    POOLER_RESOLUTION: 5
    POOLER_SAMPLING_RATIO: 1
    # boxes of the median size are pooled from p3
    CANONICAL_BOX_SIZE: {median}
    CANONICAL_LEVEL: 3
DATASETS:
  VOC:
    own_train: {{ROOT: {voc}, SPLIT: {train}}}
    own_test: {{ROOT: {voc}, SPLIT: {test}}}
  TRAIN: [own_train]
  TEST: [own_test]
  CLASSES: {classes}
INPUT:
  FORMAT: RGB
  MIN_SIZE_TRAIN: [{size[0]}]
  MAX_SIZE_TRAIN: {size[1]}
  MIN_SIZE_TEST: {size[0]}
  MAX_SIZE_TEST: {size[1]}
DATALOADER:
  # none on a CPU, where images are decoded once and stay in memory; with a GPU one a core, up to 8
  NUM_WORKERS: -1
SOLVER:
  OPTIMIZER: ADAMW
  BASE_LR: 0.002
  # a pre-trained backbone; a random one wants 1.0
  BACKBONE_MULTIPLIER: 0.3
  LR_SCHEDULER_NAME: WarmupCosineLR
  WARMUP_ITERS: 20
  WARMUP_FACTOR: 0.05
  MAX_ITER: {detection.iterations}
  IMS_PER_BATCH: {detection.batch}
  CHECKPOINT_PERIOD: {period}
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: norm
    CLIP_VALUE: 10.0
  AMP:
    ENABLED: True
TEST:
  DETECTIONS_PER_IMAGE: {detections}
SEED: 0
"""
COMPARE = """\
# Which transfer method makes the better detector of your objects.
#   nst-det compare --config-file {file}
NAME: {name}
OUTPUT_DIR: {output}
ENGINE: torchvision
METHODS: [ce, kd, fitnet, at, nst-poly, kd+nst-poly]
# with one seed, a difference can't be told from noise
SEEDS: [0, 1, 2]
DISTILL:
  CONFIG: distill.yaml
DETECT:
  CONFIG: detect.yaml
  # a random backbone has to learn as fast as the heads
  SCRATCH_OPTS: [SOLVER.BACKBONE_MULTIPLIER, 1.0]
"""


@dataclass(frozen=True)
class Preset:
    """What a device can take.

    Attributes:
        longest: side of a detector's image, in pixels.
        square: side of an image of stage one, in pixels.
        batch: images of a detector's step.
        longer: how many times as long as on a CPU stage one may be.
    """

    longest: int
    square: int
    batch: int
    longer: int


PRESETS = {"cpu": Preset(320, 64, 8, 1), "cuda": Preset(800, 128, 16, 10)}


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


def box_sizes(annotations: Sequence[VocAnnotation], shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """How large the boxes are that are trained on.

    Returns:
        Square root of the area of each, in pixels of the resized images, (N,) float64; and its class name, (N,).
    """
    sizes, names = [np.zeros(0)], [np.zeros(0, dtype=np.str_)]
    for item in annotations:
        keep, _ = usable_boxes(item)
        keep &= ~item.difficult
        boxes = item.boxes[keep].astype(np.float64)
        height, width = resized_shape(item.height, item.width, shortest, longest)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (width / item.width, height / item.height)
        sizes.append(np.sqrt(sides.prod(axis=1)))
        names.append(np.array(item.names, dtype=np.str_)[keep])
    return np.concatenate(sizes), np.concatenate(names)


def balanced_quantiles(sizes: np.ndarray, names: np.ndarray, at: Sequence[float]) -> list[float]:
    """Quantiles of sizes in which every class weighs the same, however many boxes it has.

    A box stands in the middle of its share of the weight; between two boxes the size is interpolated.

    Args:
        sizes: (N,), at least one.
        names: (N,) class names.
        at: 0..1.

    Example:
        >>> balanced_quantiles(np.array([9.0, 2.0, 2.0, 2.0]), np.array(["b", "a", "a", "a"]), [0.25, 0.75])
        [2.0, 9.0]
    """
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(sizes, kind="stable")
    weights = (1.0 / count[label] / len(count))[order]
    quantiles: list[float] = np.interp(at, np.cumsum(weights) - weights / 2, sizes[order]).tolist()
    return quantiles


def fit_anchors(sizes: np.ndarray, names: np.ndarray) -> list[int]:
    """One anchor size a level, ``p2`` .. ``p6``, in pixels.

    They are the quantiles :data:`QUANTILES` of the boxes' sizes with all classes weighing the same (a frequent class
    would leave a rare one of another size without an anchor), but none is smaller than its level's stride: its map
    has no finer places.

    Args:
        sizes: (N,) from :func:`box_sizes`, N at least 1.
        names: (N,) likewise.

    Example:
        >>> fit_anchors(np.array([20.0, 40.0, 60.0, 80.0, 100.0]), np.array(["cat"] * 5))
        [20, 40, 60, 80, 100]
    """
    quantiles = balanced_quantiles(sizes, names, QUANTILES)
    return [max(round(size), stride) for size, stride in zip(quantiles, STRIDES)]


def fit_detection(images: int, device: str) -> Schedule:
    """Steps of stage two: six passes over the images on a CPU (150 to 600 steps), 24 on a GPU (500 to 9000)."""
    batch = min(PRESETS[device].batch if images >= 64 else 4, images)
    if device == "cpu":
        return Schedule(_between(6 * images / batch, 150, 600), batch)
    return Schedule(_between(24 * images / batch, 500, 9000), batch)


def fit_distillation(images: int, device: str) -> tuple[Schedule, Schedule]:
    """Steps of stage one, for teacher and students: 15 and 10 passes over the images, within bounds."""
    batch = 64 if images >= 256 else 16 if images >= 64 else max(2, min(8, images))
    longer = PRESETS[device].longer
    teacher = _between(15 * images / batch, 300, 1500 * longer)
    return Schedule(teacher, batch), Schedule(_between(10 * images / batch, 150, 900 * longer), batch)


def _between(value: float, low: int, high: int) -> int:
    return min(max(math.ceil(value), low), high)


@dataclass(frozen=True)
class Values:
    """What fits one data set; paths are absolute, sizes in pixels."""

    name: str
    folder: Path
    voc: Path
    train: str
    test: str
    classes: Sequence[str]
    images: Path
    images_note: str
    image_size: int
    size: tuple[int, int]
    anchors: Sequence[int]
    median: int
    most_objects: int
    teacher: Schedule
    student: Schedule
    detection: Schedule


def render(values: Values) -> dict[str, str]:
    """The text of ``distill.yaml``, ``detect.yaml`` and ``compare.yaml``."""
    fields: dict[str, Any] = {
        "images_note": values.images_note,
        "image_size": values.image_size,
        # a tenth of the image
        "shift": round(values.image_size / 10),
        "size": values.size,
        "num_classes": len(values.classes),
        "median": values.median,
        "teacher": values.teacher,
        "student": values.student,
        "detection": values.detection,
        "period": max(25, values.detection.iterations // 4),
        "detections": max(50, 2 * values.most_objects),
        # JSON is YAML, with names and paths quoted
        "anchors": json.dumps([[size] for size in values.anchors]),
        "classes": json.dumps(list(values.classes), ensure_ascii=False),
        "images": _quoted(values.images),
        "voc": _quoted(values.voc),
        "train": _quoted(values.train),
        "test": _quoted(values.test),
        "name": _quoted(values.name),
    }
    output = values.folder / "output"
    fields |= {
        "output": _quoted(output),
        "output_distill": _quoted(output / "distill"),
        "output_detect": _quoted(output / "detect"),
    }
    templates = {"distill.yaml": DISTILL, "detect.yaml": DETECT, "compare.yaml": COMPARE}
    return {file: template.format(**fields, file=values.folder / file) for file, template in templates.items()}


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)
