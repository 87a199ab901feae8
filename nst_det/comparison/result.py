"""The result of a comparison: what ``results.json`` holds, as the report and the API read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nst_det.comparison.statistics import Difference, Verdict
from nst_det.distillation.config import AGREEMENT, CKA, HEADS, KNN, LINEAR
from nst_det.engine.io import from_json, read_json, write_json
from nst_det.errors import UserError

BASELINE, SCRATCH, IMAGENET, COCO, NO_FPN, TEACHER = "ce", "scratch", "imagenet", "coco", "no-fpn", "teacher"
# rows that no transfer method made: a random backbone, the architecture's published weights, a detector of other data,
# ce's without FPN, and the teacher's own
MARKS = (SCRATCH, IMAGENET, COCO, NO_FPN, TEACHER)
# those that begin with weights from elsewhere
PUBLISHED_STARTS = (IMAGENET, COCO)
# they differ between two equal comparisons: when, where and how fast, not what
VOLATILE = ("provenance", "commands", "cost")
REMEDY = "make it again with nst-det compare"


@dataclass(frozen=True)
class Measure:
    """What the rows of a comparison are judged by: a score 0..1 on the test data, larger is better."""

    key: str  # the field of a row and of a seed that has it
    name: str  # in a sentence
    head: str  # of its column
    of: str  # what it is of


MAP = Measure("map", "mAP", "mAP (11-point)", "detector")
TOP1 = Measure("top1", "top-1", HEADS["top1"], "student")
# where stage one learns from images without labels
MEASURES = {
    key: Measure(key, name, HEADS[key], "student")
    for key, name in (
        (KNN, "k-NN accuracy"),
        (LINEAR, "linear probe accuracy"),
        (AGREEMENT, "agreement with the teacher"),
        (CKA, "CKA with the teacher"),
    )
}


class Scored:
    """A row, or one seed of it: judged by mAP, or where stage one alone is compared by top-1.

    Without labels it is judged by the first that was ``measured``.
    """

    map: float | None
    top1: float | None
    measured: dict[str, float] | None

    @property
    def measure(self) -> Measure:
        """By what it is judged."""
        if self.map is None and self.measured:
            return MEASURES.get(next(iter(self.measured)), TOP1)
        return TOP1 if self.map is None else MAP

    @property
    def score(self) -> float:
        """The value that it is judged by, 0..1."""
        score: float = self.value(self.measure)  # type: ignore[assignment]
        return score

    def value(self, measure: Measure) -> float | None:
        """The value of one measure, 0..1; None where it wasn't measured."""
        found: float | None = getattr(self, measure.key, (self.measured or {}).get(measure.key))
        return found


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass: the median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Cost:
    """A forward pass of the detector of ``run`` on one image."""

    run: str
    parameters: int
    macs: int  # multiply-adds
    size: tuple[int, int]  # height and width of the image, pixels
    device: str
    threads: int  # of the CPU
    machine: str
    latency: Latency

    @property
    def flops(self) -> int:
        """Single operations: a multiply-add is two."""
        return 2 * self.macs

    @property
    def where(self) -> str:
        """The machine, its threads and the image's size."""
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
class SeedResult(Scored):
    """One row of one seed: the detector's ``result.json``, and its backbone's; alone, the latter is the student's."""

    map: float | None  # this and all about detections empty without a detector
    map_area: float | None
    per_class: dict[str, float | None]
    per_class_area: dict[str, float | None]
    map_by_iou: dict[str, float | None]
    coco: dict[str, float | None]
    objects: dict[str, int]
    objects_per_class: dict[str, int]
    checkpoints: Checkpoints | None
    params: int | None
    engine: str | None
    steps: int | None
    seconds_detector: float
    speed_detector: dict[str, float]
    top1: float | None
    top5: float | None
    measured: dict[str, float] | None  # by the keys of MEASURES, what it is judged by first; None with labels
    val_images: int | None  # that top1 and top5 are measured on
    term_weights: dict[str, dict[str, float]]  # of each stage (backbone, detector), AUTO_WEIGHT's choice among them
    backbone: str
    seconds_backbone: float
    speed_backbone: dict[str, float]
    seconds: float
    run: str | None  # of the detector; folders relative to the comparison's
    distill_run: str | None


@dataclass(frozen=True)
class TermWeight:
    """The weight of one term of a row: a mean over seeds, None where no run of the row tells it."""

    term: str  # with @det where it works in stage two
    weight: float | None
    source: Literal["default", "configured", "tuned", "auto"]
    trials: int | None  # of the search that found it


