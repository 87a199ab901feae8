"""The runs of a comparison and what each one needs: plain data, made before anything is started.

::

    data ──► teacher ──► distill/seed0 ──► detect/seed0/ce, detect/seed0/kd, ...
        │       └──► detect/seed0/teacher ──► detect/seed0/cwd@det, ...
        └──────────────────────────────► detect/seed0/scratch, detect/seed0/imagenet, detect/seed0/coco

Where stage one alone is compared, the plan ends with it.  Stage one is one run a seed, because it trains the students
of all methods side by side.  A run's name is also its folder (``distill/seed0/students/kd`` of a student), and the path
of its config and log below ``configs`` and ``logs``, so that a method or seed added later finds the rest done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.config import Comparison
from nst_det.comparison.result import BASELINE, NO_FPN, PUBLISHED_STARTS, SCRATCH, TEACHER
from nst_det.comparison.rows import TEACHER_NETWORK
from nst_det.comparison.stages import (
    DETECT,
    DISTILL,
    TITLES,
    check_stage,
    errors_of,
    generated_settings,
    merge_stage,
)
from nst_det.data.synthetic import SETTINGS_FILE
from nst_det.distillation.config import teacher_solver
from nst_det.distillation.fingerprint import teacher_claim
from nst_det.engine.config import expand_path
from nst_det.engine.io import sha256_of_file
from nst_det.engine.run_dir import WEIGHTS_FILE, RunFolder, differing
from nst_det.errors import UserError

# kinds of runs, besides "teacher"
DATA, STUDENTS, DETECTOR, TEACHER_DETECTOR = "data", "students", "detector", "teacher detector"
# of the detector that teaches: the same for all seeds, as the teacher of stage one is
TEACHER_SEED = 0


@dataclass(frozen=True)
class Run:
    """One process of the comparison."""

    name: str
    kind: str
    needs: tuple[str, ...]  # names of the runs that must be done before
    results: tuple[Path, ...]  # files that are all there once the run is done
    settings: dict[str, Any] = field(hash=False)  # what it sets in its stage's config, by dotted key
    options: tuple[str, ...] = ()  # KEY VALUE pairs below the settings; of the data, what follows the command
    threads: int = 1
    row: str | None = None
    seed: int | None = None
    wants_gpu: bool = False  # where there is one

    @property
    def detects(self) -> bool:
        return self.kind in (DETECTOR, TEACHER_DETECTOR)

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(path.parent for path in self.results)

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.results)

    def command(self, folder: Path) -> list[str]:
        """Return what follows ``nst-det``."""
        if self.kind == DATA:
            return ["generate-data", *self.options]
        return ["train-det" if self.detects else "distill", "--config-file", str(self.config_path(folder))]

    def config_path(self, folder: Path) -> Path:
        return folder / "configs" / f"{self.name}.yaml"

    def log_path(self, folder: Path) -> Path:
        return folder / "logs" / f"{self.name}.log"


def make_plan(comparison: Comparison) -> list[Run]:
    """Return all runs, each after those that it needs."""
    runs = [_data_run(comparison)] if comparison.generate else []
    data = tuple(run.name for run in runs)
    if makes_teacher(comparison):
        runs.append(_teacher_run(comparison, data))
    before = tuple(run.name for run in runs)
    runs += [_students_run(comparison, seed, before) for seed in comparison.seeds]
    if not comparison.detect:
        return runs
    rows = [(row, seed) for seed in comparison.seeds for row in comparison.all_rows]
    if teacher_detector_name(comparison) and any(row.detector.names for row in comparison.methods.values()):
        run = _detector_run(comparison, TEACHER, TEACHER_SEED, data, before)
        if (TEACHER, TEACHER_SEED) in rows:
            # the row is the same run
            rows.remove((TEACHER, TEACHER_SEED))
            runs.append(run)
        else:
            runs.append(replace(run, kind=TEACHER_DETECTOR, row=None, seed=None))
    return runs + [_detector_run(comparison, row, seed, data, before) for row, seed in rows]


def makes_teacher(comparison: Comparison) -> bool:
    """Return whether a run makes the teacher, once for all seeds: anew, or of weights that aren't a backbone file."""
    node = comparison.distill.TEACHER
    taken = not node.TRAIN or not comparison.distill.DATA.LABELS or node.WEIGHTS.startswith("backbone:")
    if not node.WEIGHTS or taken:
        return not node.WEIGHTS
    # torch takes seconds to import
    from nst_det.models.io import is_backbone_file

    return not is_backbone_file(Path(expand_path(node.WEIGHTS, f"{DISTILL}.TEACHER.WEIGHTS")))


