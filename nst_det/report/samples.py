"""Sample images: what each method finds beside what is there, the worst misses first."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nst_det.data.voc import VocDataset
from nst_det.engine.config import expand_path
from nst_det.engine.io import read_json
from nst_det.errors import UserError
from nst_det.report.schema import BASELINE, Results, Row

log = logging.getLogger(__name__)
SCORE_THRESHOLD = 0.5
IOU_THRESHOLD = 0.5
IMAGES = 6
LONGEST_SIDE = 400
# panels beside the ground truth: the baseline, the leading row, the one after it
FIRST_PANELS = 3
FOUND, MISSED, FALSE, TRUE, DIFFICULT = "found", "missed", "false", "true", "difficult"
Detections = Mapping[str, Sequence[tuple[str, float, NDArray[np.float64]]]]  # image -> (class, score, xyxy)


@dataclass(frozen=True)
class Truth:
    """One test image.

    ``boxes`` are (N, 4) xyxy in 0-based continuous pixels, ``labels`` N class names, ``difficult`` N flags.
    """

    image_id: str
    path: Path
    boxes: NDArray[np.float64]
    labels: tuple[str, ...]
    difficult: NDArray[np.bool_]


def read_truth(config_file: Path) -> list[Truth]:
    """All test images of a run, in the order of the split.

    Args:
        config_file: a run's ``config.json`` (dotted keys); DATASETS.TEST names entries of DATASETS.VOC.

    Raises:
        UserError: the config or the data can't be read any more.
    """
    truth = []
    # classes given, so that they are not looked for in the annotations: only names are used here
    for data in open_test(config_file, ("any",)):
        for id_ in data.ids:
            found = data.annotation(id_)
            boxes = found.boxes.astype(np.float64)
            truth.append(Truth(id_, data.image_path(id_), boxes, found.names, found.difficult))
    return truth


def open_test(config_file: Path, classes: Sequence[str]) -> list[VocDataset]:
    """The data sets that a run was tested on.

    Args:
        config_file: as :func:`read_truth` takes it.
        classes: class names in the order of their labels.

    Raises:
        UserError: the config or the data can't be read any more.
    """
    config = read_json(config_file)
    names = _value(config, "DATASETS.TEST", config_file)
    opened = []
    for name in [names] if isinstance(names, str) else names:
        root, split = (_value(config, f"DATASETS.VOC.{name}.{field}", config_file) for field in ("ROOT", "SPLIT"))
        opened.append(VocDataset(expand_path(root, f"DATASETS.VOC.{name}.ROOT"), split, classes))
    return opened


def _value(config: Any, key: str, file: Path) -> Any:
    if not isinstance(config, dict) or not config.get(key):
        raise UserError(f"{file}: {key} is missing; the report can't find the test images")
    return config[key]


@dataclass(frozen=True)
class Box:
    """A box to draw, in pixels of the shown image; ``kind`` is found, missed, false, true or difficult."""

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
    boxes: tuple[Box, ...]
    found: int = 0
    missed: int = 0
    false: int = 0


@dataclass(frozen=True)
class Sample:
    """One image with the ground truth, the panels to look at first, and those of the other rows."""

    image_id: str
    data: str  # data URI of a JPEG
    width: int
    height: int
    objects: int
    truth: Panel
    panels: tuple[Panel, ...]
    more: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class Samples:
    """The chosen images, the row they were chosen by, or why there are none."""

    samples: tuple[Sample, ...] = ()
    leader: str = ""
    seed: int = 0
    images: int = 0
    reason: str = ""


def choose_samples(results: Results, count: int = IMAGES) -> Samples:
    """The ``count`` images on which the leading row misses most, with every row's detections on them.

    Detections are those of the first seed with a score of at least :data:`SCORE_THRESHOLD`; one finds an object
    by the rule of PASCAL VOC (same class, IoU >= 0.5 in whole pixels, each object once, difficult ones don't count).
    """
    leader = results.leader
    run = leader.runs[0] if leader is not None and leader.runs else None
    if leader is None or run is None or run.run is None:
        return Samples(reason="the results name no run folders")
    try:
        truth = read_truth(run.run / "config.json")
        by_row = {
            row.method: detections for row in results.rows if (detections := _detections(row, run.seed)) is not None
        }
    except (UserError, OSError) as error:
        log.warning("no sample images in the report: %s", error)
        return Samples(reason="the test images or the detections can't be read any more")
    if leader.method not in by_row:
        return Samples(reason=f"{leader.method} has no detections.json")
    ranked = sorted(truth, key=lambda image: _badness(image, by_row[leader.method]))
    first = _first_rows(results, by_row)
    samples: list[Sample] = []
    for image in ranked:
        if len(samples) == count:
            break
        sample = _sample(image, by_row, first)
        if sample is not None:
            samples.append(sample)
    reason = "" if samples else "none of the test images can be read any more"
    return Samples(tuple(samples), leader.method, run.seed, len(truth), reason)


def _first_rows(results: Results, by_row: Mapping[str, Detections]) -> list[str]:
    """The baseline, then the transfer methods from the highest mAP down."""
    best = sorted((row for row in results.rows if row.is_method), key=lambda row: -row.map)
    return [name for name in (BASELINE, *(row.method for row in best)) if name in by_row][:FIRST_PANELS]


def _badness(image: Truth, detections: Detections) -> tuple[int, int, str]:
    found, false = match(image, detections.get(image.image_id, ()))
    missed = int(np.sum(~found & ~image.difficult))
    return -missed, -sum(kind == FALSE for kind in false), image.image_id


def _detections(row: Row, seed: int) -> dict[str, list[tuple[str, float, NDArray[np.float64]]]] | None:
    """Detections above the threshold by image, the best score first; None where the row has no such seed."""
    folder = next((run.run for run in row.runs if run.seed == seed), None)
    if folder is None or not (folder / "detections.json").exists():
        return None
    path = folder / "detections.json"
    by_image: dict[str, list[tuple[str, float, NDArray[np.float64]]]] = {}
    try:
        for entry in read_json(path):
            if entry["score"] >= SCORE_THRESHOLD:
                x, y, width, height = (float(value) for value in entry["bbox"])
                box = np.array([x, y, x + width, y + height])
                by_image.setdefault(str(entry["image_id"]), []).append((str(entry["category"]), entry["score"], box))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of detections ({error}); evaluate this run again") from error
    for found in by_image.values():
        found.sort(key=lambda detection: -detection[1])
    return by_image


def match(
    image: Truth, detections: Sequence[tuple[str, float, NDArray[np.float64]]]
) -> tuple[NDArray[np.bool_], list[str]]:
    """Which objects are found, and for each detection whether it is ``found``, ``false`` or on a ``difficult`` object.

    Args:
        image: the ground truth.
        detections: (class, score, xyxy box in 0-based continuous pixels), the best score first.
    """
    found = np.zeros(len(image.labels), dtype=bool)
    kinds = []
    for label, _, box in detections:
        same = np.array([other == label for other in image.labels], dtype=bool)
        overlaps = np.where(same, _iou(box, image.boxes), -1.0) if len(same) else np.zeros(0)
        best = int(np.argmax(overlaps)) if len(overlaps) else -1
        if best < 0 or overlaps[best] < IOU_THRESHOLD:
            kinds.append(FALSE)
        elif image.difficult[best]:
            kinds.append(DIFFICULT)
        else:
            kinds.append(FALSE if found[best] else FOUND)
            found[best] = True
    return found, kinds


def _iou(box: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of one box with many; continuous edges, which equals the +1 convention on inclusive pixels."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    inner = np.prod(np.clip(sides, 0, None), axis=1)
    outer = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - inner
    return inner / np.maximum(outer, 1e-9)


def _sample(image: Truth, by_row: Mapping[str, Detections], first: Sequence[str]) -> Sample | None:
    picture = _picture(image.path)
    if picture is None:
        return None
    data, width, height, scale = picture
    truth = [
        _box(box, scale, label, DIFFICULT if hard else TRUE)
        for box, label, hard in zip(image.boxes, image.labels, image.difficult)
    ]
    panels = {
        method: _panel(method, image, detections.get(image.image_id, ()), scale)
        for method, detections in by_row.items()
    }
    more = tuple(panel for method, panel in panels.items() if method not in first)
    objects = int(np.sum(~image.difficult))
    return Sample(
        image.image_id,
        data,
        width,
        height,
        objects,
        Panel("ground truth", tuple(truth)),
        tuple(panels[method] for method in first),
        more,
    )


def _panel(method: str, image: Truth, detections: Sequence[tuple[str, float, Any]], scale: float) -> Panel:
    found, kinds = match(image, detections)
    missed = [index for index in range(len(found)) if not found[index] and not image.difficult[index]]
    boxes = [_box(image.boxes[index], scale, image.labels[index], MISSED) for index in missed]
    boxes += [_box(box, scale, label, kind, score) for (label, score, box), kind in zip(detections, kinds)]
    return Panel(method, tuple(boxes), int(found.sum()), len(missed), sum(kind == FALSE for kind in kinds))


def _box(box: NDArray[np.float64], scale: float, label: str, kind: str, score: float | None = None) -> Box:
    x, y, right, bottom = (round(float(value) * scale, 1) for value in box)
    return Box(x, y, round(right - x, 1), round(bottom - y, 1), label, kind, score)


def _picture(path: Path) -> tuple[str, int, int, float] | None:
    """A small JPEG of an image as a data URI, its size and its scale; None where it can't be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        log.warning("%s: left out of the report (%s)", path, type(error).__name__)
        return None
    scale = min(1.0, LONGEST_SIDE / max(rgb.size))
    if scale < 1:
        size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=82)
    data = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return data, rgb.width, rgb.height, scale
