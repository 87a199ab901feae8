"""What fits a data set, and the four YAMLs of a project: whole, and depending on no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from nst_det.data.annotation import VocAnnotation, usable_boxes
from nst_det.engine.config import places
from nst_det.errors import UserError

# of the levels p2 .. p6
STRIDES = (4, 8, 16, 32, 64)
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
SMALLEST_SIDE = 64
# the detector pads images to multiples of it, the stride of res5
PADDING = 32
# share of the training images that a detector is validated on, and how often at least
VAL_FRACTION, VALIDATIONS = 0.2, 5
ROUND = (10, 20, 25, 50, 100, 200, 250, 500, 1000)
# ce needs labels
METHODS = ("ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly")
FILES = ("distill.yaml", "detect.yaml", "compare.yaml", "tune.yaml")


@dataclass(frozen=True)
class Preset:
    """What a device can take."""

    longest: int  # side of a detector's image, pixels
    square: int  # side of an image of stage one, pixels
    batch: int  # images of a detector's step
    longer: int  # how many times as long as on a CPU stage one may be
    small: bool  # whether the detector is narrow above its bottom-up, rather than as wide as Detectron2's


PRESETS = {"cpu": Preset(320, 64, 8, 1, small=True), "cuda": Preset(800, 128, 16, 10, small=False)}


@dataclass(frozen=True)
class Network:
    """A timm network of a project."""

    arch: str
    kwargs: Mapping[str, Any]
    published: bool  # begins with timm's published weights
    # of the images that these want, 0..1, RGB
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    classes: int = 0  # of these weights

    @property
    def says(self) -> str:
        """Name and weights, for a person."""
        return f"{self.arch} ({'published weights' if self.published else 'random weights'})"


# plain timm networks made narrow
_NARROW = {"channels": [32, 64, 128, 256], "stem_width": 16, "zero_init_last": False}
SMALL = {"student": Network("resnet10t", _NARROW, False), "teacher": Network("resnet18d", _NARROW, False)}
PUBLISHED = {"student": "resnet18.tv_in1k", "teacher": "resnet50.tv_in1k"}


@dataclass(frozen=True)
class Schedule:
    """Steps and images a step."""

    iterations: int
    batch: int


@dataclass(frozen=True)
class Values:
    """What fits one data set, for the templates; paths are absolute, sizes in pixels."""

    name: str
    folder: Path
    voc: Path
    train: str
    test: str
    classes: Sequence[str]
    student_network: Network
    teacher_network: Network
    small: bool
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
    period: int  # steps of stage two between validations
    val: str  # list to validate on, "" where there is none
    val_fraction: float  # of the training images; 0 where they are too few, or where there is a list
    labels: bool = True  # whether stage one's images have labels; without, a published network teaches


def render(values: Values) -> dict[str, str]:
    """Return the text of :data:`FILES` by name."""
    loader = jinja2.PackageLoader("nst_det.scaffold")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    # without labels kd teaches the published classes, where there are some
    kd = values.labels or values.teacher_network.classes
    environment.globals["methods"] = [one for one in METHODS[not values.labels :] if kd or "kd" not in one.split("+")]
    # JSON is YAML, with names and paths quoted
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False, default=str)
    student = values.student_network
    pixels = {key: [round(255 * part, 3) for part in getattr(student, key)] for key in ("mean", "std")}
    roots = {key: places(getattr(values, key), values.folder) for key in ("voc", "images")}
    return {file: environment.get_template(file).render({**vars(values), **roots, **pixels}) for file in FILES}


def choose_networks(student: str, teacher: str, device: str, labels: bool = True) -> tuple[Network, Network]:
    """Return student and teacher: those named, by timm's names; else small ones on a CPU, on a GPU published ones.

    Published weights are taken where timm has some.  A named student has the teacher that it has on a GPU.  Without
    ``labels`` the teacher is a published one.

    Raises:
        UserError: unknown, or not to be used for its part.
    """
    small, size = device == "cpu", PRESETS[device].square
    if not labels and small:
        teacher = teacher or PUBLISHED["student"]
    found = SMALL["student"], SMALL["teacher"]
    if student or not small:
        found = _named("student", student or PUBLISHED["student"], size), found[1]
    if student or teacher or not small:
        found = found[0], _named("teacher", teacher or PUBLISHED["teacher"], size)
    if not labels and not found[1].published:
        raise UserError(f"--teacher: {teacher} has no published weights, and images without labels train no teacher")
    return found


def _named(who: str, arch: str, size: int) -> Network:
    # torch and timm take seconds to import
    import timm

    from nst_det.models import LEVELS, create_model, feature_levels, take_levels
    from nst_det.models.build import takes_argument
    from nst_det.models.card import published_card

    try:
        model = create_model(arch, 2)
        # one that takes a single size of images has it as an argument
        kwargs: dict[str, Any] = {"img_size": size} if takes_argument(model, "img_size") else {}
        levels = feature_levels(create_model(arch, 2, **kwargs) if kwargs else model)
        if who == "student":
            take_levels(levels, LEVELS, arch)
        published = timm.is_model_pretrained(arch)
    except ValueError as error:
        raise UserError(f"--{who}: {error}") from error
    if not published:
        return Network(arch, kwargs, False)
    wanted = published_card(model, arch).input
    about: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return Network(arch, kwargs, True, wanted["mean"], wanted["std"], int(about.get("num_classes") or 0))


def fit_size(annotations: Sequence[VocAnnotation], largest: int) -> tuple[int, int]:
    """Return the shortest and the longest side of an image, in pixels: medians, the longest at most ``largest``.

    They are multiples of :data:`PADDING`.  Images are never enlarged, except where the shortest side would fall below
    :data:`SMALLEST_SIDE`.
    """
    short = float(np.median([min(item.width, item.height) for item in annotations]))
    long = float(np.median([max(item.width, item.height) for item in annotations]))
    scale = max(min(1.0, largest / long), SMALLEST_SIDE / short)
    shortest = max(int(short * scale) // PADDING * PADDING, SMALLEST_SIDE)
    return shortest, math.ceil(shortest * long / short / PADDING) * PADDING


def box_sizes(annotations: Sequence[VocAnnotation], shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sqrt(area) in pixels of the resized images, and class, of the boxes to train on, each (N,)."""
    # torch takes seconds to import
    from nst_det.detection.data import resized_shape

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