def run_config(comparison: Comparison, run: Run) -> CfgNode:
    """Return the whole config of one run, checked by its stage."""
    stage, base = (DETECT, comparison.detect) if run.detects else (DISTILL, comparison.distill)
    config = merge_stage(base, run.options, f"row {run.row}" if run.row else f"run {run.name}")
    config.defrost()
    for key, value in run.settings.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        assert last in node, key
        node[last] = value
    config.freeze()
    with errors_of(f"run {run.name}: {TITLES[stage]}"):
        check_stage(stage, config, comparison.engine)
    return config


def total_steps(run: Run, config: CfgNode) -> int:
    return int((teacher_solver(config) if run.kind == TEACHER else config.SOLVER).MAX_ITER)


def backbone_name(comparison: Comparison, row: str, seed: int) -> str:
    """Return the registry name of the backbone that a row's detector starts from; "" for one not of this comparison."""
    if row in (SCRATCH, *PUBLISHED_STARTS):
        return ""
    return f"{comparison.name}-{TEACHER if row == TEACHER else f'{_student(comparison, row)}-s{seed}'}"


def backbone_file(comparison: Comparison, row: str, seed: int) -> str:
    """Return that backbone's file; the user's own for a teacher that isn't made here."""
    if row == TEACHER and not makes_teacher(comparison):
        return str(comparison.distill.TEACHER.WEIGHTS)
    name = backbone_name(comparison, row, seed)
    return name and str(comparison.folder / "backbones" / f"{name}.safetensors")


def backbone_folder(comparison: Comparison, row: str, seed: int) -> Path | None:
    """Return the run folder of that backbone; None where no run made it."""
    if row in (SCRATCH, *PUBLISHED_STARTS, TEACHER):
        return teacher_folder(comparison) if row == TEACHER else None
    return comparison.folder / "distill" / f"seed{seed}" / "students" / _student(comparison, row)


def _student(comparison: Comparison, row: str) -> str:
    return BASELINE if row == NO_FPN else comparison.methods[row].backbone.word


def _teacher_network(comparison: Comparison) -> dict[str, Any]:
    """Return the keys of the teacher's network in stage two: that of a backbone file, or the one made here."""
    node = comparison.distill.TEACHER
    if node.WEIGHTS and not makes_teacher(comparison):
        # torch takes seconds to import
        from nst_det.models import load_card

        # plain weights have no card; what is wrong with a file is said by whoever loads it
        with suppress(UserError):
            card = load_card(expand_path(node.WEIGHTS, f"{DISTILL}.TEACHER.WEIGHTS"))
            return {"MODEL.TIMM.ARCH": card.arch, "MODEL.TIMM.KWARGS": card.arch_kwargs}
    return {key: node[own] for key, own in TEACHER_NETWORK.items()}


def teacher_folder(comparison: Comparison) -> Path:
    return comparison.folder / "teacher" / "teacher"


def finished_teacher(comparison: Comparison) -> str:
    """Return the backbone file of a comparison's own teacher, if it is trained; else ""."""
    folder, file = RunFolder(teacher_folder(comparison)), backbone_file(comparison, TEACHER, TEACHER_SEED)
    if comparison.data_root and not comparison.data_root.exists():
        return ""
    if not (makes_teacher(comparison) and folder.done and Path(file).is_file()):
        return ""
    # torch takes seconds to import
    from nst_det.distillation.dataloader import read_data
    from nst_det.models import resolve

    config = run_config(comparison, next(run for run in make_plan(comparison) if run.kind == TEACHER))
    weights = expand_path(config.TEACHER.WEIGHTS, "TEACHER.WEIGHTS")
    begins = sha256_of_file(resolve(weights)) if weights else ""
    claim = teacher_claim(config, read_data(config, whole=True).fingerprint(), begins, to_train=True)
    return "" if differing(folder.config(), claim) else file


def detector_folder(comparison: Comparison, row: str, seed: int) -> Path:
    return comparison.folder / "detect" / f"seed{seed}" / row


def teacher_detector_name(comparison: Comparison) -> str:
    """Return the run of the detector that rows with ``@det`` learn from; "" where that is the user's own, or none."""
    given = not comparison.detect or comparison.detect.TEACHER.CONFIG_FILE
    return "" if given else f"detect/seed{TEACHER_SEED}/{TEACHER}"


