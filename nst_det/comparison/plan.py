"""The runs of a comparison and what each one needs: plain data, made before anything is started.

::

    data ──► teacher ──► distill/seed0 ──► detect/seed0/ce, detect/seed0/kd, ...
        │       └──► detect/seed0/teacher ──► detect/seed0/cwd@det, ...
        └──────────────────────────────► detect/seed0/scratch

Stage one is one run a seed, because it trains the students of all methods side by side.  Everything below a
folder is named by what it is, so that a method or seed added later finds the rest done::

    DIR/data/                              the generated data set
    DIR/teacher/teacher/                   the teacher's run folder
    DIR/distill/seed0/students/kd/         a student's run folder
    DIR/backbones/                         the backbone files of teacher and students
    DIR/detect/seed0/kd/                   a detector's run folder, with its evaluation
    DIR/configs/, DIR/logs/                what each run was given, and what it said
    DIR/report/                            the answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nst_det.comparison.config import BASELINE, NO_FPN, SCRATCH, TEACHER, Comparison, RowSpec, parse_row
from nst_det.comparison.stages import DETECT, DISTILL, generated_settings
from nst_det.engine.device import core_count
from nst_det.errors import UserError

DATA, STUDENTS, DETECTOR, TEACHER_DETECTOR = "data", "students", "detector", "teacher detector"
# of the detector that teaches: the same for all seeds, as the teacher of stage one is
TEACHER_SEED = 0
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """One process of the comparison.

    Attributes:
        name: unique; also the path of its config and log (``detect/seed0/kd``).
        kind: ``data``, ``teacher``, ``students``, ``teacher detector`` or ``detector``: runs of one kind cost about the
            same.
        needs: names of the runs that must be done before.
        results: files that are all there once the run is done.
        settings: what this run sets in its stage's config, by dotted key.
        options: KEY VALUE pairs of the row, below ``settings``; for ``data`` the options of the command line.
        folders: run folders whose metrics tell how far it is.
        threads: CPU threads of the process.
        row: the row of the table it belongs to, or None.
        seed: its seed, or None.
        wants_gpu: whether it computes on a GPU where there is one.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    results: tuple[Path, ...]
    settings: dict[str, Any] = field(hash=False)
    options: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    threads: int = 1
    row: str | None = None
    seed: int | None = None
    wants_gpu: bool = False

    @property
    def word(self) -> str:
        """The word of the command line that does it."""
        return {DATA: "generate-data", DETECTOR: "train-det", TEACHER_DETECTOR: "train-det"}.get(self.kind, "distill")

    def command(self, folder: Path) -> list[str]:
        """What to type after ``nst-det``; ``folder`` is the comparison's."""
        if self.kind == DATA:
            return [self.word, *self.options]
        return [self.word, "--config-file", str(self.config_path(folder))]

    def config_path(self, folder: Path) -> Path:
        """Where its resolved config is written."""
        return folder / "configs" / f"{self.name}.yaml"

    @property
    def done(self) -> bool:
        """Whether all its results are there."""
        return all(path.exists() for path in self.results)

    @property
    def started(self) -> bool:
        """Whether an earlier call left something to go on from."""
        return any(folder.exists() for folder in self.folders)


def make_plan(comparison: Comparison) -> list[Run]:
    """All runs in an order in which each stands after those that it needs."""
    runs = []
    if comparison.generate:
        runs.append(_data_run(comparison))
    data = tuple(run.name for run in runs)
    if not comparison.distill.TEACHER.WEIGHTS:
        runs.append(_teacher_run(comparison, data))
    before = tuple(run.name for run in runs)
    for seed in comparison.seeds:
        runs.append(_students_run(comparison, seed, before))
    if comparison.learns_from_detector and not comparison.detect.TRANSFER.TEACHER.CONFIG_FILE:
        runs.append(_teacher_detector_run(comparison, data, before))
    taught = {run.name for run in runs}
    for seed in comparison.seeds:
        for row in comparison.all_rows:
            run = _detector_run(comparison, row, seed, data, before)
            if run.name not in taught:
                runs.append(run)
    return runs


