"""The result files of a comparison's runs, put together."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nst_det.comparison.config import BASELINE, NO_FPN, SCRATCH, TEACHER, Comparison, weights_from
from nst_det.comparison.plan import Run, backbone_name, detector_folder, student_folder, teacher_folder
from nst_det.comparison.result import ComparisonResult, Cost, RowResult, SeedResult, TeacherResult, from_json
from nst_det.comparison.statistics import EXPLANATION, REFERENCE, Difference, holm, mean_std, paired_difference
from nst_det.engine.io import read_json
from nst_det.engine.run_dir import provenance
from nst_det.errors import UserError

REMEDY = "remove the file to run this again"


def build_results(
    comparison: Comparison, runs: Sequence[Run], costs: Mapping[str, Cost] | None = None
) -> ComparisonResult:
    """Put the results of all runs of a plan together; ``costs`` are by row, from ``measure_costs``.

    Raises:
        UserError: a result file is damaged or lacks a field.
    """
    by_row = {row: {seed: _seed(comparison, row, seed) for seed in comparison.seeds} for row in comparison.all_rows}
    baseline = {seed: one.map for seed, one in by_row[BASELINE].items()}
    rows = [
        replace(
            _row(comparison, row, entries, baseline),
            commands=_commands(comparison, runs, row),
            cost=(costs or {}).get(row),
        )
        for row, entries in by_row.items()
    ]
    rows = [replace(row, p_holm=p) for row, p in zip(rows, holm([row.p_value for row in rows]))]
    teacher = teacher_folder(comparison)
    return ComparisonResult(
        name=comparison.name,
        engine=", ".join(sorted({str(one.engine) for entries in by_row.values() for one in entries.values()})),
        classes=list(rows[0].per_class),
        rows=rows,
        teacher=from_json(TeacherResult | None, _read(teacher) if _has_result(teacher) else None, str(teacher), REMEDY),
        settings={**comparison.claim, "statistics": EXPLANATION},
        provenance={**provenance(), "threads": comparison.threads, "folder": str(comparison.folder)},
    )


def _has_result(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a result; {REMEDY}")
    return tree


def _seed(comparison: Comparison, row: str, seed: int) -> SeedResult:
    folder = detector_folder(comparison, row, seed)
    detector = _read(folder)
    below = None
    if row != SCRATCH:
        below = teacher_folder(comparison) if row == TEACHER else student_folder(comparison, row, seed)
        # a teacher of the user's own has no run
        below = below if _has_result(below) else None
    backbone = _read(below) if below else {}
    seconds = [float(result.get("seconds") or 0.0) for result in (detector, backbone)]
    tree = {
        **detector,
        **{key: detector.get(key) or {} for key in ("map_by_iou", "coco", "objects")},
        "top1": from_json(float | None, backbone.get("top1"), f"{below}/result.json", REMEDY, "top1"),
        "top5": from_json(float | None, backbone.get("top5"), f"{below}/result.json", REMEDY, "top5"),
        "seconds": sum(seconds),
        "seconds_detector": seconds[0],
        "seconds_backbone": seconds[1],
        "speed_detector": detector.get("speed") or {},
        "speed_backbone": backbone.get("speed") or {},
        "term_weights": {"backbone": backbone.get("weights") or {}, "detector": detector.get("weights") or {}},
        "backbone": backbone_name(comparison, row, seed) if below else "",
        "run": folder.relative_to(comparison.folder).as_posix(),
        "distill_run": below.relative_to(comparison.folder).as_posix() if below else None,
    }
    entry: SeedResult = from_json(SeedResult, tree, f"{folder}/result.json", REMEDY)
    return entry


def _row(
    comparison: Comparison, row: str, entries: Mapping[int, SeedResult], baseline: Mapping[int, float]
) -> RowResult:
    seeds = list(entries.values())
    transfers = row not in (SCRATCH, BASELINE, NO_FPN, TEACHER)
    difference = paired_difference({seed: one.map for seed, one in entries.items()}, baseline)
    if row == BASELINE:
        difference = Difference(0.0, None, None, REFERENCE)
    means: dict[str, Any] = {
        key: _mean_by_name([getattr(one, key) for one in seeds])
        for key in ("per_class", "per_class_area", "map_by_iou", "coco", "speed_backbone", "speed_detector")
    }
    for key in ("map", "map_area", "top1"):
        known = [getattr(one, key) for one in seeds if getattr(one, key) is not None]
        means[key], means[f"{key}_std"] = mean_std(known) if known else (None, None)
    for key in ("seconds", "seconds_backbone", "seconds_detector"):
        means[key], _ = mean_std([getattr(one, key) for one in seeds])
    stage = ("detector" if comparison.methods[row].detector.names else "backbone") if transfers else ""
    transfer = (comparison.tuned, comparison.distill.TRANSFER, comparison.detect.TRANSFER)
    return RowResult(
        method=row,
        stage=stage,  # type: ignore[arg-type]
        weights=weights_from(comparison.methods[row], *transfer) if transfers else "",
        seeds=list(entries),
        delta_vs_ce=difference.mean,
        delta_interval=difference.interval,
        p_value=difference.p_value,
        p_holm=None,
        verdict=difference.verdict,  # type: ignore[arg-type]
        objects=seeds[0].objects,
        params=seeds[0].params,
        backbone=[one.backbone for one in seeds if one.backbone],
        per_seed={str(seed): one for seed, one in entries.items()},
        commands=[],
        cost=None,
        **means,
    )


def _mean_by_name(values: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return means of what stands under each name; None where no value does (AP of a class without test objects)."""
    known = {name: [value for one in values if (value := one.get(name)) is not None] for name in values[0]}
    return {name: mean_std(found)[0] if found else None for name, found in known.items()}


def _commands(comparison: Comparison, runs: Sequence[Run], row: str) -> list[str]:
    """Return the commands of a row's runs and of all that they need, in the order of the plan."""
    by_name = {run.name: run for run in runs}
    names = {run.name for run in runs if run.row == row}
    todo = list(names)
    while todo:
        new = set(by_name[todo.pop()].needs) - names
        names |= new
        todo += new
    return [
        f"OMP_NUM_THREADS={run.threads} nst-det {shlex.join(run.command(comparison.folder))}"
        for run in runs
        if run.name in names
    ]
