"""Ground truth and detections of a few boxes."""

import numpy as np

from nst_det.evaluation.boxes import Detections, GroundTruth

CLASSES = ("cat", "dog")


def truth(objects, classes=CLASSES, images=("a", "b", "c")):
    """``objects``: (image, class, box) or (image, class, box, difficult)."""
    return GroundTruth(
        tuple(images),
        tuple(classes),
        np.array([images.index(o[0]) for o in objects], dtype=np.int64),
        np.array([classes.index(o[1]) for o in objects], dtype=np.int64),
        np.array([o[2] for o in objects], dtype=np.float64).reshape(-1, 4),
        np.array([len(o) > 3 and o[3] for o in objects], dtype=bool),
    )


def found(rows, classes=CLASSES):
    """``rows``: (image, class, box, score)."""
    return Detections(
        [r[0] for r in rows],
        tuple(classes),
        np.array([classes.index(r[1]) for r in rows], dtype=np.int64),
        np.array([r[2] for r in rows], dtype=np.float64).reshape(-1, 4),
        np.array([r[3] for r in rows], dtype=np.float64),
    )


def overlap(a, b):
    """IoU of two boxes as the devkit has it, whose last pixels count."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    both = sides[0] * sides[1]
    return both / (sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)) - both)
