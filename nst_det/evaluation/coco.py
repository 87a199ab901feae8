"""COCO average precision of the same detections, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nst_det.evaluation.boxes import Detections, GroundTruth

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class CocoResult:
    """COCO's figures, 0..1; NaN where there is nothing to measure (no object of that size).

    Attributes:
        summary: AP (mean over overlaps 0.5, 0.55 .. 0.95), AP50, AP75, and AP of small, medium and large objects.
        per_class: AP by class name.
    """

    summary: dict[str, float]
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and ``per_class`` for JSON; NaN as None."""
        return {**_plain(self.summary), "per_class": _plain(self.per_class)}


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in figures.items()}


def evaluate_coco(detections: Detections, truth: GroundTruth) -> CocoResult:
    """Return COCO AP with at most 100 detections an image.

    A ``difficult`` object becomes a crowd (``iscrowd`` 1), as converters of VOC to COCO write it: it is no positive,
    and detections on it count neither way (overlap with a crowd is measured over the detection's own area).  Boxes
    become 0-based (x, y, width, height), so that overlap is continuous, without VOC's + 1.

    Raises:
        ValueError: a detection on an image, or of a class, that the ground truth doesn't have.
    """
    image_of = {id_: number for number, id_ in enumerate(truth.image_ids, 1)}
    label_of = {name: number for number, name in enumerate(truth.classes, 1)}
    results = _results(detections, image_of, label_of)
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {
            "info": {},
            "images": [{"id": number} for number in image_of.values()],
            "categories": [{"id": number, "name": name} for name, number in label_of.items()],
            "annotations": _annotations(truth),
        }
        gold.createIndex()
        found = gold.loadRes(results) if results else _nothing(gold)
        evaluation = COCOeval(gold, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # thresholds, recalls, classes, areas (0: all), detections an image (-1: 100)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {name: _mean(precision[:, :, number - 1]) for name, number in label_of.items()}
    figures = [np.nan if value < 0 else float(value) for value in evaluation.stats[:6]]
    return CocoResult(dict(zip(SUMMARY, figures)), per_class)


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else np.nan


def _xywh(box: np.ndarray) -> list[list[float]]:
    xywh: list[list[float]] = np.concatenate([box[:, :2] - 1, box[:, 2:] - box[:, :2] + 1], axis=1).tolist()
    return xywh


def _annotations(truth: GroundTruth) -> list[dict[str, Any]]:
    rows = zip(truth.image.tolist(), truth.label.tolist(), _xywh(truth.box), truth.difficult.tolist())
    return [
        {
            "id": number,
            "image_id": image + 1,
            "category_id": label + 1,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": int(difficult),
        }
        for number, (image, label, bbox, difficult) in enumerate(rows, 1)
    ]


def _results(detections: Detections, image_of: dict[str, int], label_of: dict[str, int]) -> list[dict[str, Any]]:
    names = [detections.classes[label] for label in detections.label.tolist()]
    rows = zip(detections.image_id, names, _xywh(detections.box), detections.score.tolist())
    try:
        return [
            {"image_id": image_of[id_], "category_id": label_of[name], "bbox": bbox, "score": score}
            for id_, name, bbox, score in rows
        ]
    except KeyError as error:
        raise ValueError(
            f"a detection on image or of class {error.args[0]!r}, which is not in the ground truth"
        ) from None


def _nothing(gold: COCO) -> COCO:
    # pycocotools can't load an empty list
    found = COCO()
    found.dataset = {**gold.dataset, "annotations": []}
    found.createIndex()
    return found