def backbone_name(comparison: Comparison, row: str, seed: int) -> str:
    """The registry name of the backbone that a row's detector starts from; "" for a random one."""
    if row == SCRATCH:
        return ""
    if row == TEACHER:
        return f"{comparison.name}-teacher"
    return f"{comparison.name}-{_student(row)}-s{seed}"


def student_folder(comparison: Comparison, row: str, seed: int) -> Path:
    """The run folder of the student that a row's detector starts from."""
    return comparison.folder / "distill" / f"seed{seed}" / "students" / _student(row)


def _student(row: str) -> str:
    """The method of stage one whose backbone a row's detector starts from."""
    return BASELINE if row == NO_FPN else parse_row(row).backbone.word


def teacher_folder(comparison: Comparison) -> Path:
    """The run folder of the teacher."""
    return comparison.folder / "teacher" / "teacher"


def detector_folder(comparison: Comparison, row: str, seed: int) -> Path:
    """The run folder of one detector."""
    return comparison.folder / "detect" / f"seed{seed}" / row


def _teacher_weights(comparison: Comparison) -> str:
    """The user's own teacher, or the file that the teacher's run writes."""
    return comparison.distill.TEACHER.WEIGHTS or _backbone_file(comparison, backbone_name(comparison, TEACHER, 0))


def _registry(comparison: Comparison) -> Path:
    return comparison.folder / "backbones"


def _data_run(comparison: Comparison) -> Run:
    from nst_det.data.synthetic import SETTINGS_FILE

    assert comparison.data_root is not None
    options = [word for name, value in comparison.generate.items() for word in (f"--{name.replace('_', '-')}", value)]
    # the images are the same whatever the number of workers
    workers = core_count()
    options = ["--output", comparison.data_root, "--workers", workers, *options]
    return Run(
        name="data",
        kind=DATA,
        needs=(),
        results=(comparison.data_root / SETTINGS_FILE,),
        settings={},
        options=tuple(str(word) for word in options),
        threads=workers,
    )


def _teacher_run(comparison: Comparison, needs: tuple[str, ...]) -> Run:
    return Run(
        name="teacher",
        kind=TEACHER,
        needs=needs,
        results=(teacher_folder(comparison) / "result.json",),
        settings={**_distill_settings(comparison), "OUTPUT_DIR": str(comparison.folder / "teacher"), "METHODS": []},
        folders=(teacher_folder(comparison),),
        threads=comparison.threads,
        wants_gpu=True,
    )


def _students_run(comparison: Comparison, seed: int, needs: tuple[str, ...]) -> Run:
    folders = tuple(student_folder(comparison, method, seed) for method in comparison.students)
    return Run(
        name=f"distill/seed{seed}",
        kind=STUDENTS,
        needs=needs,
        results=tuple(folder / "result.json" for folder in folders),
        settings={
            **_distill_settings(comparison),
            "OUTPUT_DIR": str(comparison.folder / "distill" / f"seed{seed}"),
            "SEED": seed,
            "METHODS": list(comparison.students),
            "TEACHER.WEIGHTS": _teacher_weights(comparison),
        },
        options=_tuned_students(comparison),
        folders=folders,
        threads=comparison.threads,
        seed=seed,
        wants_gpu=True,
    )


def _detector_run(comparison: Comparison, row: str, seed: int, data: tuple[str, ...], teacher: tuple[str, ...]) -> Run:
    folder = detector_folder(comparison, row, seed)
    if row == SCRATCH:
        weights, needs = "", data
    elif row == TEACHER:
        weights, needs = _teacher_weights(comparison), teacher
    else:
        weights, needs = _backbone_file(comparison, backbone_name(comparison, row, seed)), (f"distill/seed{seed}",)
    settings: dict[str, Any] = {
        "OUTPUT_DIR": str(folder),
        "SEED": seed,
        "ENGINE": comparison.engine,
        "MODEL.WEIGHTS": weights,
    }
    if row == TEACHER:
        settings |= {"MODEL.TIMM.ARCH": comparison.distill.TEACHER.ARCH}
        settings |= {"MODEL.TIMM.KWARGS": comparison.distill.TEACHER.ARCH_KWARGS}
    elif row not in (SCRATCH, NO_FPN) and parse_row(row).detector.names:
        settings |= _transfer_settings(comparison, parse_row(row))
        if not comparison.detect.TRANSFER.TEACHER.CONFIG_FILE:
            needs = (*needs, teacher_detector_name(comparison))
    return Run(
        name=f"detect/seed{seed}/{row}",
        kind=DETECTOR,
        needs=needs,
        results=(folder / "result.json",),
        settings=settings | generated_settings(DETECT, comparison.detect, comparison.data_root),
        options=comparison.row_opts.get(row, ()) + _tuned_detector(comparison, row),
        folders=(folder,),
        row=row,
        seed=seed,
        wants_gpu=comparison.detect.MODEL.DEVICE != "cpu",
    )


