"""Precision over recall of each class and row, from the detections that the runs left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nst_det.engine.io import read_json
from nst_det.errors import UserError
from nst_det.evaluation.boxes import GroundTruth
from nst_det.evaluation.io import detections_from_json
from nst_det.evaluation.voc import Curve, evaluate_voc
from nst_det.report.samples import open_test
from nst_det.report.schema import Results

log = logging.getLogger(__name__)
# recalls at which curves are drawn
RECALLS = np.linspace(0, 1, 51)
Precision = NDArray[np.float64]


@dataclass(frozen=True)
class PrecisionRecall:
    """Interpolated precision at :data:`RECALLS`, (51,) each and 0..1, the mean over seeds.

    Attributes:
        mean: method to the mean over classes.
        per_class: class to method to its own.
        reason: why there are none.
    """

    mean: Mapping[str, Precision]
    per_class: Mapping[str, Mapping[str, Precision]]
    reason: str = ""


def read_precision(results: Results) -> PrecisionRecall:
    """The curves at overlap 0.5 of all rows whose runs still have their detections and test images.

    A row of which a seed is gone is left out, with a warning.
    """
    per_class: dict[str, dict[str, Precision]] = {}
    for row in results.rows:
        folders = [run.run for run in row.runs if run.run is not None]
        if not folders:
            continue
        try:
            seeds = [_by_class(folder, results) for folder in folders]
        except (UserError, OSError) as error:
            log.warning("%s: no precision over recall in the report: %s", row.method, error)
            continue
        for name in seeds[0]:
            per_class.setdefault(name, {})[row.method] = np.mean([seed[name] for seed in seeds], axis=0)
    methods = dict.fromkeys(method for curves in per_class.values() for method in curves)
    mean = {method: np.mean([curves[method] for curves in per_class.values()], axis=0) for method in methods}
    reason = "" if mean else "the test images or the detections can't be read any more"
    return PrecisionRecall(mean, per_class, reason)


def _by_class(folder: Path, results: Results) -> dict[str, Precision]:
    """The curves of one run, of the classes that have objects."""
    opened = open_test(folder / "config.json", results.classes)
    truth = GroundTruth.from_annotations((a for data in opened for a in data.annotations()), results.classes)
    path = folder / "detections.json"
    found = detections_from_json(read_json(path), truth.image_ids, results.classes, str(path))
    result = evaluate_voc(found, truth)
    return {
        name: interpolated(curve)
        for name, curve, count in zip(result.classes, result.curves[0], result.positives)
        if count
    }


def interpolated(curve: Curve) -> Precision:
    """The highest precision at each of :data:`RECALLS` or beyond, which is what AP is computed from; (51,), 0..1.

    Example:
        >>> curve = Curve(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 0.66]), np.array([0.9, 0.8, 0.7]))
        >>> interpolated(curve)[[0, 25, 26, 50]].tolist()
        [1.0, 1.0, 0.66, 0.66]
    """
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(curve.recall, RECALLS, side="left")]
