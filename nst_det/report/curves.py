"""Training curves: each loss term by itself, read from the runs' ``metrics.jsonl`` and thinned for a small picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError
from nst_det.report.schema import Results

log = logging.getLogger(__name__)

BINS = 60
LEVEL = "level/"
ACCURACIES = ("top1", "top5", "val_top1", "val_top5", "map", "map_area", "accuracy")


@dataclass(frozen=True)
class Curve:
    """One quantity over steps: the mean over seeds, and the lowest and highest seed where there are several."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


Curves = Mapping[str, Mapping[str, Curve]]  # quantity -> method -> curve


@dataclass(frozen=True)
class Training:
    """The curves of both stages; levels are the terms on maps at each pair of levels, before their weights."""

    distill_losses: Curves
    distill_accuracy: Curves
    distill_levels: Curves
    detect_losses: Curves
    detect_accuracy: Curves


def read_training(results: Results) -> Training:
    """The curves of all runs whose metrics are still there; a run without them is left out with a warning."""
    losses, accuracy, levels = _stage(results, "distill_run")
    detect_losses, detect_accuracy, _ = _stage(results, "run")
    return Training(losses, accuracy, levels, detect_losses, detect_accuracy)


def _stage(results: Results, stage: str) -> tuple[Curves, Curves, Curves]:
    losses: dict[str, dict[str, Curve]] = {}
    accuracy: dict[str, dict[str, Curve]] = {}
    levels: dict[str, dict[str, Curve]] = {}
    for row in results.rows:
        folders = [folder for run in row.runs if (folder := getattr(run, stage)) is not None]
        for name, curve in _curves(folders).items():
            target = accuracy if _is_accuracy(name) else levels if name.startswith(LEVEL) else losses
            target.setdefault(name, {})[row.method] = curve
    return losses, accuracy, levels


def _is_accuracy(name: str) -> bool:
    return name.rsplit("/", 1)[-1] in ACCURACIES


def _curves(folders: Sequence[Path]) -> dict[str, Curve]:
    seeds: dict[str, list[list[tuple[int, float]]]] = {}
    for folder in folders:
        for name, points in _points(folder / "metrics.jsonl").items():
            seeds.setdefault(name, []).append(points)
    return {name: merge_seeds(points) for name, points in seeds.items()}


def _points(path: Path) -> dict[str, list[tuple[int, float]]]:
    try:
        rows = read_metrics(path)
    except FileNotFoundError:
        log.warning("%s: no metrics; its training curves are left out of the report", path)
        return {}
    except UserError as error:
        log.warning("%s; its training curves are left out of the report", error)
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and _is_curve(name):
                points.setdefault(name, []).append((row["step"], float(value)))
    return points


def _is_curve(name: str) -> bool:
    """Losses and accuracies; learning rates, times and the like say nothing about what was learned."""
    return "loss" in name or name.startswith(LEVEL) or _is_accuracy(name)


def merge_seeds(seeds: Sequence[Sequence[tuple[int, float]]], bins: int = BINS) -> Curve:
    """The mean of several seeds' (step, value) points, thinned to at most ``bins`` points by the mean in each bin.

    Example:
        >>> curve = merge_seeds([[(0, 1.0), (10, 3.0)], [(0, 2.0), (10, 5.0)]])
        >>> curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()
        ([1.5, 4.0], [1.0, 3.0], [2.0, 5.0])
    """
    steps = sorted({step for points in seeds for step, _ in points})
    first, last = steps[0], steps[-1]
    count = min(bins, len(steps))
    width = (last - first) / count or 1.0
    table = np.full((len(seeds), count), np.nan)
    where = np.zeros((2, count))
    for index, points in enumerate(seeds):
        total, number = np.zeros(count), np.zeros(count)
        for step, value in points:
            slot = min(int((step - first) / width), count - 1)
            total[slot] += value
            number[slot] += 1
            where[:, slot] += (step, 1)
        hit = number > 0
        table[index, hit] = total[hit] / number[hit]
    kept = where[1] > 0
    table = table[:, kept]
    return Curve(
        steps=where[0, kept] / where[1, kept],
        mean=np.nanmean(table, axis=0),
        low=np.nanmin(table, axis=0),
        high=np.nanmax(table, axis=0),
    )
