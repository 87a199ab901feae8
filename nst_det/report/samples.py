"""Sample images: what each method finds and what is there, the worst misses first."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nst_det.comparison.result import BASELINE, ComparisonResult
from nst_det.data.annotation import VocAnnotation
from nst_det.data.voc import VocDataset
from nst_det.engine.config import expand_path
from nst_det.engine.io import read_json
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections
from nst_det.evaluation.io import detections_from_json
from nst_det.evaluation.thresholds import DEFAULT, read_thresholds

log = logging.getLogger(__name__)
IOU_THRESHOLD = 0.5
IMAGES = 6
LONGEST_SIDE = 400
# panels next to the ground truth: the baseline, the leading row, the one after it
FIRST_PANELS = 3
FOUND, MISSED, FALSE, TRUE, DIFFICULT = "found", "missed", "false", "true", "difficult"
# class, score, xyxy in 0-based continuous pixels; the best score first
Found = Sequence[tuple[str, float, NDArray[Any]]]


@dataclass(frozen=True)
class Box:
    """A box to draw, in pixels of the image; ``kind`` is found, missed, false, true or difficult."""

    x: float
    y: float
    width: float
    height: float
    label: str
    kind: str
    score: float | None = None


@dataclass(frozen=True)
class Panel:
    """One image as one method sees it (or as it is)."""

    title: str
    boxes: list[Box]

    def count(self, kind: str) -> int:
        """Return how many boxes are of a kind."""
        return sum(box.kind == kind for box in self.boxes)


@dataclass(frozen=True)
class Sample:
    """One image, a small JPEG as data URI, the ground truth, the panels to look at first, and those of other rows."""

    image_id: str
    data: str
    width: int
    height: int
    truth: Panel
    panels: list[Panel]
    more: list[Panel]


@dataclass(frozen=True)
class Samples:
    """The chosen images, the row they were chosen by, or why there are none."""

    samples: Sequence[Sample] = ()
    leader: str = ""
    seed: str = ""
    images: int = 0
    reason: str = ""
    # whether its least scores were chosen on a validation split
    validated: bool = False


def open_data(run: Path, classes: Sequence[str], part: str = "TEST") -> list[VocDataset]:
    """Return the data set that a run's figures are of, or those of ``TRAIN``, as its ``config.json`` names them."""
    config = RunFolder(run).config()

    def value(key: str) -> Any:
        if not isinstance(config, dict) or not config.get(key):
            raise UserError(f"{run / 'config.json'}: {key} is missing; the report can't find the images")
        return config[key]

    opened = []
    names = value(f"DATASETS.{part}")
    # of several to test on, a run's figures and detections are those of the first
    for name in names[:1] if part == "TEST" else names:
        root, split = (f"DATASETS.VOC.{name}.{field}" for field in ("ROOT", "SPLIT"))
        opened.append(VocDataset(expand_path(value(root), root), value(split), classes))
    return opened


def read_detections(run: Path, image_ids: Sequence[str], classes: Sequence[str]) -> Detections:
    """Return what the detector of a run found on its test images."""
    path = run / "detections.json"
    return detections_from_json(read_json(path), image_ids, classes, str(path))


def least_scores(run: Path, classes: Sequence[str]) -> list[float]:
    """Return the score that a detection of each class needs: of best F1 on the validation split, or 0.5."""
    best = read_thresholds(run)
    return [best[name].score if name in best else DEFAULT for name in classes]


