"""A comparison's ``results.json`` as typed, checked data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nst_det.errors import UserError
from nst_det.report.cost import Checkpoints, Cost, read_checkpoints, read_cost, read_numbers

BETTER, WORSE, NOISE, SINGLE, REFERENCE = "better", "worse", "noise", "single seed", "reference"
BASELINE = "ce"
# rows that no transfer method made: a random backbone below, the teacher's own above, and ce's without FPN
LOWER_MARK, UPPER_MARK, NO_FPN = "scratch", "teacher", "no-fpn"


@dataclass(frozen=True)
class SeedRun:
    """One seed of a row: its numbers (fractions, seconds) and where its run folders are."""

    seed: int
    map: float
    map_area: float | None = None
    top1: float | None = None
    seconds: float | None = None
    run: Path | None = None
    distill_run: Path | None = None
    checkpoints: Checkpoints | None = None


@dataclass(frozen=True)
class Row:
    """One method over all its seeds.

    AP, mAP and top-1 are fractions 0..1; ``delta`` is the mean over seeds of (this row - ce) within a seed and
    ``interval`` its 95 % interval, None where there are too few seeds.  ``verdict`` is one of ``better``,
    ``worse``, ``noise``, ``single seed`` and ``reference``.  ``seconds`` of training are those of both stages,
    ``seconds_backbone`` the share of stage one.  ``stage`` is ``backbone`` or ``detector``, the last stage in which the
    row learns from a teacher; ``weights`` says where the weights of its terms are from.  ``coco``, ``by_iou`` (mAP by
    overlap), ``objects`` (of the test set by size), ``speed_backbone`` and ``speed_detector`` (``images_per_second``,
    ``data_wait`` and ``gpu_memory_gib`` of training) hold only what is known.
    """

    method: str
    map: float
    map_std: float | None
    map_area: float | None
    seeds: tuple[int, ...]
    delta: float | None
    interval: tuple[float, float] | None
    verdict: str
    p_holm: float | None
    per_class: Mapping[str, float]
    per_class_area: Mapping[str, float]
    top1: float | None
    seconds: float | None
    params: int | None
    runs: tuple[SeedRun, ...]
    commands: tuple[str, ...]
    stage: str = ""
    weights: str = ""
    seconds_backbone: float | None = None
    seconds_detector: float | None = None
    cost: Cost | None = None
    coco: Mapping[str, float] = field(default_factory=dict)
    by_iou: Mapping[float, float] = field(default_factory=dict)
    objects: Mapping[str, float] = field(default_factory=dict)
    speed_backbone: Mapping[str, float] = field(default_factory=dict)
    speed_detector: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_method(self) -> bool:
        """Whether it learns from a teacher (it is not the baseline, nor one of the marks)."""
        return self.method not in (BASELINE, LOWER_MARK, UPPER_MARK, NO_FPN)


@dataclass(frozen=True)
class Results:
    """A whole comparison; ``rows`` are in the order in which they are shown."""

    name: str
    engine: str
    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    provenance: Any = field(default_factory=dict)
    settings: Any = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that any row has, in order."""
        return tuple(sorted({seed for row in self.rows for seed in row.seeds}))

    def row(self, method: str) -> Row | None:
        """The row of a method, or None."""
        return next((row for row in self.rows if row.method == method), None)

    @property
    def leader(self) -> Row | None:
        """The transfer method with the highest mAP (the baseline where there is none); the first of equal ones."""
        candidates = [row for row in self.rows if row.is_method] or [r for r in self.rows if r.method == BASELINE]
        return max(candidates, key=lambda row: row.map, default=None)


def read_results(tree: Mapping[str, Any], runs: Path, source: str = "results") -> Results:
    """Check the content of ``results.json`` and resolve its run folders against ``runs``.

    Args:
        tree: the parsed JSON.
        runs: the folder that relative run folders start from.
        source: what errors name, usually the file.

    Raises:
        UserError: a field is missing or has a value that can't be shown; the field is named.
    """
    rows_tree = _get(tree, "rows", source)
    if not isinstance(rows_tree, list) or not rows_tree:
        raise UserError(f"{source}: rows must be a list with at least one row; make it again with nst-det compare")
    rows = tuple(_row(row, runs, f"{source}: rows[{index}]") for index, row in enumerate(rows_tree))
    methods = [row.method for row in rows]
    if len(set(methods)) < len(methods):
        raise UserError(f"{source}: rows name a method twice ({', '.join(methods)}); remove one of them")
    classes = tree.get("classes") or list(dict.fromkeys(name for row in rows for name in row.per_class))
    return Results(
        name=str(tree.get("name", "comparison")),
        engine=str(tree.get("engine", "unknown")),
        rows=rows,
        classes=tuple(str(name) for name in classes),
        provenance=tree.get("provenance") or {},
        settings=tree.get("settings") or {},
        teacher=tree["teacher"] if isinstance(tree.get("teacher"), Mapping) else {},
    )


