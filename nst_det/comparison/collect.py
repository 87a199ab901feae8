"""The result files of a comparison's runs, put together."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.config import MARK, Comparison, row_weights
from nst_det.comparison.plan import (
    STUDENTS,
    Run,
    backbone_folder,
    backbone_name,
    detector_folder,
    run_config,
    teacher_folder,
)
from nst_det.comparison.result import (
    BASELINE,
    COCO,
    IMAGENET,
    MEASURES,
    ComparisonResult,
    Cost,
    RowResult,
    SeedResult,
    TeacherResult,
)
from nst_det.comparison.stages import merge_stage
from nst_det.comparison.statistics import EXPLANATION, differences_to, mean_std
from nst_det.distillation.config import transfer_of
from nst_det.engine.config import flat, plain
from nst_det.engine.fingerprint import RESUME, RUN, concerns
from nst_det.engine.io import from_json, read_json
from nst_det.engine.run_dir import provenance
from nst_det.errors import UserError
from nst_det.losses import get_term

REMEDY = "remove the file to run this again"


def build_results(
    comparison: Comparison,
    runs: Sequence[Run],
    costs: Mapping[str, Cost] | None = None,
    missing: Mapping[str, str] | None = None,
) -> ComparisonResult:
    """Put the results of all runs of a plan together.

    ``costs`` are by row, from ``measure_costs``; ``missing`` are rows that were left out, and why.
    """
    by_row = {row: {seed: _seed(comparison, row, seed) for seed in comparison.seeds} for row in comparison.all_rows}
    scores = {row: {seed: one.score for seed, one in entries.items()} for row, entries in by_row.items()}
    begin = student_weights(comparison.distill)
    to_imagenet = differences_to(IMAGENET, scores) if begin and IMAGENET in scores else {}
    rows = [
        RowResult(
            method=row,
            seeds=list(by_row[row]),
            delta_vs_ce=difference.mean,
            delta_interval=difference.interval,
            p_value=difference.p_value,
            p_holm=difference.p_holm,
            verdict=difference.verdict,
            vs_imagenet=to_imagenet.get(row),
            per_seed={str(seed): one for seed, one in by_row[row].items()},
            commands=_commands(comparison, runs, row),
            cost=(costs or {}).get(row),
            **_over_seeds(list(by_row[row].values())),
            **_transfer(comparison, runs, row, list(by_row[row].values())),
        )
        for row, difference in differences_to(comparison.baseline, scores).items()
    ]
    teacher = teacher_folder(comparison)
    return ComparisonResult(
        name=comparison.name,
        engine=", ".join(sorted({one.engine or "" for entries in by_row.values() for one in entries.values()})),
        classes=list(rows[0].per_class),
        rows=rows,
        missing=dict(missing or {}),
        teacher=from_json(TeacherResult | None, _read(teacher) or None, f"{teacher}/result.json", REMEDY),
        published=list(comparison.published),
        student_weights=begin,
        settings={**comparison.claim, "statistics": EXPLANATION},
        provenance={**provenance(), "threads": comparison.threads, "folder": str(comparison.folder)},
    )


def student_weights(distill: CfgNode) -> str:
    """Return the published weights that all students begin from, by their file's name; "" for random ones."""
    student = distill.STUDENT
    return Path(student.WEIGHTS).name or (f"timm's {student.ARCH}" if student.PRETRAINED else "")


