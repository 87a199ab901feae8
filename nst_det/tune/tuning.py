"""A search from its config to the file that a comparison reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from nst_det.compare.run import Command
from nst_det.runtime.files import write_text
from nst_det.runtime.run import RunFolder
from nst_det.tune.config import Tuning
from nst_det.tune.rounds import Rounds
from nst_det.tune.search import Best, require_optuna, search

TUNED_FILE = "tuned.yaml"


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
