"""PASCAL VOC average precision, equal to the official devkit's and computed for all classes in arrays.

What the devkit does, and this with it:

- detections of a class are taken in the order of their score, equal scores in the order in which they were given;
- each is compared with all objects of its class on its image, ``difficult`` ones too, and stands for the one with the
  largest overlap (the first of several), whether or not that one has been found already;
- overlap counts pixels, so that a box from 1 to 10 is 10 wide: (xmax - xmin + 1) * (ymax - ymin + 1);
- overlap >= threshold on a ``difficult`` object counts neither way; on another one it is a hit the first time and a
  false positive each further time; everything else is a false positive;
- ``difficult`` objects are not among the positives.

The 11-point AP (VOC 2007) samples the curve at recalls 0, 0.1, ... 1, the area AP (VOC 2010 and later) takes the
whole area below the curve made monotone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.jupyter import JupyterMixin
from rich.markup import escape
from rich.table import Table

from nst_det.evaluation.boxes import Detections, GroundTruth

# the devkit's 0:0.1:1, whose fourth value is 0.30000000000000004: recall 66/220 is not at that point yet
ELEVEN_POINTS = np.arange(11) * 0.1


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class after each counted detection, best score first.

    Detections on difficult objects count neither way and have no entry.  All arrays are (n,) float64.
    """

    recall: np.ndarray
    precision: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class VocResult(JupyterMixin):
    """AP of K classes at T overlap thresholds; shows itself as the table of the first.

    A class without positives (no object that isn't difficult) has no AP: it is NaN in the arrays, None in
    :meth:`to_dict`, and left out of the mean.

    Attributes:
        classes: K names.
        thresholds: T overlaps.
        ap11: (T, K) 11-point AP, 0..1 or NaN.
        ap_area: (T, K) area AP, 0..1 or NaN.
        positives: (K,) objects that count.
        difficult: (K,) objects that don't.
        detections: (K,) detections.
        curves: ``curves[t][k]``, see :class:`Curve`.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    ap11: np.ndarray
    ap_area: np.ndarray
    positives: np.ndarray
    difficult: np.ndarray
    detections: np.ndarray
    curves: tuple[tuple[Curve, ...], ...]

    @cached_property
    def map11(self) -> np.ndarray:
        """(T,) mean of the 11-point AP over the classes that have one."""
        return self._mean(self.ap11)

    @cached_property
    def map_area(self) -> np.ndarray:
        """(T,) mean of the area AP over the classes that have one."""
        return self._mean(self.ap_area)

    def _mean(self, ap: np.ndarray) -> np.ndarray:
        counted = self.positives > 0
        return ap[:, counted].mean(axis=1) if counted.any() else np.full(len(self.thresholds), np.nan)

    def to_dict(self, threshold: float | None = None) -> dict[str, Any]:
        """``map`` (11-point), ``map_area``, ``per_class`` (name to ap11, ap_area and counts), all 0..1, for JSON.

        Args:
            threshold: one of ``thresholds``; None takes the first.
        """
        t = 0 if threshold is None else self.thresholds.index(threshold)
        return {
            "iou": self.thresholds[t],
            "map": _number(self.map11[t]),
            "map_area": _number(self.map_area[t]),
            "per_class": {
                name: {
                    "ap11": _number(self.ap11[t, k]),
                    "ap_area": _number(self.ap_area[t, k]),
                    "positives": int(self.positives[k]),
                    "difficult": int(self.difficult[k]),
                    "detections": int(self.detections[k]),
                }
                for k, name in enumerate(self.classes)
            },
        }

    def __rich__(self) -> Table:
        table = Table(title=f"VOC AP at IoU {self.thresholds[0]:g}")
        table.add_column("class")
        for column in ("AP 11-point", "AP area", "objects", "difficult", "detections"):
            table.add_column(column, justify="right")
        counts = zip(self.positives.tolist(), self.difficult.tolist(), self.detections.tolist())
        for k, (name, numbers) in enumerate(zip(self.classes, counts)):
            table.add_row(escape(name), _cell(self.ap11[0, k]), _cell(self.ap_area[0, k]), *map(str, numbers))
        table.add_section()
        totals = (self.positives.sum(), self.difficult.sum(), self.detections.sum())
        table.add_row("mean", _cell(self.map11[0]), _cell(self.map_area[0]), *map(str, totals), style="bold")
        without = int((self.positives == 0).sum())
        if without:
            table.caption = f"{without} of {len(self.classes)} classes have no object that counts, and no AP"
        return table


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def evaluate_voc(detections: Detections, truth: GroundTruth, iou: float | Sequence[float] = 0.5) -> VocResult:
    """Return AP of every class of the ground truth.

    Args:
        detections: on images of ``truth`` and of classes of ``truth``, in any order of classes.
        truth: the annotated objects.
        iou: one overlap threshold, or several; further ones cost little, since overlaps are computed once.

    Raises:
        ValueError: a detection on an image, or of a class, that the ground truth doesn't have.

    Example:
        >>> truth = GroundTruth(("a",), ("cat",), np.array([0]), np.array([0]),
        ...                     np.array([[1.0, 1.0, 10.0, 10.0]]), np.array([False]))
        >>> found = Detections(["a"], ("cat",), np.array([0]), np.array([[1.0, 1.0, 10.0, 8.0]]), np.array([0.9]))
        >>> float(evaluate_voc(found, truth).map11[0])
        1.0
    """
    thresholds = (float(iou),) if isinstance(iou, int | float) else tuple(float(value) for value in iou)
    image, label = _indices(detections, truth)
    # best score first; lexsort keeps the given order of equal scores
    order = np.lexsort((-detections.score, label))
    image, label, score = image[order], label[order], detections.score[order]
    overlap, match = _best_match(image, label, detections.box[order], truth)
    count = len(truth.classes)
    positives = np.bincount(truth.label[~truth.difficult], minlength=count)
    ends = np.searchsorted(label, np.arange(count + 1))
    curves = []
    for threshold in thresholds:
        hit, counted = _judge(overlap >= threshold, match, truth.difficult)
        classes = [slice(ends[k], ends[k + 1]) for k in range(count)]
        curves.append(
            tuple(_curve(hit[part], counted[part], score[part], int(positives[k])) for k, part in enumerate(classes))
        )
    ap = [[_average_precision(curve, int(n)) for curve, n in zip(row, positives)] for row in curves]
    values = np.array(ap, dtype=np.float64).reshape(len(thresholds), count, 2)
    return VocResult(
        classes=truth.classes,
        thresholds=thresholds,
        ap11=values[..., 0],
        ap_area=values[..., 1],
        positives=positives,
        difficult=np.bincount(truth.label[truth.difficult], minlength=count),
        detections=np.bincount(label, minlength=count),
        curves=tuple(curves),
    )


def _indices(detections: Detections, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of each detection as indices of the ground truth."""
    image_of = {id_: index for index, id_ in enumerate(truth.image_ids)}
    label_of = {name: label for label, name in enumerate(truth.classes)}
    try:
        image = np.fromiter((image_of[id_] for id_ in detections.image_id), np.int64, len(detections))
    except KeyError as error:
        raise ValueError(f"a detection on image {error.args[0]!r}, which the ground truth doesn't have") from None
    labels = np.array([label_of.get(name, -1) for name in detections.classes], dtype=np.int64)
    label = labels[detections.label] if len(detections) else np.zeros(0, np.int64)
    if (label < 0).any():
        name = detections.classes[detections.label[np.flatnonzero(label < 0)[0]]]
        raise ValueError(f"a detection of class {name!r}, which the ground truth doesn't have")
    return image, label