def _read(folder: Path) -> dict[str, Any]:
    """Return the result of a run; {} where there is none, as of a teacher that isn't trained here."""
    path = folder / "result.json"
    tree = read_json(path) if path.exists() else {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a result; {REMEDY}")
    return tree


def _start(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a student's result says of its start, as a result."""
    start = {name: result.get(f"{name}_start") for name in MEASURES}
    return {**start, "steps": 0, **{key: result.get(key) for key in ("params", "val_images")}}


def _seed(comparison: Comparison, row: str, seed: int) -> SeedResult:
    above, below = detector_folder(comparison, row, seed), backbone_folder(comparison, row, seed)
    detector, backbone = _read(above) if comparison.detect else {}, _read(below) if below else {}
    if not comparison.detect and not below:
        below = backbone_folder(comparison, next(iter(comparison.methods)), seed)
        backbone = _start(_read(below)) if below else {}
    names = [name for name in (comparison.measure.key, *MEASURES) if name in MEASURES]
    measured = {name: backbone[name] for name in names if backbone.get(name) is not None}
    folder = above if comparison.detect else below
    seconds = [float(result.get("seconds") or 0.0) for result in (detector, backbone)]
    judged, of_detections = detector or backbone, ["map_by_iou", "coco", "objects", "objects_per_class"]
    if not comparison.detect:
        of_detections += ["per_class", "per_class_area"]
    tree = {
        **detector,
        **{key: detector.get(key) or {} for key in of_detections},
        **{key: judged.get(key) for key in ("params", "steps")},
        "seconds": sum(seconds),
        "seconds_detector": seconds[0],
        "seconds_backbone": seconds[1],
        "speed_detector": detector.get("speed") or {},
        "speed_backbone": backbone.get("speed") or {},
        "term_weights": {"backbone": backbone.get("weights") or {}, "detector": detector.get("weights") or {}},
        "measured": measured or None,
        "backbone": backbone_name(comparison, row, seed) if backbone else "",
        "run": above.relative_to(comparison.folder).as_posix() if comparison.detect else None,
        "distill_run": below.relative_to(comparison.folder).as_posix() if below and backbone else None,
    }
    for key, kind in (("top1", float | None), ("top5", float | None), ("val_images", int | None)):
        tree[key] = from_json(kind, backbone.get(key), f"{below}/result.json", REMEDY, key)
    for key in ("map", "map_area") if comparison.detect else (comparison.measure.key,):
        from_json(float, (tree | measured).get(key), f"{folder}/result.json", REMEDY, key)
    entry: SeedResult = from_json(SeedResult, tree, f"{folder}/result.json", REMEDY)
    return entry


def _over_seeds(seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Return the means of a row, and what all its seeds share."""

    def over(numbers: Iterable[float | None]) -> tuple[float | None, float | None]:
        # None where there is no value, as of AP of a class without test objects
        known = [number for number in numbers if number is not None]
        return mean_std(known) if known else (None, None)

    values: dict[str, Any] = {}
    for key in ("per_class", "per_class_area", "map_by_iou", "coco", "speed_backbone", "speed_detector"):
        found = [getattr(one, key) for one in seeds]
        values[key] = {name: over(one.get(name) for one in found)[0] for name in found[0]}
    found = [one.measured or {} for one in seeds]
    means = {name: over(one[name] for one in found) for name in found[0] if all(name in one for one in found)}
    values["measured"] = {name: mean for name, (mean, _) in means.items()} or None
    values["measured_std"] = {name: std for name, (_, std) in means.items() if std is not None} or None
    for key in ("map", "map_area", "top1"):
        values[key], values[f"{key}_std"] = over(getattr(one, key) for one in seeds)
    for key in ("seconds", "seconds_backbone", "seconds_detector"):
        values[key], _ = over(getattr(one, key) for one in seeds)
    backbones = [one.backbone for one in seeds if one.backbone]
    shared = {key: getattr(seeds[0], key) for key in ("objects", "objects_per_class", "params")}
    return {**values, **shared, "backbone": backbones}


def _transfer(comparison: Comparison, runs: Sequence[Run], row: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Return the last stage in which a row learns from a teacher, its terms' weights, and what else is its own."""
    spec = comparison.methods.get(row)
    differs = _differs(comparison, runs, row)
    if not spec or row == BASELINE:
        return {"stage": "", "weights": [], "differs": differs}
    found = [
        {name: fmean(one.term_weights[stage].get(name, weight) for one in seeds) for name, weight in first.items()}
        for stage, first in seeds[0].term_weights.items()
    ]
    nodes = [transfer_of(comparison.distill, spec.backbone.word)]
    if comparison.detect:
        nodes.append(comparison.detect.TRANSFER)
    return {
        "stage": "detector" if spec.detector.names else "backbone",
        "weights": row_weights(spec, comparison.tuned, nodes, found),
        "differs": differs,
    }


def _differs(comparison: Comparison, runs: Sequence[Run], row: str) -> list[str]:
    """Return what a row's detector has otherwise than ce's, and levels and options that only its terms have."""
    baseline = comparison.baseline
    detectors = {run.row: run_config(comparison, run) for run in runs if run.row in (row, baseline)}
    own, common = (plain(flat(detectors.get(name, CfgNode()))) for name in (row, baseline))
    lines = []
    if row == COCO:
        lines.append(f"on {own['MODEL.TIMM.ARCH']}, begins with all of the detector {Path(own['MODEL.WEIGHTS']).name}")
    lines += [
        f"{key} {own.get(key, 'none')} ({baseline}: {common.get(key, 'none')})"
        for key in dict.fromkeys([*own, *common])
        if own.get(key) != common.get(key)
        and not key.startswith(("METHOD", "TEACHER.", "TRANSFER."))
        and not key.startswith(comparison.another.get(row, ()))
        and concerns(key, RESUME)
        and not concerns(key, RUN)
    ]
    spec = comparison.methods.get(row)
    if spec is None:
        return lines
    distill = merge_stage(comparison.distill, next(run.options for run in runs if run.kind == STUDENTS), "stage one")
    stages = [("", spec.backbone, transfer_of(distill, spec.backbone.word), comparison.distill.TRANSFER)]
    if detectors:
        stages.append((MARK, spec.detector, detectors[row].TRANSFER, comparison.detect.TRANSFER))
    for mark, method, node, base in stages:
        pooled = comparison.detect.MODEL.ROI_HEADS.IN_FEATURES if mark else []
        if method.names and list(node.LEVELS) != (levels := list(base.LEVELS or pooled)):
            lines.append(f"TRANSFER.LEVELS{mark} {list(node.LEVELS)} (elsewhere: {levels})")
        for name in method.names:
            options = plain(node.OPTIONS).get(name, {})
            lines += [
                f"{name}{mark}.{option} {value} (default: {default})"
                for option, default in get_term(name).options.items()
                if (value := options.get(option, default)) != default
            ]
    return lines


def _commands(comparison: Comparison, runs: Sequence[Run], row: str) -> list[str]:
    """Return the commands of a row's runs and of all that they need, in the order of the plan."""
    names = {run.name for run in runs if run.row == row or (run.kind == STUDENTS and not comparison.detect)}
    # in a plan each run comes after those that it needs
    for run in reversed(runs):
        if run.name in names:
            names |= set(run.needs)
    return [
        f"OMP_NUM_THREADS={run.threads} nst-det {shlex.join(run.command(comparison.folder))}"
        for run in runs
        if run.name in names
    ]
