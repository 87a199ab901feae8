"""The answer of a comparison as data, put together from the result files of its runs."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from nst_det.comparison.config import BASELINE, NO_FPN, SCRATCH, TEACHER, Comparison, weights_from
from nst_det.comparison.plan import Run, backbone_name, detector_folder, student_folder, teacher_folder
from nst_det.engine.io import read_json
from nst_det.engine.run_dir import provenance
from nst_det.errors import UserError

CONFIDENCE = 0.95
REFERENCE, SINGLE, NOISE, BETTER, WORSE = "reference", "single seed", "noise", "better", "worse"
EXPLANATION = (
    "delta_vs_ce is the mean over seeds of (row - ce) within one seed; delta_interval is its two-sided 95 % "
    "t-interval. 'better' and 'worse': the interval leaves out 0; 'noise': it holds 0; 'single seed': there is no "
    "spread to judge by. Verdicts are not corrected for the number of rows; p_holm is (Holm, over all rows but ce)."
)
# they differ between two equal comparisons: when, where and how fast, not what
VOLATILE = ("provenance", "commands", "cost")
# what a detector's result must hold: name -> whether it is a number
_NEEDED = {"map": True, "map_area": True, "per_class": False, "per_class_area": False}


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline over ``n`` common seeds.

    ``interval`` (low, high) and ``p_value`` (two-sided) are None where fewer than two seeds are common.
    """

    mean: float
    n: int
    interval: tuple[float, float] | None
    p_value: float | None
    verdict: str


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1; None for a single value).

    Example:
        >>> mean_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
        >>> mean_std([1.0])
        (1.0, None)

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    row: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference:
    """The difference ``row - baseline`` by seed, with Student's t-interval over the seeds that both have.

    Args:
        row: value by seed.
        baseline: value by seed.
        confidence: of the two-sided interval, between 0 and 1.

    Example:
        >>> paired_difference({0: 0.75}, {0: 0.5}).verdict
        'single seed'

    Raises:
        ValueError: no seed is common to both.
    """
    seeds = sorted(set(row) & set(baseline))
    mean, std = mean_std([row[seed] - baseline[seed] for seed in seeds])
    if std is None:
        return Difference(mean, 1, None, None, SINGLE)
    n = len(seeds)
    error = std / math.sqrt(n)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    interval = (mean - reach, mean + reach)
    verdict = BETTER if interval[0] > 0 else WORSE if interval[1] < 0 else NOISE
    return Difference(mean, n, interval, _p_value(mean, error, n), verdict)


