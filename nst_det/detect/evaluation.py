"""A trained detector on a test split: detections, and what they score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nst_det.data.holdout import JoinedVoc
from nst_det.data.voc import VocDataset
from nst_det.detect.torchvision_engine import Detector
from nst_det.evaluate.boxes import Detections, GroundTruth
from nst_det.evaluate.figures import summarize
from nst_det.runtime.files import write_text
from nst_det.runtime.processes import gathered, rank, world_size
from nst_det.runtime.progress import progress

# image id, boxes (N, 4), labels (N,), scores (N,)
Image = tuple[str, np.ndarray, np.ndarray, np.ndarray]


@torch.no_grad()
def detect(detector: Detector, batches: Iterable[list[dict[str, Any]]], data: VocDataset | JoinedVoc) -> Detections:
    """The detections on all images of a split, the best of each image first.

    Args:
        detector: is put into evaluation mode, and left in it.
        batches: of these images, with ``image_id``, ``height`` and ``width``; of several processes, each has its
            share (see :func:`share_of_batches`), and all get all detections.
        data: names the classes.
    """
    detector.eval()
    mine: list[list[Image]] = []
    with progress("evaluation", len(data) // world_size()) as meter:
        for batch in batches:
            mine.append([])
            for item, found in zip(batch, detector(batch)):
                boxes, labels, scores = (found[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
                mine[-1].append((item["image_id"], boxes, labels, scores))
                meter.step()
    # dealt out one by one, so that they come back in the order of the images
    dealt = itertools.chain.from_iterable(itertools.zip_longest(*gathered(mine), fillvalue=[]))
    return Detections.from_images([image for batch in dealt for image in batch], data.classes)


def share_of_batches() -> slice:
    """The evaluation batches of this process: batch k is process k's, modulo their number."""
    return slice(rank(), None, world_size())


def write_detections(path: str | Path, found: Detections) -> None:
    """Write detections as JSON in COCO's results style, one a line, atomically; ``nst-det evaluate`` reads them."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in found.to_json())
    write_text(path, f"[\n{lines}\n]\n")


def score(found: Detections, data: VocDataset | JoinedVoc) -> dict[str, Any]:
    """What ``result.json`` holds of a detector, see :func:`~nst_det.evaluate.figures.summarize`."""
    return summarize(found, GroundTruth.from_annotations(data.annotations(), data.classes))[1]
