"""What the detections of each row on the test images tell: precision over recall, errors, and the scores to take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nst_det.comparison.result import ComparisonResult
from nst_det.errors import UserError
from nst_det.evaluation import voc
from nst_det.evaluation.boxes import GroundTruth, ObjectCounts, count_objects
from nst_det.evaluation.errors import ErrorAnalysis, analyze_errors
from nst_det.evaluation.thresholds import ScoreThreshold, read_thresholds
from nst_det.report.curves import Array
from nst_det.report.samples import least_scores, open_data, read_detections

log = logging.getLogger(__name__)
# at which precision is drawn
RECALLS = np.linspace(0, 1, 51)
Precision = Array  # at RECALLS


@dataclass(frozen=True)
class RunAnalysis:
    """Of one detector: precision at IoU 0.5 by class that has objects, errors, and thresholds by class.

    Errors are those of the detections with at least the scores of ``least_scores``; ``thresholds`` are of the
    validation split, {} without one.
    """

    precision: dict[str, Precision]
    errors: ErrorAnalysis
    thresholds: dict[str, ScoreThreshold]


@dataclass(frozen=True)
class RowAnalysis:
    """Of one row, each a mean over seeds; ``f1`` is a mean over classes too, at ``SCORES``, None without validation."""

    precision: dict[str, Precision]
    confusion: Array
    kinds: Array
    f1: Array | None
    thresholds: list[dict[str, ScoreThreshold]]  # of each seed

    @property
    def found(self) -> float:
        """Objects that are found."""
        return float(np.trace(self.confusion))


def read_analyses(results: ComparisonResult, runs: Path) -> dict[str, RowAnalysis]:
    """Return the analysis of each row; where a seed's detections or images are gone it is left out, with a warning."""
    rows: dict[str, RowAnalysis] = {}
    truths: dict[tuple[tuple[str, str], ...], GroundTruth] = {}
    for row in results.rows if results.classes else ():
        try:
            seeds = [_analyze(runs / str(one.run), results.classes, truths) for one in row.per_seed.values()]
        except (UserError, OSError) as error:
            log.warning("%s: no precision over recall and no errors in the report: %s", row.method, error)
            continue
        curves = [[one.curve for one in seed.thresholds.values()] for seed in seeds]
        rows[row.method] = RowAnalysis(
            {name: np.mean([seed.precision[name] for seed in seeds], axis=0) for name in seeds[0].precision},
            np.mean([seed.errors.confusion for seed in seeds], axis=0),
            np.mean([seed.errors.kinds for seed in seeds], axis=0),
            np.mean([np.mean(curve, axis=0) for curve in curves], axis=0) if all(curves) else None,
            [seed.thresholds for seed in seeds],
        )
    return rows


def _analyze(run: Path, classes: Sequence[str], truths: dict[tuple[tuple[str, str], ...], GroundTruth]) -> RunAnalysis:
    data = open_data(run, classes)
    key = tuple((str(one.root), one.split) for one in data)
    if key not in truths:
        annotations = (annotation for one in data for annotation in one.annotations())
        truths[key] = GroundTruth.from_annotations(annotations, classes)
    truth = truths[key]
    found = read_detections(run, truth.image_ids, classes)
    result = voc.evaluate_voc(found, truth)
    curves = zip(result.classes, result.curves[0], result.positives)
    precision = {name: interpolated(curve) for name, curve, count in curves if count}
    errors = analyze_errors(found, truth, least_scores(run, classes))
    return RunAnalysis(precision, errors, read_thresholds(run))


def precision_by_class(rows: Mapping[str, RowAnalysis]) -> dict[str, dict[str, Precision]]:
    """Return precision by class and method."""
    per_class: dict[str, dict[str, Precision]] = {}
    for method, row in rows.items():
        for name, precision in row.precision.items():
            per_class.setdefault(name, {})[method] = precision
    return per_class


def interpolated(curve: voc.Curve) -> Precision:
    """Return the highest precision at each of :data:`RECALLS` or beyond, which AP is computed from."""
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(curve.recall, RECALLS, side="left")]


def count_data(results: ComparisonResult, runs: Path) -> dict[str, dict[str, ObjectCounts]]:
    """Return the objects by class of ``TRAIN`` (with what was validated on), of ``TEST``, and of ``all``.

    {} where the annotations are gone, with a warning.
    """
    if not results.classes:
        return {}
    run = runs / str(next(iter(results.rows[0].per_seed.values())).run)
    try:
        parts = {
            part: [item for one in open_data(run, results.classes, part) for item in one.annotations()]
            for part in ("TRAIN", "TEST")
        }
        parts["all"] = parts["TRAIN"] + parts["TEST"]
    except (UserError, OSError) as error:
        log.warning("no counts of objects in the report: %s", error)
        return {}
    counts = {}
    for part, items in parts.items():
        # images of different sets may share an id
        numbered = (replace(item, id=str(number)) for number, item in enumerate(items))
        counts[part] = count_objects(GroundTruth.from_annotations(numbered, results.classes))
    return counts
