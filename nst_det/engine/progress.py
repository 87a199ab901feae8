"""Progress that fits where it is shown: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
console = Console(stderr=True)
PLAIN_SECONDS = 15.0


def is_silent() -> bool:
    """Return whether this is one of several processes of torchrun's, and not rank 0."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def is_live(console: Console) -> bool:
    """Return whether bars can move: on a terminal, or in a notebook that has ipywidgets."""
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return not is_silent() and (console.is_terminal or in_notebook)


def start_logging(level: int = logging.INFO) -> None:
    """Log to standard error: through rich on a terminal, as plain lines elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.ERROR if is_silent() else level, handlers=[handler], force=True)


class Meter:
    """Counts the steps of one task and shows them; made by :func:`progress`."""

    def __init__(self, name: str, total: int, bar: Progress | None) -> None:
        self._name, self._total, self._bar = name, total, bar
        self._task = bar.add_task(name, total=total, note="") if bar else None
        self._began = self._last = time.monotonic()
        self._done = self._skipped = 0

    def start_at(self, done: int) -> None:
        """Count ``done`` steps of an earlier call, which don't count for the ETA."""
        self._done = self._skipped = done
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=self._total, completed=done)

    def step(self, values: Mapping[str, float] | None = None, more: Callable[[], str] | None = None) -> None:
        """Count a step; ``values`` are shown with a bar, and in a plain line unless there is ``more`` for it."""
        self._done += 1
        note = "  ".join(f"{key} {value:.4g}" for key, value in (values or {}).items())
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif now - self._last >= PLAIN_SECONDS or self._done == self._total:
            self._last = now
            rate = (now - self._began) / max(self._done - self._skipped, 1)
            left = rate * (self._total - self._done)
            note = more() if more else note
            log.info("%s %d/%d  %.3g s/it  ETA %.0f s  %s", self._name, self._done, self._total, rate, left, note)


@contextmanager
def progress(name: str, total: int) -> Iterator[Meter]:
    """Give a meter of ``total`` steps."""
    if not is_live(console):
        yield Meter(name, total, None)
        return
    text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, console=console) as bar:
        yield Meter(name, total, bar)
