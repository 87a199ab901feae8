"""Curves from the metrics that runs left: losses and accuracies over steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nst_det.comparison.result import MEASURES, ComparisonResult
from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError

log = logging.getLogger(__name__)
BINS = 60
ACCURACIES = ("top1", "top5", "val_top1", "val_top5", "map", "map_area", "accuracy", *MEASURES)
Array = NDArray[np.float64]
Points = Sequence[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Curve:
    """One quantity over steps: the mean over seeds, and the lowest and highest seed where there are several."""

    steps: Array
    mean: Array
    low: Array
    high: Array


Curves = dict[str, dict[str, Curve]]  # quantity -> method -> curve


def read_curves(results: ComparisonResult, runs: Path, stage: str) -> dict[str, Curves]:
    """Read losses, levels (terms on maps before their weights) and accuracies of ``stage``: ``distill_run`` or ``run``.

    A run whose metrics are gone is left out with a warning.
    """
    curves: dict[str, Curves] = {"loss": {}, "level": {}, "accuracy": {}}
    for row in results.rows:
        by_quantity: dict[str, list[Points]] = {}
        for seed in row.per_seed.values():
            if folder := getattr(seed, stage):
                for name, points in _read_points(runs / folder / "metrics.jsonl").items():
                    by_quantity.setdefault(name, []).append(points)
        for name, seeds in by_quantity.items():
            curves[_kind(name)].setdefault(name, {})[row.method] = merge_seeds(seeds)
    return curves


def _kind(name: str) -> str:
    """Return what a metric is; "" for learning rates and times, which say nothing about what was learned."""
    if name.rsplit("/", 1)[-1] in ACCURACIES:
        return "accuracy"
    return "level" if name.startswith("level/") else "loss" if "loss" in name else ""


def _read_points(path: Path) -> dict[str, list[tuple[int, float]]]:
    try:
        rows = read_metrics(path)
    except (FileNotFoundError, UserError) as error:
        log.warning("%s; %s: its training curves are left out of the report", error, path)
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and _kind(name):
                points.setdefault(name, []).append((row["step"], float(value)))
    return points


def merge_seeds(seeds: Sequence[Points], bins: int = BINS) -> Curve:
    """Return the mean of several seeds' points, at most ``bins`` of them, each the mean in its bin.

    Example:
        >>> curve = merge_seeds([[(0, 1.0), (10, 3.0)], [(0, 2.0), (10, 5.0)]])
        >>> curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()
        ([1.5, 4.0], [1.0, 3.0], [2.0, 5.0])
    """
    steps = np.unique([step for points in seeds for step, _ in points])
    edges = np.linspace(steps[0], steps[-1] + (steps[0] == steps[-1]), min(bins, len(steps)) + 1)
    per_seed = [np.array(points, float).T for points in seeds]
    counts = np.stack([np.histogram(step, edges)[0] for step, _ in per_seed])
    sums = np.stack([np.histogram(step, edges, weights=value)[0] for step, value in per_seed])
    step_sums = sum(np.histogram(step, edges, weights=step)[0] for step, _ in per_seed)
    filled = counts.any(axis=0)
    with np.errstate(invalid="ignore"):
        table = (sums / counts)[:, filled]
    places = (step_sums / counts.sum(axis=0).clip(1))[filled]
    return Curve(places, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0))
