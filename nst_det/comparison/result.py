"""The answer of a comparison: what ``results.json`` holds, as the report and the API read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nst_det.engine.io import read_json, write_json
from nst_det.errors import UserError

# rows that no transfer method made: a random backbone, ce's without FPN, and the teacher's own
BASELINE, MARKS = "ce", ("scratch", "no-fpn", "teacher")
# they differ between two equal comparisons: when, where and how fast, not what
VOLATILE = ("provenance", "commands", "cost")
REMEDY = "make it again with nst-det compare"


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass: the median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Cost:
    """A forward pass of the detector of ``run`` on one image of ``size`` (height, width) pixels.

    ``macs`` are multiply-adds, ``flops`` single operations; ``threads`` are those of the CPU.
    """

    run: str
    parameters: int
    macs: int
    flops: int
    size: tuple[int, int]
    device: str
    threads: int
    machine: str
    latency: Latency

    @property
    def where(self) -> str:
        """The machine and how it was asked, in words."""
        threads = "" if self.device != "cpu" else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.machine}{threads}, {self.size[0]} × {self.size[1]} pixels"


@dataclass(frozen=True)
class Checkpoint:
    """Steps done, and AP on the validation split; None where no object counts there."""

    step: int
    map: float | None
    map_area: float | None


@dataclass(frozen=True)
class Checkpoints:
    """Of one run; ``tested`` says which of the two the test split was evaluated with."""

    best: Checkpoint
    last: Checkpoint
    tested: Literal["best", "last"]


@dataclass(frozen=True)
class SeedResult:
    """One row of one seed: the detector's ``result.json``, and its backbone's.

    ``term_weights`` are those that each stage had (``backbone``, ``detector``), AUTO_WEIGHT's choice among them;
    ``run`` and ``distill_run`` are folders relative to the comparison's.
    """

    map: float
    map_area: float
    per_class: dict[str, float | None]
    per_class_area: dict[str, float | None]
    map_by_iou: dict[str, float | None]
    coco: dict[str, float | None]
    objects: dict[str, int]
    checkpoints: Checkpoints | None
    params: int | None
    engine: str | None
    steps: int | None
    seconds_detector: float
    speed_detector: dict[str, float]
    top1: float | None
    top5: float | None
    term_weights: dict[str, dict[str, float]]
    backbone: str
    seconds_backbone: float
    speed_backbone: dict[str, float]
    seconds: float
    run: str
    distill_run: str | None


@dataclass(frozen=True)
class RowResult:
    """One row over all its seeds; AP, mAP and top-1 are means over seeds, 0..1, None where nothing is known.

    Attributes:
        method: its word.
        stage: ``backbone`` or ``detector``, the last stage in which it learns from a teacher; "" where it doesn't.
        weights: where the terms' weights are from, such as ``tuned: 8 trials``.
        map: VOC mAP at IoU 0.5, 11-point; ``map_area`` by area; ``_std`` are standard deviations over seeds.
        delta_vs_ce: mean difference in mAP, with ``delta_interval``, ``p_value``, ``p_holm`` and ``verdict``; see
            :data:`nst_det.comparison.statistics.EXPLANATION`.
        per_class: 11-point AP; ``map_by_iou``, ``coco`` and ``objects`` are as
            :func:`nst_det.evaluation.metrics.summarize` gives them.
        top1: of the backbone.
        seconds: of training, both stages together.
        speed_backbone: of training, as :func:`nst_det.engine.metrics.speed_of` gives it.
        params: of the detector.
        backbone: names in the registry, one a seed.
        per_seed: by seed, as text.
        commands: they make the row again.
        cost: of a forward pass.
    """

    method: str
    stage: Literal["", "backbone", "detector"]
    weights: str
    map: float
    map_std: float | None
    map_area: float
    map_area_std: float | None
    seeds: list[int]
    delta_vs_ce: float
    delta_interval: tuple[float, float] | None
    p_value: float | None
    p_holm: float | None
    verdict: Literal["reference", "single seed", "noise", "better", "worse"]
    per_class: dict[str, float | None]
    per_class_area: dict[str, float | None]
    map_by_iou: dict[str, float | None]
    coco: dict[str, float | None]
    objects: dict[str, int]
    top1: float | None
    top1_std: float | None
    seconds: float
    seconds_backbone: float
    seconds_detector: float
    speed_backbone: dict[str, float | None]
    speed_detector: dict[str, float | None]
    params: int | None
    backbone: list[str]
    per_seed: dict[str, SeedResult]
    commands: list[str]
    cost: Cost | None

    @property
    def is_method(self) -> bool:
        """Whether it learns from a teacher (it is not the baseline, nor one of the marks)."""
        return self.method != BASELINE and self.method not in MARKS


@dataclass(frozen=True)
class TeacherResult:
    """The classifier that taught stage one."""

    name: str | None
    top1: float | None
    top5: float | None
    params: int | None
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison; ``rows`` are in the order in which they are shown."""

    name: str
    engine: str
    classes: list[str]
    rows: list[RowResult]
    teacher: TeacherResult | None
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def seeds(self) -> list[int]:
        """All seeds that any row has, in order."""
        return sorted({seed for row in self.rows for seed in row.seeds})

    @property
    def methods(self) -> list[RowResult]:
        """The rows that learn from a teacher."""
        return [row for row in self.rows if row.is_method]

    @property
    def leader(self) -> RowResult | None:
        """The transfer method with the highest mAP (the baseline where there is none); the first of equal ones."""
        return max(
            self.methods or [row for row in self.rows if row.method == BASELINE], key=lambda row: row.map, default=None
        )

    def row(self, method: str) -> RowResult | None:
        """Return the row of a method, or None."""
        return next((row for row in self.rows if row.method == method), None)

    def to_json(self) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        return dict(json.loads(json.dumps(asdict(self))))

    def save(self, path: Path) -> None:
        """Write ``results.json``."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ComparisonResult:
        """Read ``results.json``.

        Raises:
            UserError: no such file, or a value of another type than its field's; the key is named.
        """
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise UserError(f"{path}: not the results of a comparison; {REMEDY}")
        result: ComparisonResult = from_json(ComparisonResult, tree, str(path), REMEDY)
        if not result.rows:
            raise UserError(f"{path}: rows is empty; {REMEDY}")
        return result


def from_json(kind: Any, value: Any, path: str, remedy: str, key: str = "") -> Any:
    """Return parsed JSON as the type ``kind``: a dataclass, or what its fields here have; a missing key counts as null.

    Raises:
        UserError: a value is of another type, or not finite; ``path`` and the dotted key are named, with the remedy.
    """

    def inner(kind: Any, value: Any, name: object) -> Any:
        return from_json(kind, value, path, remedy, f"{key}.{name}".lstrip("."))

    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else from_json(args[0], value, path, remedy, key)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        kinds = get_type_hints(kind)
        return kind(
            **{field.name: inner(kinds[field.name], value.get(field.name), field.name) for field in fields(kind)}
        )
    if origin is dict and isinstance(value, dict):
        return {name: inner(args[1], item, name) for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [inner(args[0], item, index) for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(inner(arg, item, index) for index, (arg, item) in enumerate(zip(args, value)))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if (origin is Literal and value in args) or (kind in (int, str) and type(value) is kind):
        return value
    wanted = "a finite number" if kind is float else str(kind) if origin else kind.__name__
    raise UserError(f"{path}: {key} must be {wanted}, but is {value!r:.80}; {remedy}")


def comparable(results: Any) -> Any:
    """Return results without what may differ between two runs of the same comparison: times, places and versions.

    Example:
        >>> comparable({"map": 0.5, "seconds": 3.2, "provenance": {}})
        {'map': 0.5}
    """
    if isinstance(results, ComparisonResult):
        results = results.to_json()
    if isinstance(results, Mapping):
        return {
            key: comparable(value)
            for key, value in results.items()
            if key not in VOLATILE and not str(key).startswith(("seconds", "speed"))
        }
    return [comparable(item) for item in results] if isinstance(results, list | tuple) else results
