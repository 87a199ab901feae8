"""How many objects of which size a split has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nst_det.evaluation.boxes import GroundTruth

# COCO's sizes: the area of a box in pixels of the image as it was annotated, up to and including
SMALL, MEDIUM = 32**2, 96**2


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
    area = (truth.box[:, 2:] - truth.box[:, :2] + 1).prod(axis=1)
    counts = {}
    for label, name in enumerate(truth.classes):
        mine = truth.label == label
        areas = area[mine & ~truth.difficult]
        up_to_small, up_to_medium = (int((areas <= limit).sum()) for limit in (SMALL, MEDIUM))
        side = float(np.median(np.sqrt(areas))) if len(areas) else None
        sizes = (up_to_small, up_to_medium - up_to_small, len(areas) - up_to_medium)
        counts[name] = ObjectCounts(*sizes, int((mine & truth.difficult).sum()), side)
    return counts
