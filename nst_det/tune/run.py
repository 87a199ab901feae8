"""One round of a search: a setting of each method, trained by the runs that a comparison would start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from nst_det.comparison.config import Comparison, Tuned, merge_stage, parse_row
from nst_det.comparison.display import ProgressDisplay
from nst_det.comparison.launch_local import Command, LocalLauncher, this_machine
from nst_det.comparison.pipeline import check_taught, run_config
from nst_det.comparison.plan import (
    DATA,
    DETECTOR,
    STUDENTS,
    Run,
    backbone_name,
    check_order,
    detector_folder,
    make_plan,
    student_folder,
    teacher_detector_name,
)
from nst_det.comparison.stages import check_data_folders, check_transfer, total_steps
from nst_det.engine.io import read_json, write_text
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.tune.config import MAP, Tuning
from nst_det.tune.search import Best, require_optuna, search

TUNED_FILE = "tuned.yaml"


class Rounds:
    """Trains and judges settings.

    What all trials share (generated data, the teacher, the teacher detector, and the backbones that rows with terms of
    stage two start from) is made once, in the folder of the search; trial k writes to ``trials/00k``.

    Args:
        tuning: the search.
        jobs: runs side by side; 0 takes the comparison's JOBS.
        command: gives the command line of a run, in place of this package's own.
    """

    def __init__(self, tuning: Tuning, jobs: int = 0, command: Command | None = None) -> None:
        self.tuning, self.base, self.command = tuning, tuning.base, command
        self.machine = this_machine(jobs or self.base.jobs)

    def check(self) -> None:
        """Find what would stop a trial before the first run is started.

        Raises:
            UserError: folders, levels, terms or a stage's values can't be used.
        """
        base = self.base
        if not base.generate:
            check_data_folders(base.distill, base.detect, base.name)
        runs = make_plan(base)
        configs = {run.name: run_config(base, run) for run in runs if run.kind != DATA}
        check_taught(base, runs, configs)
        for word, space in self.tuning.spaces.items():
            # every level and option once; weights can't be wrong
            for name, values in (space.choices or {"": ("",)}).items():
                for value in values:
                    self._check(word, space.settings({**space.default, **({name: value} if name else {})}))

    def _check(self, word: str, settings: dict[str, Any]) -> None:
        trial = replace(self.base, tuned={word: Tuned(settings)}, methods=("ce", word) if word != "ce" else ("ce",))
        runs = make_plan(trial)
        if parse_row(word).detector.names:
            check_taught(trial, runs, {run.name: run_config(trial, run) for run in runs if run.kind != DATA})
        else:
            students = next(run for run in runs if run.kind == STUDENTS)
            check_transfer(merge_stage(trial.distill, students.options, word), trial.students, trial.name)

    def prepare(self) -> None:
        """Make what all trials share."""
        taught = [word for word in self.tuning.spaces if parse_row(word).detector.names]
        base = replace(self.base, methods=tuple(dict.fromkeys(parse_row(word).backbone.word for word in taught)))
        runs = [run for run in make_plan(replace(base, methods=(*base.methods, *taught))) if run.kind != DETECTOR]
        if not taught:
            runs = [run for run in runs if run.kind != STUDENTS]
        self._do(base, [_only(run, base, base.methods) for run in runs])

    def __call__(self, number: int, settings: Mapping[str, dict[str, Any]]) -> dict[str, dict[int, float]]:
        """Train a setting of each of some methods and judge it on the validation split.

        Args:
            number: of the trial.
            settings: by method, keys of its TRANSFER node.

        Returns:
            By method and seed: top-1 of the student or 11-point mAP of the detector, 0..1.
        """
        base, words = self.base, list(settings)
        plain = [word for word in words if not parse_row(word).detector.names]
        trial = replace(
            base,
            folder=base.folder / "trials" / f"{number:03d}",
            methods=tuple(words),
            tuned={word: Tuned(values) for word, values in settings.items()},
            distill=_given(base.distill, "TEACHER.WEIGHTS", self._teacher()),
            detect=self._taught(),
        )
        runs = []
        for run in make_plan(trial):
            if run.kind == STUDENTS and plain:
                runs.append(_only(run, trial, plain))
            elif run.kind == DETECTOR and run.row in words and self.tuning.objective_of(run.row) == MAP:
                runs.append(self._detector(run, plain))
        # what all trials share is there already
        here = {run.name for run in runs}
        self._do(trial, [replace(run, needs=tuple(name for name in run.needs if name in here)) for run in runs])
        return {word: {seed: self._value(trial, word, seed) for seed in trial.seeds} for word in words}

    def _value(self, trial: Comparison, word: str, seed: int) -> float:
        by_map = self.tuning.objective_of(word) == MAP
        folder = detector_folder(trial, word, seed) if by_map else student_folder(trial, word, seed)
        result = read_json(folder / "result.json")
        value = result.get("validation", {}).get("map") if by_map else result.get("top1")
        if not isinstance(value, int | float):
            raise UserError(f"{folder / 'result.json'}: no value on the validation split; remove it to run this again")
        return float(value)

    def _teacher(self) -> str:
        own = str(self.base.distill.TEACHER.WEIGHTS)
        return own or str(self.base.folder / "backbones" / f"{backbone_name(self.base, 'teacher', 0)}.safetensors")

    def _taught(self) -> Any:
        name = teacher_detector_name(self.base)
        if not name:
            return self.base.detect
        config = _given(
            self.base.detect, "TRANSFER.TEACHER.CONFIG_FILE", str(self.base.folder / "configs" / f"{name}.yaml")
        )
        return _given(config, "TRANSFER.TEACHER.WEIGHTS", str(self.base.folder / name / "model.safetensors"))

    def _detector(self, run: Run, plain: Sequence[str]) -> Run:
        """A detector of a trial: rows with terms of stage two start from a backbone that all trials share."""
        assert run.row is not None
        assert run.seed is not None
        if run.row in plain:
            return run
        file = self.base.folder / "backbones" / f"{backbone_name(self.base, run.row, run.seed)}.safetensors"
        return replace(run, settings={**run.settings, "MODEL.WEIGHTS": str(file)})

    def _do(self, comparison: Comparison, runs: Sequence[Run]) -> None:
        check_order(runs)
        configs = {run.name: run_config(comparison, run) for run in runs if run.kind != DATA}
        for run in runs:
            if run.name in configs:
                write_text(run.config_path(comparison.folder), configs[run.name].dump())
        steps = {run.kind: total_steps(run.kind, configs[run.name]) for run in runs if run.name in configs}
        with ProgressDisplay(runs, steps, lambda run: self.machine.weight(run) / self.machine.room(run)) as view:
            LocalLauncher(runs, comparison.folder, self.machine, view, self.command).run_all()


def _only(run: Run, comparison: Comparison, methods: Sequence[str]) -> Run:
    """A run of stage one with these methods alone."""
    if run.kind != STUDENTS:
        return run
    assert run.seed is not None
    folders = tuple(student_folder(comparison, method, run.seed) for method in methods)
    results: tuple[Path, ...] = tuple(folder / "result.json" for folder in folders)
    settings = {**run.settings, "METHODS": list(methods)}
    return replace(run, settings=settings, folders=folders, results=results)


def _given(config: Any, key: str, value: str) -> Any:
    return merge_stage(config, [key, value], key)


def tune(tuning: Tuning, jobs: int = 0, command: Command | None = None) -> tuple[dict[str, Best], Path]:
    """Do the trials that are not done yet, and write ``tuned.yaml``.

    Args:
        tuning: from :func:`~nst_det.tune.config.load_tuning`.
        jobs: runs side by side; 0 takes the comparison's JOBS.
        command: gives the command line of a run, in place of this package's own.

    Returns:
        What was found by method, and the file.

    Raises:
        UserError: Optuna is not installed, or an input can't be used.
        RunFailed: a run ended with an error; the same call goes on from what is done.
        Stopped: a signal asked to stop.
    """
    require_optuna()
    rounds = Rounds(tuning, jobs, command)
    rounds.check()
    with RunFolder(tuning.folder).opened(tuning.claim):
        rounds.prepare()
        found = search(tuning.folder, tuning.spaces, tuning.trials, tuning.seed, rounds)
        path = tuning.folder / TUNED_FILE
        write_text(path, tuned_file(tuning, found))
    return found, path


def tuned_file(tuning: Tuning, found: dict[str, Best]) -> str:
    """The content of ``tuned.yaml``: the budget that each method had, and what was found for it."""
    methods: dict[str, Any] = {
        word: {
            "settings": best.settings,
            "trials": best.trials,
            "judged by": tuning.objective_of(word),
            "value": round(best.value, 6),
            "value of the configured setting": round(best.default, 6),
            "by seed": {seed: round(value, 6) for seed, value in best.by_seed.items()},
        }
        for word, best in found.items()
    }
    head = "# Written by nst-det tune; nst-det compare reads it: TUNED tuned.yaml.\n"
    return head + yaml.safe_dump({"budget": tuning.budget, "methods": methods}, sort_keys=False)


def tuning_table(tuning: Tuning, found: dict[str, Best]) -> Table:
    """What was found, a row a method."""
    seeds = len(tuning.base.seeds)
    title = f"{tuning.trials} trials a method, {seeds} seed{'s' if seeds > 1 else ''}, on {tuning.budget['validation']}"
    table = Table(title=title)
    for name in ("method", "judged by", "configured", "found", "setting"):
        table.add_column(name, justify="right" if name in ("configured", "found") else "left")
    for word, best in found.items():
        weights = [f"{name} {weight:.3g}" for name, weight in best.settings["WEIGHTS"].items()]
        levels = best.settings.get("LEVELS")
        options = [
            f"{term}.{key} {value}"
            for term, own in best.settings.get("OPTIONS", {}).items()
            for key, value in own.items()
        ]
        setting = ", ".join([*weights, *([" ".join(levels)] if levels else []), *options])
        table.add_row(word, tuning.objective_of(word), f"{best.default:.3f}", f"{best.value:.3f}", setting)
    return table
