"""How far a comparison is: a live view on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nst_det.comparison.plan import Run
from nst_det.engine.format import duration
from nst_det.engine.metrics import loss_note
from nst_det.engine.progress import PLAIN_SECONDS, console, is_live, progress_file, told

log = logging.getLogger(__name__)
REFRESH_SECONDS = 1.0
TAIL_BYTES = 8192
NOTE_TERMS = 4


def last_metrics(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of a ``metrics.jsonl``, without reading the rest; None where there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        # the first one may be cut off, and a killed run may leave half a line
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row
    return None


def steps_done(run: Run) -> tuple[int, dict[str, Any]]:
    """Return the steps that a run has done, and its last metrics.

    Of several folders (the students of stage one) the one that is furthest behind counts; done ones don't.
    """
    rows = [last_metrics(folder / "metrics.jsonl") or {"step": -1} for folder in run.folders]
    behind = [row for row, result in zip(rows, run.results) if not result.exists()]
    row = min(behind or rows, key=lambda row: row["step"])
    return row["step"] + 1, {key: value for key, value in row.items() if key != "step"}


class ProgressDisplay:
    """Shows runs as they start and end, within ``with ProgressDisplay(...) as display``.

    ``total_steps`` are those of a run by its kind; ``share`` is the part of the machine that a run takes, 0..1;
    ``folder`` is the comparison's, with the logs of the runs.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        total_steps: Mapping[str, int],
        share: Callable[[Run], float] = lambda run: 1.0,
        folder: Path = Path(),
    ) -> None:
        self._folder = folder
        self._runs, self._total, self._share = list(runs), dict(total_steps), share
        self._done = {run.name for run in runs if run.done}
        # of the running ones: when this call started it, and the steps it had then
        self._begin: dict[str, tuple[float, int]] = {}
        # by kind: what whole runs took
        self._seconds: dict[str, list[float]] = {}
        self._last = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._live = is_live(console)
        self._bar = Progress(*columns, console=console, refresh_per_second=4, disable=not self._live)
        self._tasks = {"": self._bar.add_task("[bold]runs", total=len(runs), completed=len(self._done), note="")}

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        if self._done and not self._live:
            log.info("%d of %d runs are done already", len(self._done), len(self._runs))
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for run in self._runs:
            self._file(run).unlink(missing_ok=True)

    def _file(self, run: Run) -> Path:
        return progress_file(run.log_path(self._folder))

    def started(self, run: Run) -> None:
        self._file(run).unlink(missing_ok=True)
        steps, _ = steps_done(run)
        self._begin[run.name] = (time.monotonic(), steps)
        total = self._total.get(run.kind) or 1
        note = f"resumed at step {steps}" if steps else "starts"
        self._tasks[run.name] = self._bar.add_task(run.name, total=total, completed=steps, note=note)
        if steps or not self._live:
            log.info("%s: %s", run.name, note)

    def finished(self, run: Run) -> None:
        begin, first = self._begin.pop(run.name)
        seconds, total = time.monotonic() - begin, self._total.get(run.kind, 0)
        self._done.add(run.name)
        if first == 0:
            self._seconds.setdefault(run.kind, []).append(seconds)
        elif first < total:
            self._seconds.setdefault(run.kind, []).append(seconds * total / (total - first))
        self._bar.remove_task(self._tasks.pop(run.name))
        self._bar.update(self._tasks[""], completed=len(self._done))
        log.info("%s: done in %.0f s (%d of %d runs)", run.name, seconds, len(self._done), len(self._runs))

    def update(self, running: Sequence[Run]) -> None:
        """Show how far the running ones are, where the last time is long enough ago."""
        now = time.monotonic()
        if now - self._last < (REFRESH_SECONDS if self._live else PLAIN_SECONDS):
            return
        first, self._last = self._last == 0.0, now
        states = [(run, *self._state(run)) for run in running]
        left = self.seconds_left({run.name: steps for run, steps, _ in states})
        eta = "" if left is None else f"ETA {duration(left)}"
        self._bar.update(self._tasks[""], note=eta)
        for run, steps, note in states:
            self._bar.update(self._tasks[run.name], completed=steps, note=note)
        if running and not first and not self._live:
            parts = []
            for run, steps, note in states:
                parts.append(f"{run.name} {steps}/{self._total.get(run.kind) or '?'}{f' ({note})' if note else ''}")
            log.info("%d/%d runs done; %s  %s", len(self._done), len(self._runs), ", ".join(parts), eta)

    def _state(self, run: Run) -> tuple[int, str]:
        """Return the steps that a run has done; and what it waits for, or its losses."""
        steps, metrics = steps_done(run)
        # metrics are written now and then
        done, waits = told(run.log_path(self._folder))
        return max(steps, done), waits or loss_note(metrics, NOTE_TERMS)

    def seconds_left(self, steps: Mapping[str, int]) -> float | None:
        """Return the seconds until all is done, given the steps that each running run has done.

        Runs of a kind take the same time; None while a kind has not been seen yet.
        """
        todo = [run for run in self._runs if run.name not in self._done]
        guesses = {kind: sum(values) / len(values) for kind, values in self._seconds.items()}
        shares: dict[str, float] = {}
        for run in todo:
            done, total = steps.get(run.name, 0), self._total.get(run.kind, 0)
            shares[run.name] = max(0.0, 1 - done / total) if total else 1.0
            begin, first = self._begin.get(run.name, (0.0, 0))
            if total and done > first:
                guesses.setdefault(run.kind, (time.monotonic() - begin) * total / (done - first))
        if not all(run.kind in guesses for run in todo):
            return None
        return sum(shares[run.name] * guesses[run.kind] * self._share(run) for run in todo)
