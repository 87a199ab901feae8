"""Carry a plan out: every run a process of its own, several side by side, none left behind, none done twice."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fractions import Fraction
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Protocol

import torch

from nst_det.comparison.display import ProgressDisplay
from nst_det.comparison.plan import Run
from nst_det.engine.machine import core_count
from nst_det.engine.progress import VARIABLE, progress_file
from nst_det.engine.signals import EXIT_RESUME, preemptible
from nst_det.errors import RunFailed, UserError

log = logging.getLogger(__name__)
POLL_SECONDS = 0.1
# Windows has one way to end a process
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
# a run saves after the step that it is in; schedulers wait 30 seconds before they kill
STOP_SECONDS = 25.0
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
# what numerical libraries read; set before a process starts, because they look only once
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Command = Callable[[Run, Path], list[str]]
# exit code, and what the process wrote
Outcome = tuple[int, str]


class Launcher(Protocol):
    """Starts runs, here or on a cluster."""

    errors: tuple[type[Exception], ...]  # what a future raises where a run was lost
    hint: str  # more to say where a run's result is missing

    def fitting(self, ready: Sequence[Run], running: Collection[Run]) -> list[Run]:
        """Return which of the ready runs can start now."""

    def submit(self, run: Run) -> Future[Outcome]: ...

    def stop(self) -> None:
        """End all that still runs, and wait until it has ended."""


def run_plan(runs: Sequence[Run], folder: Path, launcher: Launcher, display: ProgressDisplay) -> None:
    """Do all runs that are not done, each as soon as what it needs is done and the launcher has room.

    How many run at once changes when a run happens, never what it computes.  An error or a signal stops all of them.
    """
    todo = {run.name: run for run in runs if not run.done}
    order = TopologicalSorter({name: [need for need in run.needs if need in todo] for name, run in todo.items()})
    order.prepare()
    ready: set[str] = set()
    running: dict[Future[Outcome], Run] = {}
    with preemptible(once=True):
        try:
            while order.is_active():
                ready.update(order.get_ready())
                in_order = [run for name, run in todo.items() if name in ready]
                for run in launcher.fitting(in_order, running.values()):
                    ready.remove(run.name)
                    running[launcher.submit(run)] = run
                    display.started(run)
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        code, output = future.result()
                    except launcher.errors as error:
                        reason = str(error).strip().splitlines()[0]
                        raise RunFailed(f"run {run.name} was lost again and again: {reason}", EXIT_FAILED) from error
                    _check_outcome(run, code, output, run.log_path(folder), launcher.hint)
                    order.done(run.name)
                    display.finished(run)
                display.update(list(running.values()))
        finally:
            launcher.stop()


def _check_outcome(run: Run, code: int, output: str, log: Path, hint: str) -> None:
    if code == 0:
        for path in run.results:
            if not path.exists():
                raise RunFailed(f"run {run.name} ended without writing {path}{hint} (log: {log})", EXIT_FAILED)
        return
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("nst-det: ") for line in lines if line.startswith("nst-det: ")]
    reason = (errors or lines or ["it wrote nothing"])[-1]
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    exit_code = code if code in (EXIT_BAD_INPUT, EXIT_RESUME) else EXIT_FAILED
    raise RunFailed(f"run {run.name} failed: {reason} (log: {log})", exit_code)


@dataclass(frozen=True)
class Machine:
    """What runs may use: room for ``jobs`` threads on the CPU, and for ``gpu_jobs`` runs on all GPUs together.

    Runs on GPUs share the cores, which are ``jobs`` then; without GPUs all runs are the CPU's.
    """

    jobs: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them
    gpu_jobs: int = 0

    def on_gpu(self, run: Run) -> bool:
        return run.wants_gpu and bool(self.gpus)

    def share(self, run: Run) -> Fraction:
        """Return the part of its device that a run takes."""
        return Fraction(1, self.gpu_jobs) if self.on_gpu(run) else Fraction(min(run.threads, self.jobs), self.jobs)

    def fitting(self, ready: Sequence[Run], running: Collection[Run]) -> list[Run]:
        """Return which of the ready runs fit beside the running ones."""
        used = {on_gpu: sum(self.share(run) for run in running if self.on_gpu(run) == on_gpu) for on_gpu in (0, 1)}
        fits = []
        for run in ready:
            # counted also where it doesn't fit: a long run that all others wait for is not overtaken by short ones
            used[self.on_gpu(run)] += self.share(run)
            if used[self.on_gpu(run)] <= 1:
                fits.append(run)
        return fits


def this_machine(jobs: int = 0) -> Machine:
    """Return this machine; ``jobs`` runs side by side, on its GPUs if there are some; 0 is one a GPU, or one a core."""
    if jobs < 0:
        raise UserError("--jobs can't be negative; leave it out for as many as there are cores or GPUs")
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    gpus = tuple(named[:count]) if named else tuple(str(index) for index in range(count))
    return Machine(core_count(), gpus, jobs or len(gpus)) if gpus else Machine(jobs or core_count())


class Process:
    """A command that appends to ``log``.

    It has this process's environment, and ``more`` of it, but for threads and GPU ("" for none).
    """

    def __init__(
        self, command: Sequence[str], log: Path, threads: int, gpu: str = "", more: Mapping[str, str] | None = None
    ) -> None:
        self.gpu, self._log = gpu, log
        environment = {**os.environ, **(more or {}), "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": gpu}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads)) | {VARIABLE: str(progress_file(log))}
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self._begin = file.tell()
            # a session of its own: Ctrl-C reaches the comparison alone, which then stops its runs in order
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def outcome(self) -> Outcome:
        """Wait until it ends; the exit code is below 0 for a signal."""
        code = self._popen.wait()
        with open(self._log, "rb") as file:
            file.seek(self._begin)
            return code, file.read().decode("utf-8", "replace")

    def signal(self, number: int) -> None:
        # to the processes that it started, too
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, number)
            else:
                self._popen.terminate()


def stage_command(run: Run, folder: Path) -> list[str]:
    """Return the command line of a run of the comparison in ``folder``."""
    return [sys.executable, "-m", "nst_det", "--end-with-parent", str(os.getpid()), *run.command(folder)]


class LocalLauncher:
    """Runs processes on this machine; ``command`` gives their command lines in place of this package's own."""

    errors: tuple[type[Exception], ...] = ()
    hint = ""

    def __init__(self, folder: Path, machine: Machine, command: Command | None = None) -> None:
        self._folder, self._machine, self._command = folder, machine, command or stage_command
        self._running: dict[Future[Outcome], tuple[Run, Process]] = {}
        # one thread waits for each process
        self._pool = ThreadPoolExecutor(machine.jobs + machine.gpu_jobs)
        self.fitting = machine.fitting

    def start(self, run: Run) -> Process:
        """Start the process of a run, on the GPU with the fewest runs if it gets one."""
        machine, gpu, threads = self._machine, "", run.threads
        if machine.on_gpu(run):
            busy = [process.gpu for _, process in self._running.values() if process.running]
            gpu, threads = min(machine.gpus, key=busy.count), max(1, machine.jobs // machine.gpu_jobs)
        return Process(self._command(run, self._folder), run.log_path(self._folder), threads, gpu)

    def submit(self, run: Run) -> Future[Outcome]:
        # by this thread, not one of the pool: the process ends when the thread that started it does
        process = self.start(run)
        future = self._pool.submit(process.outcome)
        self._running[future] = run, process
        return future

    def stop(self) -> None:
        """Ask all processes to end, and kill those that don't within :data:`STOP_SECONDS`."""
        for _, process in self._running.values():
            if process.running:
                process.signal(signal.SIGTERM)
        for future in wait(self._running, STOP_SECONDS).not_done:
            run, process = self._running[future]
            log.warning("run %s did not stop when asked; it is killed", run.name)
            process.signal(KILL)
        self._pool.shutdown()
