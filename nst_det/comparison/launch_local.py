"""Carry a plan out: every run a process of its own, several side by side, none left behind, none done twice."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from nst_det.comparison.display import ProgressDisplay
from nst_det.comparison.plan import Run
from nst_det.engine.device import core_count
from nst_det.engine.signals import EXIT_RESUME, Preempted

log = logging.getLogger(__name__)
POLL_SECONDS = 0.1
# a run saves after the step that it is in; schedulers wait 30 seconds before they kill
STOP_SECONDS = 25.0
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
# what numerical libraries read; set before a process starts, because they look only once
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Command = Callable[[Run, Path], list[str]]


class RunFailed(Exception):
    """A run ended with an error; ``code`` is what the comparison should exit with.

    2: its input can't be used; 75: somebody stopped the run, it goes on where it was; 1: all else.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Preempted):
    """The comparison was asked by a signal to stop; its runs have saved what they did."""


@dataclass(frozen=True)
class Machine:
    """What runs may use: CPU cores, and GPUs (as CUDA_VISIBLE_DEVICES names them) with room for ``gpu_jobs`` runs.

    Attributes:
        jobs: one-thread runs side by side on the CPU; where there are GPUs, the cores.
        gpus: empty where there is none; then all runs are the CPU's.
        gpu_jobs: runs side by side on all GPUs together, which share the cores.
    """

    jobs: int
    gpus: tuple[str, ...] = ()
    gpu_jobs: int = 0

    def on_gpu(self, run: Run) -> bool:
        """Whether a run gets a GPU."""
        return run.wants_gpu and bool(self.gpus)

    def room(self, run: Run) -> int:
        """The room on the device of a run."""
        return self.gpu_jobs if self.on_gpu(run) else self.jobs

    def weight(self, run: Run) -> int:
        """How much of that room a run takes: on a CPU one for each of its threads."""
        return 1 if self.on_gpu(run) else max(1, min(run.threads, self.jobs))

    def environment(self, run: Run, gpu: str = "") -> dict[str, str]:
        """What a run's process gets for its environment; ``gpu`` is its GPU, where it has one."""
        return environment_of(max(1, self.jobs // self.gpu_jobs) if gpu else run.threads, gpu)


def this_machine(jobs: int = 0) -> Machine:
    """This machine; ``jobs`` runs side by side, on its GPUs if there are some; 0 takes one a GPU, or one a core."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    gpus = tuple(named[:count]) if named else tuple(str(index) for index in range(count))
    return Machine(core_count(), gpus, jobs or len(gpus)) if gpus else Machine(jobs or core_count())


def stage_command(run: Run, folder: Path) -> list[str]:
    """The command line of a run of the comparison in ``folder``."""
    return [sys.executable, "-m", "nst_det.comparison.worker", str(os.getpid()), *run.command(folder)]


@dataclass
class _Process:
    run: Run
    popen: subprocess.Popen[bytes]
    log: Path
    offset: int
    gpu: str
    file: IO[bytes] = field(repr=False)


class LocalLauncher:
    """Starts the runs of a plan as soon as what they need is done and the machine has room.

    Runs start in the order of the plan: one that waits for room is not overtaken, so that the long runs which
    all others wait for never starve.  How many run at once changes when a run happens, never what it computes.

    Args:
        runs: the plan.
        folder: of the comparison; holds ``configs/`` (written before) and ``logs/``.
        machine: what may be used.
        view: is told what starts, runs and ends.
        command: gives the command line of a run.
    """

    def __init__(
        self, runs: Sequence[Run], folder: Path, machine: Machine, view: ProgressDisplay, command: Command | None = None
    ) -> None:
        self._runs, self._folder, self._machine, self._view = list(runs), folder, machine, view
        self._command = command or stage_command
        self._processes: list[_Process] = []

    def run_all(self) -> None:
        """Do all runs that are not done.

        Raises:
            RunFailed: one of them ended with an error; the others were stopped.
            Stopped: SIGTERM or SIGINT came; all were stopped.
        """
        done = {run.name for run in self._runs if run.done}
        waiting = [run for run in self._runs if run.name not in done]
        with signals_raise():
            try:
                while waiting or self._processes:
                    self._start_what_fits(waiting, done)
                    done |= self._collect()
                    self._view.update([process.run for process in self._processes])
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()

    def _start_what_fits(self, waiting: list[Run], done: set[str]) -> None:
        machine = self._machine
        used = {True: 0, False: 0}
        for process in self._processes:
            used[machine.on_gpu(process.run)] += machine.weight(process.run)
        for run in [run for run in waiting if done.issuperset(run.needs)]:
            device = machine.on_gpu(run)
            # also where it does not fit, so that no later run slips in before it
            used[device] += machine.weight(run)
            if used[device] <= machine.room(run):
                waiting.remove(run)
                self._start(run)

    def _start(self, run: Run) -> None:
        path = self._folder / "logs" / f"{run.name}.log"
        gpu = self._free_gpu() if self._machine.on_gpu(run) else ""
        environment = self._machine.environment(run, gpu)
        popen, file, offset = start_process(self._command(run, self._folder), path, environment)
        self._processes.append(_Process(run, popen, path, offset, gpu, file))
        self._view.started(run)

    def _free_gpu(self) -> str:
        """The GPU with the fewest runs on it."""
        busy = [process.gpu for process in self._processes]
        return min(self._machine.gpus, key=busy.count)

    def _collect(self) -> set[str]:
        """Take out the processes that ended; the names of their runs."""
        ended = [process for process in self._processes if process.popen.poll() is not None]
        for process in ended:
            self._processes.remove(process)
            process.file.close()
            if process.popen.returncode != 0:
                raise _failure(process)
            if not process.run.done:
                missing = next(path for path in process.run.results if not path.exists())
                raise RunFailed(
                    f"run {process.run.name} ended without writing {missing}; see {process.log}", EXIT_FAILED
                )
            self._view.finished(process.run)
        return {process.run.name for process in ended}

    def _stop_all(self) -> None:
        """Ask all processes to end, and kill those that don't within :data:`STOP_SECONDS`."""
        for process in self._processes:
            _signal_group(process.popen, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("run %s did not stop when asked; it is killed", process.run.name)
                _signal_group(process.popen, signal.SIGKILL)
                process.popen.wait()
            process.file.close()
        self._processes.clear()


def start_process(
    command: list[str], log: Path, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], IO[bytes], int]:
    """A command that appends to ``log``: its process, the log, to be closed when it has ended, and where it begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = open(log, "ab")  # noqa: SIM115 (closed when the process is collected)
    offset = file.tell()
    # a session of its own: Ctrl-C reaches the comparison alone, which then stops its runs in order
    popen = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return popen, file, offset


def said_since(log: Path, offset: int) -> str:
    """What a log holds from ``offset`` bytes on."""
    with open(log, "rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", "replace")


def environment_of(threads: int, gpu: str = "") -> dict[str, str]:
    """This process's environment with the threads of a run and its GPU; without one it sees none."""
    extra = {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": gpu}
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), **extra}


def _failure(process: _Process) -> RunFailed:
    text = said_since(process.log, process.offset)
    return failure_of(process.run, process.popen.returncode, text, process.log)


def failure_of(run: Run, code: int, text: str, log: Path) -> RunFailed:
    """The error of a run that ended with an exit code other than 0.

    Args:
        run: of the plan.
        code: its exit code; below 0 for a signal.
        text: what it said.
        log: where all of that stands.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("nst-det: ") for line in lines if line.startswith("nst-det: ")]
    reason = said[-1] if said else lines[-1] if lines else "it said nothing"
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    message = f"run {run.name} failed: {reason} (log: {log})"
    return RunFailed(message, code if code in (EXIT_BAD_INPUT, EXIT_RESUME) else EXIT_FAILED)


def _signal_group(popen: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signum)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise :class:`Stopped`, once; later ones are ignored while all stops."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