def fit_anchors(sizes: np.ndarray, names: np.ndarray) -> list[int]:
    """Return one anchor size a level, ``p2`` .. ``p6``, in pixels, for the boxes of :func:`box_sizes` (at least one).

    They are the quantiles :data:`QUANTILES` of the sizes, with all classes weighing the same (a frequent class would
    leave a rare one of another size without an anchor), but none is smaller than its level's stride.  A box is in the
    middle of its share of the weight; between two boxes the size is interpolated.
    """
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(sizes, kind="stable")
    weights = (1.0 / count[label] / len(count))[order]
    quantiles = np.interp(QUANTILES, np.cumsum(weights) - weights / 2, sizes[order]).tolist()
    return [max(round(size), stride) for size, stride in zip(quantiles, STRIDES)]


def fit_detection(images: int, device: str) -> Schedule:
    """Return the steps of stage two: six passes on a CPU (150 to 600 steps), 24 on a GPU (500 to 9000)."""
    batch = min(PRESETS[device].batch if images >= 64 else 4, images)
    if device == "cpu":
        return Schedule(_clamp(6 * images / batch, 150, 600), batch)
    return Schedule(_clamp(24 * images / batch, 500, 9000), batch)


def fit_distillation(images: int, device: str) -> tuple[Schedule, Schedule]:
    """Steps of stage one, for teacher and students: 15 and 10 passes over the images, within bounds."""
    batch = 64 if images >= 256 else 16 if images >= 64 else max(2, min(8, images))
    longer = PRESETS[device].longer
    teacher = _clamp(15 * images / batch, 300, 1500 * longer)
    return Schedule(teacher, batch), Schedule(_clamp(10 * images / batch, 150, 900 * longer), batch)


def fit_period(iterations: int) -> int:
    """Return a round number of steps between two validations, and between two checkpoints."""
    return max(number for number in ROUND if number * VALIDATIONS <= max(iterations, ROUND[0] * VALIDATIONS))


def _clamp(value: float, low: int, high: int) -> int:
    """Return a round number of steps within the bounds."""
    unit = 50 if value <= 1000 else 100
    return min(max(math.ceil(value / unit) * unit, low), high)