def _p_value(mean: float, error: float, n: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down corrected p-values, in the order given; None stays None and doesn't count.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.02, 0.25, None])
        [0.04, 0.25, None]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[index] = highest
    return corrected


def build_results(
    comparison: Comparison, runs: Sequence[Run], costs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """``results.json`` of a finished comparison.

    ``rows`` hold, each: ``method``; ``stage`` (``backbone`` or ``detector``: the last stage in which it learns from a
    teacher; "" for ``scratch``, ``ce`` and ``teacher``); ``weights`` (where the terms' weights are from, such as
    ``tuned: 8 trials``); ``map``, ``map_std``, ``map_area``, ``map_area_std`` (VOC mAP at IoU 0.5, 11-point and area,
    0..1; standard deviation over seeds, None with one seed); ``seeds``; ``delta_vs_ce``,
    ``delta_interval``, ``p_value``, ``p_holm``, ``verdict`` (see ``settings["statistics"]``); ``per_class``,
    ``per_class_area``, ``map_by_iou``, ``coco`` (means over seeds) and ``objects`` (all three as
    :func:`~nst_det.evaluation.metrics.summarize` gives them); ``top1`` of the backbone (None for scratch); ``seconds``
    (student and detector together, a mean over seeds); ``speed_backbone`` and ``speed_detector`` (see
    :func:`~nst_det.engine.metrics.speed_of`, means over seeds); ``params`` of the detector; ``backbone`` (one name a
    seed); ``per_seed`` (the same by seed, with the ``term_weights`` that each stage had, AUTO_WEIGHT's choice among
    them, and the run folders relative to the comparison's); ``commands`` that make the row again; ``cost`` of a forward
    pass (None where not known).

    Args:
        comparison: what was asked.
        runs: its plan, all done.
        costs: by row, from :func:`~nst_det.comparison.cost.measure_costs`.

    Raises:
        UserError: a result file is damaged or lacks a field.
    """
    by_row = {
        row: {seed: _seed_entry(comparison, row, seed) for seed in comparison.seeds} for row in comparison.all_rows
    }
    baseline = {seed: entry["map"] for seed, entry in by_row[BASELINE].items()}
    rows = [_row(comparison, row, entries, baseline) for row, entries in by_row.items()]
    for row, corrected in zip(rows, holm([row["p_value"] for row in rows])):
        row["p_holm"] = corrected
        row["commands"] = _commands(comparison, runs, row["method"])
        row["cost"] = dict((costs or {}).get(row["method"], {})) or None
    engines = sorted({str(entry["engine"]) for entries in by_row.values() for entry in entries.values()})
    return {
        "name": comparison.name,
        "engine": ", ".join(engines),
        "classes": list(rows[0]["per_class"]),
        "rows": rows,
        "teacher": _teacher(comparison),
        "settings": {**comparison.claim, "statistics": EXPLANATION},
        "provenance": {**provenance(), "threads": comparison.threads, "folder": str(comparison.folder)},
    }


def comparable(results: Any) -> Any:
    """Results without what may differ between two runs of the same comparison: times, places and versions.

    Example:
        >>> comparable({"map": 0.5, "seconds": 3.2, "provenance": {}})
        {'map': 0.5}
    """
    if isinstance(results, Mapping):
        return {
            key: comparable(value)
            for key, value in results.items()
            if key not in VOLATILE and not str(key).startswith(("seconds", "speed"))
        }
    return [comparable(item) for item in results] if isinstance(results, list | tuple) else results


def _seed_entry(comparison: Comparison, row: str, seed: int) -> dict[str, Any]:
    """One row of one seed: the detector's result, and its backbone's."""
    folder = detector_folder(comparison, row, seed)
    detector = _read_result(folder, _NEEDED)
    entry = {key: detector[key] for key in _NEEDED}
    more = ("map_by_iou", "coco", "objects", "checkpoints", "params", "engine", "steps")
    entry |= {key: detector.get(key) for key in more}
    entry["seconds_detector"] = float(detector.get("seconds") or 0.0)
    entry["speed_detector"] = detector.get("speed") or {}
    if row == SCRATCH:
        backbone_folder = None
    else:
        backbone_folder = teacher_folder(comparison) if row == TEACHER else student_folder(comparison, row, seed)
    if backbone_folder is not None and not (backbone_folder / "result.json").exists():
        backbone_folder = None  # a teacher of the user's own
    backbone = {} if backbone_folder is None else _read_result(backbone_folder, {})
    entry |= {key: backbone.get(key) for key in ("top1", "top5")}
    entry["term_weights"] = {"backbone": backbone.get("weights") or {}, "detector": detector.get("weights") or {}}
    entry["backbone"] = backbone_name(comparison, row, seed) if backbone_folder is not None else ""
    entry["seconds_backbone"] = float(backbone.get("seconds") or 0.0)
    entry["speed_backbone"] = backbone.get("speed") or {}
    entry["seconds"] = entry["seconds_detector"] + entry["seconds_backbone"]
    entry["run"] = folder.relative_to(comparison.folder).as_posix()
    entry["distill_run"] = backbone_folder and backbone_folder.relative_to(comparison.folder).as_posix()
    return entry


def _read_result(folder: Path, needed: Mapping[str, bool]) -> dict[str, Any]:
    path = folder / "result.json"
    result = read_json(path)
    if not isinstance(result, dict):
        raise UserError(f"{path}: not a result; remove it to run this again")
    for key, number in needed.items():
        value = result.get(key)
        fits = isinstance(value, int | float) and not isinstance(value, bool) if number else isinstance(value, dict)
        if not fits:
            raise UserError(f"{path}: {key} is missing or of the wrong type; remove the file to run this again")
    return result


def _row(
    comparison: Comparison, row: str, entries: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, float]
) -> dict[str, Any]:
    values = list(entries.values())
    first = values[0]
    map_mean, map_std = mean_std([entry["map"] for entry in values])
    area_mean, area_std = mean_std([entry["map_area"] for entry in values])
    difference = asdict(paired_difference({seed: entry["map"] for seed, entry in entries.items()}, baseline))
    if row == BASELINE:
        difference |= {"mean": 0.0, "interval": None, "p_value": None, "verdict": REFERENCE}
    transfers = row not in (SCRATCH, BASELINE, NO_FPN, TEACHER)
    return {
        "method": row,
        "stage": "detector"
        if transfers and comparison.methods[row].detector.names
        else "backbone"
        if transfers
        else "",
        "weights": weights_from(
            comparison.methods[row], comparison.tuned, comparison.distill.TRANSFER, comparison.detect.TRANSFER
        )
        if transfers
        else "",
        "map": map_mean,
        "map_std": map_std,
        "map_area": area_mean,
        "map_area_std": area_std,
        "seeds": list(entries),
        "delta_vs_ce": difference["mean"],
        "delta_interval": difference["interval"] and list(difference["interval"]),
        "p_value": difference["p_value"],
        "verdict": difference["verdict"],
        "per_class": _mean_by_name([entry["per_class"] for entry in values]),
        "per_class_area": _mean_by_name([entry["per_class_area"] for entry in values]),
        "map_by_iou": _mean_by_name([entry["map_by_iou"] or {} for entry in values]),
        "coco": _mean_by_name([entry["coco"] or {} for entry in values]),
        "objects": first["objects"],
        "top1": _mean([entry["top1"] for entry in values]),
        "top1_std": mean_std([entry["top1"] for entry in values])[1] if first["top1"] is not None else None,
        "seconds": _mean([entry["seconds"] for entry in values]),
        "seconds_backbone": _mean([entry["seconds_backbone"] for entry in values]),
        "seconds_detector": _mean([entry["seconds_detector"] for entry in values]),
        "speed_backbone": _mean_by_name([entry["speed_backbone"] for entry in values]),
        "speed_detector": _mean_by_name([entry["speed_detector"] for entry in values]),
        "params": first["params"],
        "backbone": [entry["backbone"] for entry in values if entry["backbone"]],
        "per_seed": {str(seed): dict(entry) for seed, entry in entries.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean_std(known)[0] if known else None


def _mean_by_name(values: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means of what stands under each name; None where no value does (AP of a class without any test object)."""
    return {name: _mean([entry.get(name) for entry in values]) for name in values[0]}


def _teacher(comparison: Comparison) -> dict[str, Any] | None:
    folder = teacher_folder(comparison)
    if not (folder / "result.json").exists():
        return None
    result = _read_result(folder, {})
    return {key: result.get(key) for key in ("name", "top1", "top5", "params", "steps", "seconds")}


def _commands(comparison: Comparison, runs: Sequence[Run], row: str) -> list[str]:
    """The commands of a row's runs and of all that they need, in the order of the plan."""
    by_name = {run.name: run for run in runs}
    names = {run.name for run in runs if run.row == row}
    todo = list(names)
    while todo:
        new = set(by_name[todo.pop()].needs) - names
        names |= new
        todo += new
    return [command_line(comparison, run) for run in runs if run.name in names]


def command_line(comparison: Comparison, run: Run) -> str:
    """What to type to make one run again, to the same bits on the same CPU."""
    return f"OMP_NUM_THREADS={run.threads} nst-det {shlex.join(run.command(comparison.folder))}"
