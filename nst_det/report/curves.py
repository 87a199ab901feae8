"""Curves from the files that runs left: losses and accuracies over steps, and precision over recall."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nst_det.comparison.result import ComparisonResult
from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError
from nst_det.evaluation import voc
from nst_det.evaluation.boxes import GroundTruth
from nst_det.report.samples import open_test, read_found

log = logging.getLogger(__name__)
BINS = 60
LEVEL = "level/"
ACCURACIES = ("top1", "top5", "val_top1", "val_top5", "map", "map_area", "accuracy")
# at which precision is drawn
RECALLS = np.linspace(0, 1, 51)
Array = NDArray[np.float64]
Precision = Array  # at RECALLS


@dataclass(frozen=True)
class Curve:
    """One quantity over steps: the mean over seeds, and the lowest and highest seed where there are several."""

    steps: Array
    mean: Array
    low: Array
    high: Array


Curves = Mapping[str, Mapping[str, Curve]]  # quantity -> method -> curve


@dataclass(frozen=True)
class Training:
    """The curves of both stages; levels are the terms on maps at each pair of levels, before their weights."""

    distill_losses: Curves
    distill_accuracy: Curves
    distill_levels: Curves
    detect_losses: Curves
    detect_accuracy: Curves


def read_training(results: ComparisonResult, runs: Path) -> Training:
    """Read the curves of all runs whose metrics are still there; a run without them is left out with a warning."""
    losses, accuracy, levels = _stage(results, runs, "distill_run")
    detect_losses, detect_accuracy, _ = _stage(results, runs, "run")
    return Training(losses, accuracy, levels, detect_losses, detect_accuracy)


def _stage(results: ComparisonResult, runs: Path, stage: str) -> tuple[Curves, Curves, Curves]:
    losses: dict[str, dict[str, Curve]] = {}
    accuracy: dict[str, dict[str, Curve]] = {}
    levels: dict[str, dict[str, Curve]] = {}
    for row in results.rows:
        seeds: dict[str, list[list[tuple[int, float]]]] = {}
        for folder in (getattr(one, stage) for one in row.per_seed.values()):
            for name, points in (_points(runs / folder / "metrics.jsonl") if folder else {}).items():
                seeds.setdefault(name, []).append(points)
        for name, curves in seeds.items():
            target = accuracy if _is_accuracy(name) else levels if name.startswith(LEVEL) else losses
            target.setdefault(name, {})[row.method] = merge_seeds(curves)
    return losses, accuracy, levels


def _is_accuracy(name: str) -> bool:
    return name.rsplit("/", 1)[-1] in ACCURACIES


def _points(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read (step, value) of losses and accuracies; learning rates and times say nothing about what was learned."""
    try:
        rows = read_metrics(path)
    except (FileNotFoundError, UserError) as error:
        log.warning("%s; %s: its training curves are left out of the report", error, path)
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and ("loss" in name or name.startswith(LEVEL) or _is_accuracy(name)):
                points.setdefault(name, []).append((row["step"], float(value)))
    return points


def merge_seeds(seeds: Sequence[Sequence[tuple[int, float]]], bins: int = BINS) -> Curve:
    """Return the mean of several seeds' (step, value) points, at most ``bins`` of them, each the mean in its bin.

    Example:
        >>> curve = merge_seeds([[(0, 1.0), (10, 3.0)], [(0, 2.0), (10, 5.0)]])
        >>> curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()
        ([1.5, 4.0], [1.0, 3.0], [2.0, 5.0])
    """
    steps = np.unique([step for points in seeds for step, _ in points])
    count = min(bins, len(steps))
    edges = np.linspace(steps[0], steps[-1] + (steps[0] == steps[-1]), count + 1)
    per_seed = [np.array(points, float).T for points in seeds]
    numbers = np.stack([np.histogram(step, edges)[0] for step, _ in per_seed])
    kept = numbers.any(axis=0)
    with np.errstate(invalid="ignore"):
        table = np.stack([np.histogram(step, edges, weights=value)[0] for step, value in per_seed]) / numbers
    table = table[:, kept]
    places = np.sum([np.histogram(step, edges, weights=step)[0] for step, _ in per_seed], axis=0)[kept]
    return Curve(
        steps=places / numbers.sum(axis=0)[kept],
        mean=np.nanmean(table, axis=0),
        low=np.nanmin(table, axis=0),
        high=np.nanmax(table, axis=0),
    )


@dataclass(frozen=True)
class PrecisionRecall:
    """Interpolated precision at :data:`RECALLS`, means over seeds: by method, and by class and method."""

    mean: Mapping[str, Precision]
    per_class: Mapping[str, Mapping[str, Precision]]


def read_precision(results: ComparisonResult, runs: Path) -> PrecisionRecall:
    """Read the curves at overlap 0.5 of all rows whose runs still have their detections and test images.

    A row of which a seed is gone is left out, with a warning.
    """
    per_class: dict[str, dict[str, Precision]] = {}
    for row in results.rows:
        try:
            seeds = [_by_class(runs / one.run, results.classes) for one in row.per_seed.values()]
        except (UserError, OSError) as error:
            log.warning("%s: no precision over recall in the report: %s", row.method, error)
            continue
        for name in seeds[0]:
            per_class.setdefault(name, {})[row.method] = np.mean([seed[name] for seed in seeds], axis=0)
    methods = dict.fromkeys(method for curves in per_class.values() for method in curves)
    mean = {method: np.mean([curves[method] for curves in per_class.values()], axis=0) for method in methods}
    return PrecisionRecall(mean, per_class)


def _by_class(folder: Path, classes: Sequence[str]) -> dict[str, Precision]:
    """Return the curves of one run, of the classes that have objects."""
    truth = GroundTruth.from_annotations(
        (a for data in open_test(folder, classes) for a in data.annotations()), classes
    )
    result = voc.evaluate_voc(read_found(folder, truth.image_ids, classes), truth)
    curves = zip(result.classes, result.curves[0], result.positives)
    return {name: interpolated(curve) for name, curve, count in curves if count}


def interpolated(curve: voc.Curve) -> Precision:
    """Return the highest precision at each of :data:`RECALLS` or beyond, which is what AP is computed from; (51,).

    Example:
        >>> curve = voc.Curve(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 0.66]), np.array([0.9, 0.8, 0.7]))
        >>> interpolated(curve)[[0, 25, 26, 50]].tolist()
        [1.0, 1.0, 0.66, 0.66]
    """
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(curve.recall, RECALLS, side="left")]
