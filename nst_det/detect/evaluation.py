"""A trained detector on a test split: detections, and what they score."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nst_det.data.voc import VocDataset
from nst_det.detect.torchvision_engine import Detector
from nst_det.evaluate.boxes import Detections, GroundTruth
from nst_det.evaluate.coco import evaluate_coco
from nst_det.evaluate.voc import evaluate_voc
from nst_det.runtime.files import write_text
from nst_det.runtime.progress import progress

COCO_FIGURES = ("AP", "AP50", "AP75")


@torch.no_grad()
def detect(detector: Detector, batches: Iterable[list[dict[str, Any]]], data: VocDataset) -> Detections:
    """The detections on all images of a split, the best of each image first.

    Args:
        detector: is put into evaluation mode, and left in it.
        batches: of these images, with ``image_id``, ``height`` and ``width``.
        data: names the classes.
    """
    detector.eval()
    images: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    with progress("evaluation", len(data)) as meter:
        for batch in batches:
            for item, found in zip(batch, detector(batch)):
                boxes, labels, scores = (found[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
                images.append((item["image_id"], boxes, labels, scores))
                meter.step()
    return Detections.from_images(images, data.classes)


def write_detections(path: str | Path, found: Detections) -> None:
    """Write detections as JSON in COCO's results style, one a line, atomically; ``nst-det evaluate`` reads them."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in found.to_json())
    write_text(path, f"[\n{lines}\n]\n")


def score(found: Detections, data: VocDataset) -> dict[str, Any]:
    """VOC AP at overlap 0.5, and COCO AP, as ``result.json`` holds them.

    Returns:
        ``map`` (mean of the 11-point AP), ``map_area``, ``per_class`` and ``per_class_area`` (name to AP), ``coco``
        (AP, AP50, AP75); all 0..1, None where no object counts.
    """
    truth = GroundTruth.from_annotations(data.annotations(), data.classes)
    voc = evaluate_voc(found, truth).to_dict()
    coco = evaluate_coco(found, truth).to_dict()
    return {
        "map": voc["map"],
        "map_area": voc["map_area"],
        "per_class": {name: numbers["ap11"] for name, numbers in voc["per_class"].items()},
        "per_class_area": {name: numbers["ap_area"] for name, numbers in voc["per_class"].items()},
        "coco": {name: coco[name] for name in COCO_FIGURES},
    }
