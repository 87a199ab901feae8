"""COCO average precision of the same detections, by pycocotools."""

import contextlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nst_det.evaluation.boxes import Detections, GroundTruth, to_xywh

log = logging.getLogger(__name__)
# detections of a class on an image, the last of COCO's limits
MOST = 100
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class CocoResult:
    """COCO's figures, 0..1; NaN where there is nothing to measure (no object of that size)."""

    # AP (mean over overlaps 0.5, 0.55 .. 0.95), AP50, AP75, and AP of small, medium and large objects
    summary: dict[str, float]
    per_class: dict[str, float]  # AP by class name

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and ``per_class`` for JSON; NaN as None."""
        summary, per_class = (
            {name: None if np.isnan(value) else value for name, value in figures.items()}
            for figures in (self.summary, self.per_class)
        )
        return {**summary, "per_class": per_class}


def evaluate_coco(detections: Detections, truth: GroundTruth) -> CocoResult:
    """Return COCO AP, which takes the best 100 detections of a class on an image and leaves out the rest.

    Where that happens, or where VOC takes equal scores in another order, a line in the log says so.

    A ``difficult`` object becomes a crowd (``iscrowd`` 1), as most converters of VOC write it: it is no positive,
    and detections on it count neither way (overlap with a crowd is measured over the detection's own area).  Boxes
    become 0-based (x, y, width, height), so that overlap is continuous, without VOC's + 1.
    """
    image, label = detections.indices(truth)
    for line in unlike_voc(image, label, detections.score):
        log.warning(line)
    with contextlib.redirect_stdout(io.StringIO()):
        gold = _coco(truth, truth.image, truth.label, truth.box, iscrowd=truth.difficult.astype(int))
        found = _coco(truth, image, label, detections.box, score=detections.score)
        evaluation = COCOeval(gold, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = {}
    for number, name in enumerate(truth.classes):
        # thresholds, recalls, classes, areas (0: all), detections an image (-1: 100)
        precision = evaluation.eval["precision"][:, :, number, 0, -1]
        counted = precision[precision > -1]
        per_class[name] = float(counted.mean()) if counted.size else np.nan
    figures = [np.nan if value < 0 else float(value) for value in evaluation.stats[:6]]
    return CocoResult(dict(zip(SUMMARY, figures)), per_class)


def unlike_voc(image: np.ndarray, label: np.ndarray, score: np.ndarray) -> list[str]:
    """Return what makes COCO AP and VOC AP of these detections, (N,) each, differ besides the overlap."""
    lines = []
    of_class = np.unique(np.stack([image, label]), axis=1, return_counts=True)[1]
    if (over := of_class[of_class > MOST]).size:
        lines.append(
            f"COCO AP leaves out {int((over - MOST).sum())} of {len(score)} detections: it takes the best {MOST} of a "
            f"class on an image, and there are up to {over.max()}; VOC AP takes them all"
        )
    # the sort keeps the order of equal scores: VOC's is that of the file, COCO's goes image by image
    moved = int((np.lexsort((-score, label)) != np.lexsort((image, -score, label))).sum())
    if moved:
        lines.append(
            f"equal scores: VOC AP takes {moved} of {len(score)} detections in the order of the file, COCO AP image by "
            "image, so that the two may differ, and VOC AP changes with that order"
        )
    return lines


def _coco(truth: GroundTruth, image: np.ndarray, label: np.ndarray, box: np.ndarray, **values: np.ndarray) -> COCO:
    """Return boxes as pycocotools has them; unlike its ``loadRes``, none at all are fine."""
    boxes = to_xywh(box)
    columns = {"image_id": image, "category_id": label, "bbox": boxes, "area": boxes[:, 2] * boxes[:, 3], **values}
    rows = zip(*(column.tolist() for column in columns.values()))
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(len(truth.image_ids))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(truth.classes)],
        # numbered from 1: pycocotools takes 0 for no match
        "annotations": [{"id": number, **dict(zip(columns, row))} for number, row in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco
