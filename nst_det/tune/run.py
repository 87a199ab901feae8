"""The search: for every method the same number of trials, each trained by the runs that a comparison would start."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Column, Table

from nst_det.comparison.config import Comparison, Tuned
from nst_det.comparison.launch_local import Command, LocalLauncher, this_machine
from nst_det.comparison.pipeline import checked_configs, launch, run_configs
from nst_det.comparison.plan import (
    DETECTOR,
    STUDENTS,
    Run,
    backbone_file,
    backbone_folder,
    detector_folder,
    make_plan,
    teacher_detector_settings,
    with_students,
)
from nst_det.comparison.result import BASELINE, PUBLISHED_STARTS, TEACHER
from nst_det.comparison.stages import check_data_folders, merge_stage
from nst_det.engine.io import read_json, write_text
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import derive_seed
from nst_det.errors import RunFailed, UserError
from nst_det.tune.config import MAP, TOP1, Space, Tuning

if TYPE_CHECKING:
    from optuna import Study

log = logging.getLogger(__name__)
TUNED_FILE, STORAGE_FILE = "tuned.yaml", "optuna.db"
TRIALS_FOLDER = "trials"
# what a study keeps beside its trials: the values of each by seed, and the Optuna that it was begun with
BY_SEED, OPTUNA = "by seed", "optuna"
# (trial's number, method -> settings) to (method -> seed -> value, larger is better)
Evaluate = Callable[[int, Mapping[str, dict[str, Any]]], Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Best:
    """What was found for a method."""

    settings: dict[str, Any]  # keys of the TRANSFER node
    value: float  # mean over the seeds of what the method is judged by, 0..1, larger is better
    default: float | None  # the same of the configured setting, the first trial; None where it was not finite
    trials: int  # settings tried
    by_seed: dict[str, float]  # value of each seed


def tune(tuning: Tuning, jobs: int = 0, command: Command | None = None) -> tuple[dict[str, Best], Path]:
    """Do the trials that are not done yet; return what was found by method, and the file ``tuned.yaml``.

    ``jobs`` and ``command`` are those of :func:`nst_det.comparison.pipeline.compare`.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("nst-det tune needs Optuna; install it with: pip install optuna") from error
    evaluator = Evaluator(tuning, jobs, command)
    evaluator.check()
    with RunFolder(tuning.folder).opened(tuning.claim, tuning.base.inputs()):
        evaluator.prepare()
        found = search(tuning.folder, tuning.spaces, tuning.trials, tuning.seed, evaluator)
        path = tuning.folder / TUNED_FILE
        write_text(path, tuned_file(tuning, found))
    return found, path


class Evaluator:
    """Trains and judges settings: what all trials share once, in the search's folder, trial k in ``trials/00k``."""

    def __init__(self, tuning: Tuning, jobs: int = 0, command: Command | None = None) -> None:
        self.tuning, self.base, self.command = tuning, tuning.base, command
        self.machine = this_machine(jobs or self.base.jobs)

    def check(self) -> None:
        """Find what would stop a trial before the first run is started."""
        if not self.base.generate:
            # the data are those of all trials
            check_data_folders(self.base.distill, self.base.detect, self.base.engine, self.base.name)
        for word, space in self.tuning.spaces.items():
            # every level and option once; weights can't be wrong
            for name, values in (space.choices or {"": ("",)}).items():
                for value in values:
                    settings = space.settings({**space.default, **({name: value} if name else {})})
                    methods = {one: self.base.methods[one] for one in (BASELINE, word) if one in self.base.methods}
                    trial = replace(self.base, tuned={word: Tuned(settings)}, methods=methods)
                    # rows that begin with published weights aren't among a trial's runs, and are slow to check
                    checked_configs(trial, [run for run in make_plan(trial) if run.row not in PUBLISHED_STARTS])

    def prepare(self) -> None:
        """Make generated data, teachers, and the backbones that rows with terms of stage two start from."""
        taught = {word: self.base.methods[word] for word in self.tuning.spaces if self.tuning.learns_in_stage_two(word)}
        shared = replace(self.base, methods=taught)
        left_out = (DETECTOR,) if taught else (DETECTOR, STUDENTS)
        self._do(shared, [run for run in make_plan(shared) if run.kind not in left_out])

    def __call__(self, number: int, settings: Mapping[str, dict[str, Any]]) -> dict[str, dict[int, float]]:
        """Train a setting (keys of TRANSFER) of each of some methods; return what they are judged by, by seed.

        It is NaN where a loss was not finite; the other methods' students, which train beside it, go on without it.
        """
        base = self.base
        given = [word for pair in teacher_detector_settings(base).items() for word in pair]
        trial = replace(
            base,
            folder=base.folder / TRIALS_FOLDER / f"{number:03d}",
            methods={word: base.methods[word] for word in settings},
            tuned={word: Tuned(values) for word, values in settings.items()},
            distill=merge_stage(base.distill, ["TEACHER.WEIGHTS", backbone_file(base, TEACHER, 0)], "tune"),
            detect=merge_stage(base.detect, given, "tune"),
        )
        words = self._finite(trial, settings)
        while words:
            left = replace(
                trial,
                methods={word: trial.methods[word] for word in words},
                tuned={word: trial.tuned[word] for word in words},
            )
            try:
                self._do(left, self._runs(left))
                break
            except RunFailed as error:
                if (still := self._finite(trial, words)) == words:
                    raise
                log.warning("%s", error)
                words = still
        return {
            word: {seed: self._value(trial, word, seed) if word in words else math.nan for seed in trial.seeds}
            for word in settings
        }

    def _finite(self, trial: Comparison, words: Iterable[str]) -> list[str]:
        """Return the methods of which no run of a trial has ended by a loss or gradient that was not finite."""

        def ended(word: str, seed: int) -> bool:
            # the student of a method with terms of stage two is that of another method here
            places = [] if self.tuning.learns_in_stage_two(word) else [backbone_folder(trial, word, seed)]
            places.append(detector_folder(trial, word, seed))
            return any(path and RunFolder(path).not_finite_path.exists() for path in places)

        return [word for word in words if not any(ended(word, seed) for seed in trial.seeds)]

    def _runs(self, trial: Comparison) -> list[Run]:
        in_stage_one = [word for word in trial.methods if not self.tuning.learns_in_stage_two(word)]
        runs = []
        for run in make_plan(trial):
            if run.kind == STUDENTS and in_stage_one:
                runs.append(with_students(run, trial, in_stage_one))
            elif (
                run.kind == DETECTOR
                and run.row
                and run.row in trial.methods
                and self.tuning.objective_of(run.row) == MAP
            ):
                if run.row not in in_stage_one:
                    # from a backbone that all trials share
                    weights = backbone_file(self.base, run.row, run.seed or 0)
                    run = replace(run, settings={**run.settings, "MODEL.WEIGHTS": weights})
                runs.append(run)
        return runs

    def _value(self, trial: Comparison, word: str, seed: int) -> float:
        by_map = self.tuning.objective_of(word) == MAP
        folder = detector_folder(trial, word, seed) if by_map else backbone_folder(trial, word, seed)
        assert folder is not None
        path = folder / "result.json"
        result = read_json(path)
        value = result.get("validation", {}).get("map") if by_map else result.get(result.get("measure", TOP1))
        if not isinstance(value, int | float):
            raise UserError(f"{path}: no value on the validation split; remove it to run this again")
        return float(value)

    def _do(self, comparison: Comparison, runs: Sequence[Run]) -> None:
        launcher = LocalLauncher(comparison.folder, self.machine, self.command)
        launch(runs, run_configs(comparison, runs), comparison.folder, self.machine, launcher)


def search(folder: Path, spaces: Mapping[str, Space], trials: int, seed: int, evaluate: Evaluate) -> dict[str, Best]:
    """Find each method's best setting on equal terms (of equal ones the earliest); resumes where it was stopped.

    All methods that have as many finished trials are evaluated together, since stage one trains them side by side.
    What a trial tries is in the storage from its start, so that one that was stopped is the same one again, whatever a
    newer Optuna would suggest.  A setting whose value isn't finite counts as 0, the worst; a method that has no other
    ends the search.
    """
    studies = _studies(folder / STORAGE_FILE, spaces)
    while True:
        counts = {word: len(_finished(study)) for word, study in studies.items()}
        number = min(counts.values())
        if number >= trials:
            break
        due = [word for word, count in counts.items() if count == number]
        asked = {
            word: _ask(studies[word], spaces[word], derive_seed(seed, "tune", word, number) % 2**32, trials)
            for word in due
        }
        settings = {word: spaces[word].settings(params) for word, (_, params) in asked.items()}
        log.info("trial %d of %d: %s", number + 1, trials, ", ".join(due))
        values = evaluate(number, settings)
        for word, (asked_number, _) in asked.items():
            mean = statistics.fmean(values[word].values())
            if math.isfinite(mean):
                by_seed = {str(key): value for key, value in values[word].items()}
                studies[word].set_user_attr(f"{BY_SEED} {asked_number}", by_seed)
            else:
                where = folder / TRIALS_FOLDER / f"{number:03d}"
                log.warning("%s: %s is not finite with %s and counts as 0", where, word, settings[word])
                # what is not finite Optuna would take as a trial that never was, and the search would not end
                mean = 0.0
            studies[word].tell(asked_number, mean)
    return {word: _best(study, spaces[word], trials, folder) for word, study in studies.items()}


def _studies(path: Path, spaces: Mapping[str, Space]) -> dict[str, Study]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        studies = {
            word: optuna.create_study(storage=storage, study_name=word, direction="maximize", load_if_exists=True)
            for word in spaces
        }
    except Exception as error:
        # SQLAlchemy and alembic each have errors of their own for a file that is no database
        reason, trials = str(error).splitlines()[0], path.parent / TRIALS_FOLDER
        raise UserError(f"{path}: can't be used ({reason}); remove it and {trials} to begin again") from error
    now = optuna.__version__
    for study in studies.values():
        if not study.get_trials(deepcopy=False):
            study.set_user_attr(OPTUNA, now)
    others = {study.user_attrs[OPTUNA] for study in studies.values()} - {now}
    if others:
        log.warning("%s: begun with Optuna %s, now %s, which may try other settings", path, ", ".join(others), now)
    return studies


def _ask(study: Study, space: Space, seed: int, trials: int) -> tuple[int, dict[str, Any]]:
    """Return the number and the values of a trial: those of one that was stopped, or new ones."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    # of a call that was stopped
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if set(left.params) == set(space.default):
            return left.number, left.params
        study.tell(left.number, state=TrialState.FAIL)
    if not _finished(study) and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(dict(space.default))
    # tree-structured Parzen estimator, after a third of the trials at random
    study.sampler = TPESampler(n_startup_trials=max(2, trials // 3), multivariate=True, seed=seed)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True) for name, (low, high) in space.weights.items()
    }
    distributions |= {name: CategoricalDistribution(values) for name, values in space.choices.items()}
    trial = study.ask(distributions)
    return trial.number, trial.params


def _finished(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _best(study: Study, space: Space, trials: int, folder: Path) -> Best:
    # a former call may have been given more
    finished = _finished(study)[:trials]
    finite = [trial for trial in finished if f"{BY_SEED} {trial.number}" in study.user_attrs]
    if not finite:
        raise UserError(
            f"{folder / TRIALS_FOLDER}: {study.study_name} is not finite with any of its {trials} settings; leave it "
            "out of METHODS, or begin in another --output with a smaller weight (TRANSFER.WEIGHTS), "
            "SOLVER.CLIP_GRADIENTS or a lower learning rate"
        )
    best = max(finite, key=lambda trial: (trial.value, -trial.number))
    return Best(
        settings=space.settings(best.params),
        value=float(best.value),
        default=float(finished[0].value) if finished[0] in finite else None,
        trials=len(finished),
        by_seed=dict(study.user_attrs[f"{BY_SEED} {best.number}"]),
    )


def tuned_file(tuning: Tuning, found: dict[str, Best]) -> str:
    """Return the content of ``tuned.yaml``: the budget that each method had, and what was found for it."""
    methods: dict[str, Any] = {
        word: {
            "settings": best.settings,
            "trials": best.trials,
            "judged by": tuning.objective_of(word),
            "value": round(best.value, 6),
            "value of the configured setting": None if best.default is None else round(best.default, 6),
            "by seed": {seed: round(value, 6) for seed, value in best.by_seed.items()},
        }
        for word, best in found.items()
    }
    head = "# Written by nst-det tune; nst-det compare reads it: TUNED tuned.yaml.\n"
    return head + yaml.safe_dump({"budget": tuning.budget, "methods": methods}, sort_keys=False)


def tuning_table(tuning: Tuning, found: dict[str, Best]) -> Table:
    """Return what was found, a row a method."""
    seeds = len(tuning.base.seeds)
    title = f"{tuning.trials} trials a method, {seeds} seed{'s' if seeds > 1 else ''}, on {tuning.budget['validation']}"
    values = (Column(name, justify="right") for name in ("configured", "found"))
    table = Table("method", "judged by", *values, "setting", title=title)
    for word, best in found.items():
        weights = [f"{name} {weight:.3g}" for name, weight in best.settings["WEIGHTS"].items()]
        levels = best.settings.get("LEVELS")
        options = [
            f"{term}.{key} {value}"
            for term, own in best.settings.get("OPTIONS", {}).items()
            for key, value in own.items()
        ]
        configured = "not finite" if best.default is None else f"{best.default:.3f}"
        setting = ", ".join([*weights, *([" ".join(levels)] if levels else []), *options])
        table.add_row(word, tuning.objective_of(word), configured, f"{best.value:.3f}", setting)
    return table