@dataclass(frozen=True)
class RowResult(Scored):
    """One row over all its seeds; AP, mAP and top-1 are means over seeds, 0..1, None where nothing is known."""

    method: str
    stage: Literal["", "backbone", "detector"]  # the last one in which it learns from a teacher; "" where it doesn't
    weights: list[TermWeight]
    differs: list[str]  # what its training has otherwise than that of ce, besides its terms: "KEY value (ce: value)"
    map: float | None  # VOC mAP at IoU 0.5, 11-point; None where stage one alone is compared
    map_std: float | None  # standard deviation over seeds
    map_area: float | None  # by area
    map_area_std: float | None
    seeds: list[int]
    delta_vs_ce: float  # mean difference in the score to ce, or to baseline; see statistics.EXPLANATION
    delta_interval: tuple[float, float] | None
    p_value: float | None
    p_holm: float | None
    verdict: Verdict
    vs_imagenet: Difference | None  # the same to the row imagenet, where the students begin from its weights
    per_class: dict[str, float | None]  # 11-point AP
    per_class_area: dict[str, float | None]
    map_by_iou: dict[str, float | None]  # this and the next three as nst_det.evaluation.metrics.summarize gives them
    coco: dict[str, float | None]
    objects: dict[str, int]
    objects_per_class: dict[str, int]
    top1: float | None  # of the backbone, or student
    top1_std: float | None
    measured: dict[str, float] | None  # means over seeds, as SeedResult has them
    measured_std: dict[str, float] | None
    seconds: float  # of training, both stages together
    seconds_backbone: float
    seconds_detector: float
    speed_backbone: dict[str, float | None]  # of training, as nst_det.engine.metrics.speed_of gives it
    speed_detector: dict[str, float | None]
    params: int | None  # of the detector, or student
    backbone: list[str]  # names in the registry, one a seed
    per_seed: dict[str, SeedResult]  # by seed, as text
    commands: list[str]  # they make the row again
    cost: Cost | None

    @property
    def score_std(self) -> float | None:
        """Standard deviation of the score over seeds."""
        key = self.measure.key
        std: float | None = getattr(self, f"{key}_std", (self.measured_std or {}).get(key))
        return std

    @property
    def is_method(self) -> bool:
        """Whether it learns from a teacher (it is not the baseline, nor one of the marks)."""
        return self.method != BASELINE and self.method not in MARKS

    @property
    def weights_from(self) -> str:
        """Where its weights are from, such as ``default`` or ``tuned (8 trials), configured``; "" without terms."""
        return ", ".join(self._weights_by_source())

    @property
    def weights_text(self) -> str:
        """The same with each weight, such as ``default: kd 1, nst-poly 50``."""
        return "; ".join(f"{source}: {', '.join(terms)}" for source, terms in self._weights_by_source().items())

    def _weights_by_source(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for one in self.weights:
            source = one.source if one.trials is None else f"{one.source} ({one.trials} trials)"
            found.setdefault(source, []).append(one.term if one.weight is None else f"{one.term} {one.weight:.4g}")
        return found


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
    engine: str  # of the detectors; "" where stage one alone is compared, without classes then
    classes: list[str]
    rows: list[RowResult]
    missing: dict[str, str] | None  # rows without a result, since a run of theirs was not finite: at which step
    teacher: TeacherResult | None
    student_weights: str  # the published weights that all students begin from; "" for random ones
    published: list[str]  # tables of papers beside this one, by their names in nst_det.comparison.published
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def measure(self) -> Measure:
        """By what the rows are judged."""
        return self.rows[0].measure

    @property
    def baseline(self) -> str:
        """The row that all others are compared with: ce, or without labels the student as stage one began with it."""
        return next((row.method for row in self.rows if row.verdict == "reference"), BASELINE)

    @property
    def seeds(self) -> list[int]:
        """All seeds that any row has, in order."""
        return sorted({seed for row in self.rows for seed in row.seeds})

    @property
    def methods(self) -> list[RowResult]:
        """The rows that learn from a teacher."""
        return [row for row in self.rows if row.is_method]

    @property
    def stage_one(self) -> Measure:
        """By what students are judged: top-1, or without labels the first that was measured of them."""
        return next((MEASURES[next(iter(row.measured))] for row in self.rows if row.measured), TOP1)

    @property
    def compared_with_imagenet(self) -> bool:
        """Whether rows have a difference to imagenet beside that to the baseline."""
        return self.baseline != IMAGENET and any(row.vs_imagenet for row in self.rows)

    @property
    def leader(self) -> RowResult | None:
        """The transfer method with the highest score (the baseline where there is none); the first of equal ones."""
        rows = self.methods or [row for row in self.rows if row.method == BASELINE]
        return max(rows, key=lambda row: row.score, default=None)

    def row(self, method: str) -> RowResult | None:
        """Return the row of a method, or None."""
        return next((row for row in self.rows if row.method == method), None)

    def save(self, path: Path) -> None:
        """Write ``results.json``."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ComparisonResult:
        """Read ``results.json``; the error names the key whose value has another type than its field."""
        result: ComparisonResult = from_json(ComparisonResult, read_json(path), str(path), REMEDY)
        if not result.rows:
            raise UserError(f"{path}: rows is empty; {REMEDY}")
        key = result.measure.key
        for index, row in enumerate(result.rows):
            scored = {"": row, **{f"per_seed.{seed}.": one for seed, one in row.per_seed.items()}}
            for where, one in scored.items():
                if one.measure.key != key or one.value(one.measure) is None:
                    name = f"rows.{index}.{where}{key}"
                    raise UserError(f"{path}: {name} is missing, or not what all rows are judged by; {REMEDY}")
        return result


def comparable(results: Any) -> Any:
    """Return results without what may differ between two runs of the same comparison: times, places and versions.

    Example:
        >>> comparable({"map": 0.5, "seconds": 3.2, "provenance": {}})
        {'map': 0.5}
    """
    if isinstance(results, ComparisonResult):
        results = asdict(results)
    if isinstance(results, Mapping):
        return {
            key: comparable(value)
            for key, value in results.items()
            if key not in VOLATILE and not str(key).startswith(("seconds", "speed"))
        }
    return [comparable(item) for item in results] if isinstance(results, list | tuple) else results