def _row(tree: Any, runs: Path, where: str) -> Row:
    method = str(_get(tree, "method", where))
    delta = _number(tree, "delta_vs_ce", where)
    per_seed = tree.get("per_seed") or {}
    params = _number(tree, "params", where)
    return Row(
        method=method,
        map=_required(tree, "map", where),
        map_std=_number(tree, "map_std", where),
        map_area=_number(tree, "map_area", where),
        seeds=tuple(int(seed) for seed in _get(tree, "seeds", where)),
        delta=delta,
        interval=_interval(tree.get("delta_interval"), where),
        verdict=_verdict(tree.get("verdict"), method, where),
        p_holm=_number(tree, "p_holm", where),
        per_class=_per_class(tree.get("per_class"), f"{where}.per_class"),
        per_class_area=_per_class(tree.get("per_class_area"), f"{where}.per_class_area"),
        top1=_number(tree, "top1", where),
        seconds=_number(tree, "seconds", where),
        params=None if params is None else int(params),
        runs=tuple(_seed_run(seed, per_seed[seed], runs, where) for seed in sorted(per_seed, key=int)),
        commands=tuple(str(command) for command in tree.get("commands") or ()),
        stage=str(tree.get("stage") or ""),
        weights=str(tree.get("weights") or ""),
        seconds_backbone=_number(tree, "seconds_backbone", where),
        seconds_detector=_number(tree, "seconds_detector", where),
        cost=read_cost(tree.get("cost"), where),
        coco=read_numbers(tree.get("coco"), f"{where}.coco"),
        by_iou={float(iou): ap for iou, ap in read_numbers(tree.get("map_by_iou"), f"{where}.map_by_iou").items()},
        objects=read_numbers(tree.get("objects"), f"{where}.objects"),
        speed_backbone=read_numbers(tree.get("speed_backbone"), f"{where}.speed_backbone"),
        speed_detector=read_numbers(tree.get("speed_detector"), f"{where}.speed_detector"),
    )


def _seed_run(seed: Any, tree: Any, runs: Path, where: str) -> SeedRun:
    where = f"{where}.per_seed[{seed}]"
    return SeedRun(
        seed=int(seed),
        map=_required(tree, "map", where),
        map_area=_number(tree, "map_area", where),
        top1=_number(tree, "top1", where),
        seconds=_number(tree, "seconds", where),
        run=runs / tree["run"] if tree.get("run") else None,
        distill_run=runs / tree["distill_run"] if tree.get("distill_run") else None,
        checkpoints=read_checkpoints(tree.get("checkpoints"), where),
    )


def _verdict(word: Any, method: str, where: str) -> str:
    if method == BASELINE or word in (REFERENCE, "baseline"):
        return REFERENCE
    if word not in (BETTER, WORSE, NOISE, SINGLE):
        raise UserError(f"{where}.verdict: unknown word {word!r}; make it again with nst-det compare")
    return str(word)


def _get(tree: Any, key: str, where: str) -> Any:
    if not isinstance(tree, Mapping) or key not in tree:
        raise UserError(f"{where}.{key} is missing; make it again with nst-det compare")
    return tree[key]


def _required(tree: Any, key: str, where: str) -> float:
    value = _number(tree, key, where)
    if value is None:
        raise UserError(f"{where}.{key} is missing; make it again with nst-det compare")
    return value


def _number(tree: Any, key: str, where: str) -> float | None:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}.{key} must be a finite number, but is {value!r}; make it again with nst-det compare")
    return float(value)


def _interval(value: Any, where: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"{where}.delta_interval must be [low, high], but is {value!r}")
    low, high = (_required({"delta_interval": end}, "delta_interval", where) for end in value)
    return low, high


def _per_class(tree: Any, where: str) -> dict[str, float]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} must map class names to AP; make it again with nst-det compare")
    return {str(name): float("nan") if ap is None else _required(tree, name, where) for name, ap in tree.items()}
