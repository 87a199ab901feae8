"""PASCAL VOC average precision, equal to the official devkit's and computed for all classes in arrays.

What the devkit does, and this with it:

- detections of a class are taken in the order of their score, equal scores in the order in which they were given;
- each is compared with all objects of its class on its image, ``difficult`` ones too, and matched to the one with the
  largest overlap (the first of several), whether or not that one has been found already;
- overlap counts pixels, so that a box from 1 to 10 is 10 wide: (xmax - xmin + 1) * (ymax - ymin + 1);
- overlap >= threshold on a ``difficult`` object counts neither way; on another one it is a hit the first time and a
  false positive each further time; everything else is a false positive;
- ``difficult`` objects are not among the positives.

The 11-point AP (VOC 2007) samples the curve at recalls 0, 0.1, ... 1, the area AP (VOC 2010 and later) takes the
whole area below the curve made monotone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.jupyter import JupyterMixin
from rich.markup import escape
from rich.table import Column, Table

from nst_det.evaluation.boxes import Detections, GroundTruth

# the devkit's 0:0.1:1, whose fourth value is 0.30000000000000004: recall 66/220 is not at that point yet
ELEVEN_POINTS = np.arange(11) * 0.1


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class after each counted detection, best score first; all are (n,) float64."""

    recall: np.ndarray
    precision: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class VocResult(JupyterMixin):
    """AP of K classes at T overlap thresholds; shows itself as the table of the first.

    A class without positives (no object that isn't difficult) has no AP: it is NaN in the arrays, None in
    :meth:`to_dict`, and left out of the mean.
    """

    classes: tuple[str, ...]  # K names
    thresholds: tuple[float, ...]  # T overlaps
    ap11: np.ndarray  # (T, K) 11-point AP, 0..1 or NaN
    ap_area: np.ndarray  # (T, K) area AP, 0..1 or NaN
    positives: np.ndarray  # (K,) objects that count
    difficult: np.ndarray  # (K,) objects that don't
    detections: np.ndarray  # (K,) detections
    curves: tuple[tuple[Curve, ...], ...]  # curves[t][k]

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
        """Return ``map`` (11-point), ``map_area``, ``per_class`` (name to ap11, ap_area and counts), for JSON.

        ``threshold`` is one of ``thresholds``; None takes the first.
        """
        t = 0 if threshold is None else self.thresholds.index(threshold)
        names = ("ap11", "ap_area", "positives", "difficult", "detections")
        columns = (self.ap11[t], self.ap_area[t], self.positives, self.difficult, self.detections)
        per_class = {
            name: dict(zip(names, map(_plain, row)))
            for name, *row in zip(self.classes, *(column.tolist() for column in columns))
        }
        means = {"map": _plain(float(self.map11[t])), "map_area": _plain(float(self.map_area[t]))}
        return {"iou": self.thresholds[t], **means, "per_class": per_class}

    def __rich__(self) -> Table:
        numbers = ("AP 11-point", "AP area", "objects", "difficult", "detections")
        columns = (Column(name, justify="right") for name in numbers)
        table = Table("class", *columns, title=f"VOC AP at IoU {self.thresholds[0]:g}")
        counts = np.stack([self.positives, self.difficult, self.detections], axis=1)
        for name, *ap, count in zip(self.classes, self.ap11[0], self.ap_area[0], counts):
            table.add_row(escape(name), *map(_cell, ap), *map(str, count))
        table.add_section()
        means = (self.map11[0], self.map_area[0])
        table.add_row("mean", *map(_cell, means), *map(str, counts.sum(axis=0)), style="bold")
        without = int((self.positives == 0).sum())
        if without:
            table.caption = f"{without} of {len(self.classes)} classes have no object that counts, and no AP"
        return table


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value