def _best_match(
    image: np.ndarray, label: np.ndarray, box: np.ndarray, truth: GroundTruth
) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the largest overlap with an object of its class on its image, and that object (or -1)."""
    count = len(truth.classes)
    # objects grouped by image and class; each group keeps the order of the annotation
    group = truth.image * count + truth.label
    by_group = np.argsort(group, kind="stable")
    wanted = image * count + label
    first = np.searchsorted(group[by_group], wanted, side="left")
    last = np.searchsorted(group[by_group], wanted, side="right")
    pairs = last - first
    overlap = np.full(len(image), -np.inf)
    match = np.full(len(image), -1, dtype=np.int64)
    some = np.flatnonzero(pairs)
    if not some.size:
        return overlap, match
    # one row for each pair of a detection and an object of its group
    starts = np.concatenate([[0], np.cumsum(pairs[some])])
    rows = np.repeat(np.arange(len(some)), pairs[some])
    target = by_group[first[some][rows] + np.arange(starts[-1]) - starts[rows]]
    values = _overlap(box[some][rows], truth.box[target])
    best = np.maximum.reduceat(values, starts[:-1])
    # the first object that reaches the maximum
    at = np.flatnonzero(values == best[rows])
    chosen = at[np.unique(rows[at], return_index=True)[1]]
    overlap[some] = best
    match[some] = target[chosen]
    return overlap, match


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes row by row, (P,), with the devkit's + 1 and its order of operations."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + 1
    shared = sides[:, 0] * sides[:, 1]
    union = _area(a) + _area(b) - shared
    touching = (sides > 0).all(axis=1)
    # boxes that don't meet overlap with nothing, so that even threshold 0 doesn't match them
    return np.divide(shared, union, out=np.full(len(shared), -np.inf), where=touching)


def _area(box: np.ndarray) -> np.ndarray:
    return (box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)


def _judge(enough: np.ndarray, match: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are hits, and which count at all; detections come best first within a class."""
    matched = np.flatnonzero(enough)
    on_difficult = difficult[match[matched]]
    counted = np.ones(len(enough), dtype=bool)
    counted[matched[on_difficult]] = False
    candidates = matched[~on_difficult]
    # an object has one class, so the first detection on it in this order has the best score
    first = np.unique(match[candidates], return_index=True)[1]
    hit = np.zeros(len(enough), dtype=bool)
    hit[candidates[first]] = True
    return hit, counted


def _curve(hit: np.ndarray, counted: np.ndarray, score: np.ndarray, positives: int) -> Curve:
    hits = np.cumsum(hit[counted], dtype=np.float64)
    recall = hits / positives if positives else np.full(len(hits), np.nan)
    return Curve(recall, hits / np.arange(1, len(hits) + 1), score[counted])


def _average_precision(curve: Curve, positives: int) -> tuple[float, float]:
    """11-point and area AP of one curve."""
    if not positives:
        return np.nan, np.nan
    # the best precision at this recall or a higher one; 0 beyond the last
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    eleven = best[np.searchsorted(curve.recall, ELEVEN_POINTS, side="left")].sum() / 11
    steps = np.diff(curve.recall, prepend=0.0)
    return float(eleven), float(steps @ best[:-1])
