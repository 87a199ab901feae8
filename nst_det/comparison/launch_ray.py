"""The runs of a plan on a Ray cluster: each one a task with its cores or GPU; a lost one goes on on another node.

All nodes see the comparison's folder, the data and this installation under the same paths (shared storage).  A task is
the same command as here, so that its run folder, its log and its numbers are too; a node that dies takes its processes
along, Ray gives the task to another node, and the run goes on from its last checkpoint there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nst_det.comparison.display import ProgressDisplay
from nst_det.comparison.launch_local import (
    EXIT_FAILED,
    Command,
    Machine,
    RunFailed,
    environment_of,
    failure_of,
    said_since,
    signals_raise,
    stage_command,
    start_process,
)
from nst_det.comparison.plan import Run
from nst_det.engine.signals import EXIT_RESUME
from nst_det.errors import UserError

POLL_SECONDS = 0.2
# how often a run is begun again whose node or process was lost, not one that ended with an error
RETRIES = 10


def require_ray() -> Any:
    """The module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--launcher ray: Ray is not installed; pip install 'nst_det[ray]', or leave --launcher out to run here"
        ) from error
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """A connection to the cluster at ``address``; "" finds or starts one on this machine.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address or None, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"--address {address}: no Ray cluster answers ({line}); start one by ray start --head"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Interrupted(Exception):
    """A run was asked to stop, as a machine that is about to be taken away asks all its processes."""


class RayLauncher:
    """What :class:`~nst_det.comparison.launch_local.LocalLauncher` does, by tasks of Ray's.

    Args:
        runs: the plan.
        folder: of the comparison, on storage that all nodes share.
        machine: says which runs get a GPU; how many run at once is the cluster's matter.
        view: is told what starts, runs and ends.
        command: gives the words of a run after the interpreter's; None for this package's own.
        ray: the connected module.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        folder: Path,
        machine: Machine,
        view: ProgressDisplay,
        ray: Any,
        command: Command | None = None,
    ) -> None:
        self._runs, self._folder, self._machine, self._view = list(runs), folder.resolve(), machine, view
        self._ray, self._command = ray, command
        self._running: dict[Any, Run] = {}

    def run_all(self) -> None:
        """Do all runs that are not done.

        Raises:
            RunFailed: one of them ended with an error; the others were stopped.
            Stopped: SIGTERM or SIGINT came; all were stopped.
            UserError: no node of the cluster is large enough for a run.
        """
        done = {run.name for run in self._runs if run.done}
        waiting = [run for run in self._runs if run.name not in done]
        for run in waiting:
            self._check_room(run)
        with signals_raise():
            try:
                while waiting or self._running:
                    for run in [run for run in waiting if done.issuperset(run.needs)]:
                        waiting.remove(run)
                        self._running[self._start(run)] = run
                        self._view.started(run)
                    done |= self._collect()
                    self._view.update(list(self._running.values()))
            finally:
                for task in self._running:
                    self._ray.cancel(task, force=False)
                self._wait_for_the_cancelled()

    def _needs(self, run: Run) -> dict[str, float]:
        if self._gpu_threads(run):
            return {"num_cpus": 1, "num_gpus": 1}
        return {"num_cpus": run.threads, "num_gpus": 0}

    def _gpu_threads(self, run: Run) -> int:
        """Cores for each GPU, on the node that has the fewest; 0 where the run gets no GPU."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        shares = [int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
        return max(1, min(shares)) if run.wants_gpu and shares else 0

    def _check_room(self, run: Run) -> None:
        cores = [node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]]
        if max(cores, default=0) < self._needs(run)["num_cpus"]:
            raise UserError(
                f"--launcher ray: run {run.name} takes {run.threads} cores, and the largest node has "
                f"{max(cores, default=0):g}; lower THREADS"
            )

    def _start(self, run: Run) -> Any:
        words = self._command(run, self._folder) if self._command else None
        # lost with its node or worker it is given to another; one that ends with an error gives that as its answer
        retried = {"max_retries": RETRIES, "retry_exceptions": [Interrupted]}
        task = self._ray.remote(**self._needs(run), **retried, name=run.name)(carry_out)
        return task.remote(run, str(self._folder), words, self._gpu_threads(run))

    def _collect(self) -> set[str]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
        ended = set()
        for task in ready:
            run = self._running.pop(task)
            try:
                code, said = self._ray.get(task)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
                raise RunFailed(f"run {run.name} was lost {RETRIES} times: {reason}", EXIT_FAILED) from error
            log = self._folder / "logs" / f"{run.name}.log"
            if code:
                raise failure_of(run, code, said, log)
            if not run.done:
                missing = next(path for path in run.results if not path.exists())
                raise RunFailed(
                    f"run {run.name} ended without writing {missing} where this process sees it; is {self._folder} on "
                    f"storage that all nodes share? (log: {log})",
                    EXIT_FAILED,
                )
            self._view.finished(run)
            ended.add(run.name)
        return ended

    def _wait_for_the_cancelled(self) -> None:
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=30)
        self._running.clear()


def carry_out(run: Run, folder: str, words: list[str] | None, gpu_threads: int = 0) -> tuple[int, str]:
    """One run, in a process of its own on the node that Ray chose; its exit code and the end of what it said.

    Args:
        run: of the plan.
        folder: of the comparison.
        words: the command line; None for this package's own.
        gpu_threads: its threads on the GPU that Ray gave it; 0 where it gets none.

    Raises:
        Interrupted: somebody stopped it; it goes on where it was.
    """
    if run.done:
        return 0, ""
    log = Path(folder) / "logs" / f"{run.name}.log"
    command = words or stage_command(run, Path(folder))
    # Ray names a task's GPU here, but hides none from a task without one
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpu_threads else ""
    process, file, offset = start_process(command, log, environment_of(gpu_threads or run.threads, gpu))
    with file:
        try:
            # short waits: Ray cancels by an exception that comes between them
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if process.returncode == EXIT_RESUME:
        raise Interrupted(f"{run.name} was stopped")
    return process.returncode, said_since(log, offset)[-8192:]