def teacher_detector_settings(comparison: Comparison) -> dict[str, str]:
    """Return the keys by which a detector's config names its teacher, where that is trained here."""
    name, folder = teacher_detector_name(comparison), comparison.folder
    config, weights = folder / "configs" / f"{name}.yaml", folder / name / WEIGHTS_FILE
    return {"TEACHER.CONFIG_FILE": str(config), "TEACHER.WEIGHTS": str(weights)} if name else {}


def _data_run(comparison: Comparison) -> Run:
    root, workers = comparison.data_root, comparison.threads
    assert root is not None
    # the images don't depend on the number of workers
    options = ["--output", root, "--workers", workers]
    options += [word for name, value in comparison.generate.items() for word in (f"--{name.replace('_', '-')}", value)]
    return Run("data", DATA, (), (root / SETTINGS_FILE,), {}, tuple(map(str, options)), threads=workers)


def _teacher_run(comparison: Comparison, needs: tuple[str, ...]) -> Run:
    folder, threads = teacher_folder(comparison), comparison.threads
    settings = {**_distill_settings(comparison), "OUTPUT_DIR": str(folder.parent), "METHODS": []}
    return Run("teacher", TEACHER, needs, (folder / "result.json",), settings, threads=threads, wants_gpu=True)


def _students_run(comparison: Comparison, seed: int, needs: tuple[str, ...]) -> Run:
    name = f"distill/seed{seed}"
    tuned = {word: dict(comparison.tuned[word].settings) for word in comparison.students if word in comparison.tuned}
    settings = {
        **_distill_settings(comparison),
        "OUTPUT_DIR": str(comparison.folder / name),
        "SEED": seed,
        "TEACHER.WEIGHTS": backbone_file(comparison, TEACHER, seed),
    }
    options = ("TRANSFER.BY_METHOD", repr(tuned)) if tuned else ()
    threads = comparison.threads
    run = Run(name, STUDENTS, needs, (), settings, options, threads=threads, seed=seed, wants_gpu=True)
    return with_students(run, comparison, comparison.students)


def with_students(run: Run, comparison: Comparison, methods: Sequence[str]) -> Run:
    """Return a run of stage one with the students of these methods alone."""
    students = comparison.folder / run.name / "students"
    results = tuple(students / method / "result.json" for method in methods)
    return replace(run, settings={**run.settings, "METHODS": list(methods)}, results=results)


def _distill_settings(comparison: Comparison) -> dict[str, Any]:
    return {
        "NAME": comparison.name,
        "REGISTRY": str(comparison.folder / "backbones"),
        **generated_settings(DISTILL, comparison.distill, comparison.data_root),
    }


def _detector_run(comparison: Comparison, row: str, seed: int, data: tuple[str, ...], teacher: tuple[str, ...]) -> Run:
    folder = detector_folder(comparison, row, seed)
    options = comparison.row_opts.get(row, ())
    settings: dict[str, Any] = {
        "OUTPUT_DIR": str(folder),
        "SEED": seed,
        "ENGINE": comparison.engine,
        # published weights are among the row's options
        **({} if row in PUBLISHED_STARTS else {"MODEL.WEIGHTS": backbone_file(comparison, row, seed)}),
        **generated_settings(DETECT, comparison.detect, comparison.data_root),
    }
    needs = data if row in (SCRATCH, *PUBLISHED_STARTS) else teacher if row == TEACHER else (f"distill/seed{seed}",)
    if row == TEACHER:
        settings |= _teacher_network(comparison)
    elif row in comparison.methods and comparison.methods[row].detector.names:
        found = comparison.tuned[row].settings if row in comparison.tuned else {}
        settings["METHOD"] = comparison.methods[row].detector.word
        if not comparison.detect.TRANSFER.LEVELS and "LEVELS" not in found:
            # the levels that boxes are pooled from
            settings["TRANSFER.LEVELS"] = list(comparison.detect.MODEL.ROI_HEADS.IN_FEATURES)
        options += tuple(word for key, value in found.items() for word in (f"TRANSFER.{key}", repr(value)))
        settings |= teacher_detector_settings(comparison)
        needs = tuple(name for name in (*needs, teacher_detector_name(comparison)) if name)
    return Run(
        name=f"detect/seed{seed}/{row}",
        kind=DETECTOR,
        needs=needs,
        results=(folder / "result.json",),
        settings=settings,
        options=options,
        row=row,
        seed=seed,
        wants_gpu=merge_stage(comparison.detect, options, f"row {row}").MODEL.DEVICE != "cpu",
    )
