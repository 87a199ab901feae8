"""Detections and ground truth as flat arrays, one row a box, in the convention of the VOC devkit.

Boxes here are float64 (N, 4): xmin, ymin, xmax, ymax in pixels counted from 1, both ends inclusive.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nst_det.data.annotation import VocAnnotation, usable_boxes

log = logging.getLogger(__name__)
# COCO's sizes: the area of a box in pixels of the image as it was annotated, up to and including
SMALL, MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class GroundTruth:
    """M annotated objects on I images, of K classes."""

    image_ids: tuple[str, ...]  # I ids, each once
    classes: tuple[str, ...]  # K names
    image: np.ndarray  # (M,) int64 index into image_ids
    label: np.ndarray  # (M,) int64 index into classes
    box: np.ndarray  # (M, 4)
    difficult: np.ndarray  # (M,) bool

    @staticmethod
    def from_annotations(annotations: Iterable[VocAnnotation], classes: Sequence[str]) -> GroundTruth:
        """Flatten annotations of distinct images; objects of other classes than ``classes`` are left out."""
        annotations = list(annotations)
        for annotation in annotations:
            for line in usable_boxes(annotation)[1]:
                log.warning("%s; not trained on, but counted as an object", line)
        ids = tuple(annotation.id for annotation in annotations)
        if len(set(ids)) != len(ids):
            raise ValueError("an image comes twice in the ground truth")
        label_of = {name: label for label, name in enumerate(classes)}
        found = [
            (index, label_of[item.name], item)
            for index, annotation in enumerate(annotations)
            for item in annotation.objects
            if item.name in label_of
        ]
        return GroundTruth(
            ids,
            tuple(classes),
            np.array([index for index, _, _ in found], dtype=np.int64),
            np.array([label for _, label, _ in found], dtype=np.int64),
            np.array([item.box for _, _, item in found], dtype=np.float64).reshape(-1, 4),
            np.array([item.difficult for _, _, item in found], dtype=bool),
        )


@dataclass(frozen=True)
class Detections:
    """N detections, in the order in which ties of the score are broken."""

    image_id: list[str]  # N ids
    classes: tuple[str, ...]  # K names
    label: np.ndarray  # (N,) int64 index into classes
    box: np.ndarray  # (N, 4)
    score: np.ndarray  # (N,) float64

    def __post_init__(self) -> None:
        count = len(self.image_id)
        if self.label.shape != (count,) or self.score.shape != (count,) or self.box.shape != (count, 4):
            raise ValueError(f"{count} ids, but shapes {self.label.shape}, {self.box.shape}, {self.score.shape}")
        if not (np.isfinite(self.score).all() and np.isfinite(self.box).all()):
            raise ValueError("a detection has a score or a box that is not finite")
        if count and not (self.label.min() >= 0 and self.label.max() < len(self.classes)):
            raise ValueError(f"a detection's label is not in 0 .. {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.image_id)

    @staticmethod
    def from_images(
        images: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]], classes: Sequence[str]
    ) -> Detections:
        """Join (id, boxes (n, 4) xyxy 0-based continuous, labels (n,), scores (n,)) of each image."""
        found = list(images)
        boxes = [np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for _, boxes, _, _ in found]
        return Detections(
            [id_ for id_, _, _, scores in found for _ in range(len(scores))],
            tuple(classes),
            np.concatenate([np.zeros(0, np.int64), *(np.asarray(labels, np.int64) for _, _, labels, _ in found)]),
            np.add(np.concatenate([np.zeros((0, 4)), *boxes]), (1, 1, 0, 0)),
            np.concatenate([np.zeros(0), *(np.asarray(scores, np.float64) for _, _, _, scores in found)]),
        )

    def indices(self, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
        """Return image and label of each detection, (N,) int64 each, as ``truth`` counts them."""
        image_of = {id_: index for index, id_ in enumerate(truth.image_ids)}
        label_of = {name: label for label, name in enumerate(truth.classes)}
        names = [self.classes[label] for label in self.label.tolist()]
        for kind, known, given in (("image", image_of, self.image_id), ("class", label_of, names)):
            unknown = next((name for name in given if name not in known), None)
            if unknown is not None:
                raise ValueError(f"a detection of {kind} {unknown!r}, which the ground truth doesn't have")
        image, label = [image_of[id_] for id_ in self.image_id], [label_of[name] for name in names]
        return np.array(image, dtype=np.int64), np.array(label, dtype=np.int64)


@dataclass(frozen=True)
class ObjectCounts:
    """The objects of a class, without the difficult ones; sizes are COCO's, in pixels of the image as annotated."""

    small: int  # up to 32 x 32
    medium: int  # up to 96 x 96
    large: int
    difficult: int
    side: float | None  # median square root of the area

    @property
    def objects(self) -> int:
        """Those of all sizes."""
        return self.small + self.medium + self.large


def count_objects(truth: GroundTruth) -> dict[str, ObjectCounts]:
    """Return the counts of each class."""
    area = (truth.box[:, 2:] - truth.box[:, :2] + 1).clip(min=0).prod(axis=1)
    counts = {}
    for label, name in enumerate(truth.classes):
        mine = truth.label == label
        areas = area[mine & ~truth.difficult]
        up_to_small, up_to_medium = (int((areas <= limit).sum()) for limit in (SMALL, MEDIUM))
        side = float(np.median(np.sqrt(areas))) if len(areas) else None
        sizes = (up_to_small, up_to_medium - up_to_small, len(areas) - up_to_medium)
        counts[name] = ObjectCounts(*sizes, int((mine & truth.difficult).sum()), side)
    return counts


def to_xywh(box: np.ndarray) -> np.ndarray:
    """Return COCO's boxes (N, 4), x, y, width, height in pixels from 0, of boxes as here."""
    corner = box - (1, 1, 0, 0)
    return np.concatenate([corner[:, :2], corner[:, 2:] - corner[:, :2]], axis=1)
