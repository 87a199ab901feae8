"""Progress that fits where it is shown: a live bar on a terminal, a plain line now and then elsewhere."""

import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
console = Console(stderr=True)
PLAIN_SECONDS = 15.0
# where a process of a comparison says how far it is, and how often
VARIABLE, TELL_SECONDS = "NST_DET_PROGRESS", 0.5


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

    def __init__(self, name: str, total: int | None, bars: Progress | None, training: bool) -> None:
        self.name, self.total, self.bars, self.training = name, total, bars, training
        self.done, self.waits = 0, ""
        self._task = bars.add_task(name, total=total, note="") if bars else None
        self._began = self._last = time.monotonic()
        self._skipped = 0

    @property
    def note(self) -> str:
        """What is waited for: "" in training where it is the next step alone."""
        own = "" if self.training else self.name if self.total is None else f"{self.name} {self.done}/{self.total}"
        return self.waits or own

    def start_at(self, done: int) -> None:
        """Count ``done`` steps of an earlier call, which don't count for the ETA."""
        self.done = self._skipped = done
        if self.bars is not None and self._task is not None:
            self.bars.reset(self._task, total=self.total, completed=done)

    def wait(self, what: str) -> None:
        """Show what the next step waits for; the step ends it."""
        self.waits = what
        if self.bars is not None and self._task is not None:
            self.bars.update(self._task, note=what)
        _tell()

    def step(self, values: Mapping[str, float] | None = None, more: Callable[[], str] | None = None) -> None:
        """Count a step; ``values`` are shown with a bar, and in a plain line unless there is ``more`` for it."""
        self.done, self.waits = self.done + 1, ""
        note = "  ".join(f"{key} {value:.4g}" for key, value in (values or {}).items())
        now = time.monotonic()
        if self.bars is not None and self._task is not None:
            self.bars.update(self._task, advance=1, note=note)
        elif self.total and (now - self._last >= PLAIN_SECONDS or self.done == self.total):
            self._last = now
            rate = (now - self._began) / max(self.done - self._skipped, 1)
            note = more() if more else note
            left = rate * (self.total - self.done)
            log.info("%s %d/%d  %.3g s/it  ETA %.0f s  %s", self.name, self.done, self.total, rate, left, note)
        _tell(TELL_SECONDS)


# those that count now, the outermost first; and when the last line was written for another process
_meters: list[Meter] = []
_told = 0.0


@contextmanager
def progress(name: str, total: int | None, training: bool = False) -> Iterator[Meter]:
    """Give a meter of ``total`` steps (None: unknown), of ``training`` or other ones, below those shown already."""
    bars = _meters[-1].bars if _meters else None
    with ExitStack() as shown:
        if not _meters and is_live(console):
            text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), note)
            bars = shown.enter_context(Progress(*columns, console=console))
        meter = Meter(name, total, bars, training)
        _meters.append(meter)
        _tell()
        try:
            yield meter
        finally:
            _meters.remove(meter)
            if _meters and bars is not None and meter._task is not None:
                bars.remove_task(meter._task)
            _tell()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for within the block, at the bar that moves, or by one that only pulses."""
    if not _meters:
        with progress(what, None):
            yield
        return
    meter = _meters[-1]
    before = meter.waits
    meter.wait(what)
    try:
        yield
    finally:
        meter.wait(before)


def _tell(seconds: float = 0.0) -> None:
    """Write where this process is for the comparison that it is part of, unless it did so ``seconds`` ago."""
    global _told
    file, now = os.environ.get(VARIABLE), time.monotonic()
    if not file or is_silent() or now - _told < seconds:
        return
    _told = now
    steps = _meters[0].done if _meters and _meters[0].training else 0
    note = _meters[-1].note if _meters else ""
    # only shown: another process may read half of it, which it doesn't show
    with suppress(OSError):
        Path(file).write_text(json.dumps({"steps": steps, "note": note}), encoding="utf-8")


def progress_file(log: Path) -> Path:
    """Return where the process that writes this log says how far it is."""
    return log.with_suffix(".progress")


def told(log: Path) -> tuple[int, str]:
    """Return the training steps that the process with this log has done, and what it waits for, if it says so."""
    try:
        found = json.loads(progress_file(log).read_text(encoding="utf-8"))
        return int(found["steps"]), str(found["note"])
    except (OSError, ValueError):
        return 0, ""