def choose_samples(results: ComparisonResult, runs: Path) -> Samples:
    """Choose the :data:`IMAGES` images on which the leading row misses most, with every row's detections on them.

    Detections are those of the first seed with at least the scores of :func:`least_scores`.
    """
    if not results.classes:
        return Samples()
    leader = results.leader
    assert leader is not None, "every comparison has the row ce"
    seed = min(leader.per_seed, key=int)
    folders = {row.method: runs / str(row.per_seed[seed].run) for row in results.rows if seed in row.per_seed}
    try:
        tests = open_data(folders[leader.method], results.classes)
        truth = [(image, data.image_path(image.id)) for data in tests for image in data.annotations()]
        ids = [image.id for image, _ in truth]
        by_row = {
            method: _by_image(read_detections(folder, ids, results.classes), least_scores(folder, results.classes))
            for method, folder in folders.items()
            if (folder / "detections.json").exists()
        }
    except (UserError, OSError) as error:
        log.warning("no sample images in the report: %s", error)
        return Samples(reason="the test images or the detections can't be read any more")
    if leader.method not in by_row:
        return Samples(reason=f"{leader.method} has no detections.json")

    def panel(method: str, image: VocAnnotation) -> Panel:
        return _panel(method, image, by_row[method].get(image.id, ()))

    def badness(entry: tuple[VocAnnotation, Path]) -> tuple[int, int, str]:
        shown = panel(leader.method, entry[0])
        return -shown.count(MISSED), -shown.count(FALSE), entry[0].id

    best = sorted(results.methods, key=lambda row: -row.score)
    first = [name for name in (BASELINE, *(row.method for row in best)) if name in by_row][:FIRST_PANELS]
    samples: list[Sample] = []
    for image, path in sorted(truth, key=badness):
        if len(samples) < IMAGES and (picture := _read_picture(path)) is not None:
            objects = zip(image.boxes, image.names, image.difficult)
            boxes = [_box(box, label, DIFFICULT if hard else TRUE) for box, label, hard in objects]
            panels = [panel(method, image) for method in first]
            more = [panel(method, image) for method in by_row if method not in first]
            samples.append(Sample(image.id, *picture, Panel("ground truth", boxes), panels, more))
    reason = "" if samples else "none of the test images can be read any more"
    return Samples(samples, leader.method, seed, len(truth), reason, bool(read_thresholds(folders[leader.method])))


def _by_image(found: Detections, least: Sequence[float]) -> dict[str, list[tuple[str, float, NDArray[Any]]]]:
    by_image: dict[str, list[tuple[str, float, NDArray[Any]]]] = {}
    for index in np.argsort(-found.score, kind="stable"):
        if (score := float(found.score[index])) >= least[found.label[index]]:
            one = (found.classes[found.label[index]], score, found.box[index] - (1, 1, 0, 0))
            by_image.setdefault(found.image_id[index], []).append(one)
    return by_image


def match(image: VocAnnotation, detections: Found) -> tuple[NDArray[np.bool_], list[str]]:
    """Return which objects are found, and whether each detection is ``found``, ``false`` or on a ``difficult`` one.

    The rule is PASCAL VOC's: same class, IoU >= 0.5 in whole pixels, each object once, difficult ones don't count.
    """
    found = np.zeros(len(image.names), dtype=bool)
    kinds = []
    for label, _, box in detections:
        overlaps = np.where([name == label for name in image.names], _iou(box, image.boxes), -1.0)
        best = int(np.argmax(overlaps)) if len(overlaps) else -1
        if best < 0 or overlaps[best] < IOU_THRESHOLD:
            kinds.append(FALSE)
        elif image.difficult[best]:
            kinds.append(DIFFICULT)
        else:
            kinds.append(FALSE if found[best] else FOUND)
            found[best] = True
    return found, kinds


def _iou(box: NDArray[Any], boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Return IoU of one box with many; continuous edges, which equals the +1 convention on inclusive pixels."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    inner = np.prod(np.clip(sides, 0, None), axis=1)
    outer = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - inner
    return inner / np.maximum(outer, 1e-9)


def _panel(method: str, image: VocAnnotation, detections: Found) -> Panel:
    found, kinds = match(image, detections)
    missed = np.flatnonzero(~found & ~image.difficult)
    boxes = [_box(image.boxes[index], image.names[index], MISSED) for index in missed]
    boxes += [_box(box, label, kind, score) for (label, score, box), kind in zip(detections, kinds)]
    return Panel(method, boxes)


def _box(box: NDArray[Any], label: str, kind: str, score: float | None = None) -> Box:
    x, y, right, bottom = (round(float(value), 1) for value in box)
    return Box(x, y, round(right - x, 1), round(bottom - y, 1), label, kind, score)


def _read_picture(path: Path) -> tuple[str, int, int] | None:
    """Return a small JPEG of an image as data URI, and the image's width and height; None where it can't be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        log.warning("%s: left out of the report (%s)", path, type(error).__name__)
        return None
    width, height = picture.size
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", width, height