def evaluate_voc(detections: Detections, truth: GroundTruth, iou: float | Sequence[float] = 0.5) -> VocResult:
    """Return AP of every class of the ground truth, at one overlap threshold or several.

    A ValueError names a detection on an image, or of a class, that the ground truth doesn't have; the order of classes
    may be another one.
    """
    thresholds = (float(iou),) if isinstance(iou, int | float) else tuple(float(value) for value in iou)
    image, label = detections.indices(truth)
    # best score first; lexsort keeps the given order of equal scores
    order = np.lexsort((-detections.score, label))
    image, label, score = image[order], label[order], detections.score[order]
    overlap, match = best_match(image, label, detections.box[order], truth)
    count = len(truth.classes)
    positives = np.bincount(truth.label[~truth.difficult], minlength=count)
    ends = np.searchsorted(label, np.arange(count + 1))
    curves = []
    for threshold in thresholds:
        hit, counted = judge(overlap >= threshold, match, truth.difficult)
        row = []
        for start, end, objects in zip(ends, ends[1:], positives):
            taken = counted[start:end]
            hits = np.cumsum(hit[start:end][taken], dtype=np.float64)
            recall = hits / objects if objects else np.full(len(hits), np.nan)
            row.append(Curve(recall, hits / np.arange(1, len(hits) + 1), score[start:end][taken]))
        curves.append(tuple(row))
    ap = [[_average_precision(curve) if n else (np.nan, np.nan) for curve, n in zip(row, positives)] for row in curves]
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


def best_match(
    image: np.ndarray, label: np.ndarray, box: np.ndarray, truth: GroundTruth
) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's largest overlap with an object of its class on its image, and that object (or -1)."""
    count = len(truth.classes)
    rows, target = pairs_of(image * count + label, truth.image * count + truth.label)
    return best_pairs(rows, target, overlap_of(box[rows], truth.box[target]), len(image))


def pairs_of(wanted: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a row for each pair of a detection and an object of its group: indices of both, in the order of both.

    ``wanted`` (N,) and ``group`` (M,) are the groups of detections and objects.
    """
    by_group = np.argsort(group, kind="stable")
    first = np.searchsorted(group[by_group], wanted, side="left")
    counts = np.searchsorted(group[by_group], wanted, side="right") - first
    rows = np.repeat(np.arange(len(wanted)), counts)
    starts = np.cumsum(counts) - counts
    return rows, by_group[first[rows] + np.arange(len(rows)) - starts[rows]]


def best_pairs(rows: np.ndarray, target: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest value of each of ``count`` detections, and the first object that has it (-inf and -1 of none).

    ``rows`` (P,), rising, and ``target`` (P,) are the pairs that have the ``values`` (P,).
    """
    best, match = np.full(count, -np.inf), np.full(count, -1, dtype=np.int64)
    some, starts = np.unique(rows, return_index=True)
    if some.size:
        best[some] = np.maximum.reduceat(values, starts)
        at = np.flatnonzero(values == best[rows])
        match[some] = target[at[np.unique(rows[at], return_index=True)[1]]]
    return best, match


def overlap_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes row by row, (P,), with the devkit's + 1 and its order of operations."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + 1
    shared = sides[:, 0] * sides[:, 1]
    area_a, area_b = ((box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1) for box in (a, b))
    # boxes that don't meet overlap with nothing, so that even threshold 0 doesn't match them
    touching = (sides > 0).all(axis=1)
    return np.divide(shared, area_a + area_b - shared, out=np.full(len(shared), -np.inf), where=touching)


def judge(enough: np.ndarray, match: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections are hits, and which count at all; they come best first within a class."""
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


def _average_precision(curve: Curve) -> tuple[float, float]:
    """Return 11-point and area AP of a class that has positives."""
    # the best precision at this recall or a higher one; 0 beyond the last
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    eleven = best[np.searchsorted(curve.recall, ELEVEN_POINTS, side="left")].sum() / 11
    steps = np.diff(curve.recall, prepend=0.0)
    return float(eleven), float(steps @ best[:-1])