def teacher_detector_name(comparison: Comparison) -> str:
    """The run of the detector that rows with ``@det`` learn from; "" where that is the user's own."""
    return "" if comparison.detect.TRANSFER.TEACHER.CONFIG_FILE else f"detect/seed{TEACHER_SEED}/{TEACHER}"


def _teacher_detector_run(comparison: Comparison, data: tuple[str, ...], teacher: tuple[str, ...]) -> Run:
    """The detector that rows with ``@det`` learn from; the row ``teacher`` of its seed is the same run."""
    run = _detector_run(comparison, TEACHER, TEACHER_SEED, data, teacher)
    if TEACHER in comparison.rows and TEACHER_SEED in comparison.seeds:
        return run
    return replace(run, kind=TEACHER_DETECTOR, row=None, seed=None)


def _transfer_settings(comparison: Comparison, row: RowSpec) -> dict[str, Any]:
    """What a row's terms of stage two set in its detector's config."""
    node = comparison.detect.TRANSFER
    settings: dict[str, Any] = {"TRANSFER.METHOD": row.detector.word}
    found = comparison.tuned.get(row.word)
    if not node.LEVELS and not (found and "LEVELS" in found.settings):
        # the levels that boxes are pooled from
        settings["TRANSFER.LEVELS"] = list(comparison.detect.MODEL.ROI_HEADS.IN_FEATURES)
    if not node.TEACHER.CONFIG_FILE:
        folder = detector_folder(comparison, TEACHER, TEACHER_SEED)
        config = comparison.folder / "configs" / f"{teacher_detector_name(comparison)}.yaml"
        settings["TRANSFER.TEACHER.CONFIG_FILE"] = str(config)
        settings["TRANSFER.TEACHER.WEIGHTS"] = str(folder / WEIGHTS_FILE)
    return settings


def _tuned_students(comparison: Comparison) -> tuple[str, ...]:
    """KEY VALUE pairs by which stage one gives each method what was found for it."""
    found = {word: dict(comparison.tuned[word].settings) for word in comparison.students if word in comparison.tuned}
    return ("TRANSFER.BY_METHOD", repr(found)) if found else ()


def _tuned_detector(comparison: Comparison, row: str) -> tuple[str, ...]:
    """The same for the terms of stage two of a row."""
    if row not in comparison.tuned or not parse_row(row).detector.names:
        return ()
    settings = comparison.tuned[row].settings
    return tuple(word for key, value in settings.items() for word in (f"TRANSFER.{key}", repr(value)))


def _distill_settings(comparison: Comparison) -> dict[str, Any]:
    return {
        "NAME": comparison.name,
        "REGISTRY": str(_registry(comparison)),
        **generated_settings(DISTILL, comparison.distill, comparison.data_root),
    }


def _backbone_file(comparison: Comparison, name: str) -> str:
    return str(_registry(comparison) / f"{name}.safetensors")


def check_order(runs: Sequence[Run]) -> None:
    """Check that each run stands after those it needs and no name comes twice.

    Raises:
        UserError: it does not; the plan could never end.
    """
    seen: set[str] = set()
    for run in runs:
        if run.name in seen or not seen.issuperset(run.needs):
            raise UserError(f"plan: run {run.name} is named twice or stands before what it needs")
        seen.add(run.name)
