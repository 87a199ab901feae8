"""Detections and ground truth as flat arrays, one row a box, in the convention of the VOC devkit.

Boxes here are float64 (N, 4): xmin, ymin, xmax, ymax in pixels counted from 1, both ends inclusive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nst_det.data.annotation import VocAnnotation


@dataclass(frozen=True)
class GroundTruth:
    """M annotated objects on I images.

    Attributes:
        image_ids: I ids, each once.
        classes: K class names.
        image: (M,) int64 index into ``image_ids``.
        label: (M,) int64 index into ``classes``.
        box: (M, 4) float64, 1-based inclusive.
        difficult: (M,) bool.
    """

    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    difficult: np.ndarray

    @staticmethod
    def from_annotations(annotations: Iterable[VocAnnotation], classes: Sequence[str]) -> GroundTruth:
        """Flatten annotations; objects of other classes than ``classes`` are left out.

        Raises:
            ValueError: an image comes twice.
        """
        label_of = {name: label for label, name in enumerate(classes)}
        ids: list[str] = []
        rows = []
        for index, annotation in enumerate(annotations):
            ids.append(annotation.id)
            rows += [
                (index, label_of[item.name], item.box, item.difficult)
                for item in annotation.objects
                if item.name in label_of
            ]
        if len(set(ids)) != len(ids):
            raise ValueError("an image comes twice in the ground truth")
        return GroundTruth(
            tuple(ids),
            tuple(classes),
            np.array([row[0] for row in rows], dtype=np.int64),
            np.array([row[1] for row in rows], dtype=np.int64),
            np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
            np.array([row[3] for row in rows], dtype=bool),
        )


@dataclass(frozen=True)
class Detections:
    """N detections, in the order in which ties of the score are broken.

    Attributes:
        image_id: N ids, a list so that Python strings are kept as they are.
        classes: K class names.
        label: (N,) int64 index into ``classes``.
        box: (N, 4) float64, 1-based inclusive.
        score: (N,) float64.
    """

    image_id: list[str]
    classes: tuple[str, ...]
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray

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
        """Join what a detector found on each image.

        Args:
            images: (id, boxes (n, 4) xyxy 0-based continuous, labels (n,), scores (n,)) of each image.
            classes: class names that the labels index.

        Example:
            >>> found = [("000001", np.array([[0.0, 0.0, 10.0, 20.0]]), np.array([0]), np.array([0.9]))]
            >>> Detections.from_images(found, ["cat"]).box
            array([[ 1.,  1., 10., 20.]])
        """
        found = list(images)
        ids = [id_ for id_, _, _, scores in found for _ in range(len(scores))]
        boxes = [np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for _, boxes, _, _ in found]
        labels = [np.asarray(labels, dtype=np.int64) for _, _, labels, _ in found]
        scores = [np.asarray(scores, dtype=np.float64) for _, _, _, scores in found]
        return Detections(
            ids,
            tuple(classes),
            np.concatenate([np.zeros(0, np.int64), *labels]),
            np.add(np.concatenate([np.zeros((0, 4)), *boxes]), (1, 1, 0, 0)),
            np.concatenate([np.zeros(0), *scores]),
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return COCO's results style: image_id and category by name, bbox (x, y, width, height) 0-based, score."""
        corner = self.box - (1, 1, 0, 0)
        sizes = corner[:, 2:] - corner[:, :2]
        xywh = np.concatenate([corner[:, :2], sizes], axis=1).tolist()
        rows = zip(self.image_id, self.label.tolist(), xywh, self.score.tolist())
        return [
            {"image_id": id_, "category": self.classes[label], "bbox": bbox, "score": score}
            for id_, label, bbox, score in rows
        ]
