"""The runs of a plan on a Ray cluster: each one a task with its cores or GPU; a lost one resumes on another node.

All nodes see the comparison's folder, the data and this installation under the same paths (shared storage).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from nst_det.comparison.launch_local import POLL_SECONDS, Command, Outcome, Process, stage_command
from nst_det.comparison.plan import Run
from nst_det.engine.signals import EXIT_RESUME
from nst_det.errors import UserError

# how often a run is begun again whose node or process was lost, not one that ended with an error
RETRIES = 10
STOP_SECONDS = 30.0


def require_ray() -> Any:
    """Return the module, or raise an error that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--launcher ray: Ray is not installed; pip install ray, or leave --launcher out to run here"
        ) from error
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to the cluster at ``address``; "" finds or starts one on this machine."""
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
    """A run was asked to stop, as on a machine that is about to be taken away."""


class RayLauncher:
    """Runs tasks on a cluster, which decides how many at once; ``command`` gives other command lines."""

    def __init__(self, ray: Any, runs: Sequence[Run], folder: Path, command: Command | None = None) -> None:
        self._ray, self._folder, self._command = ray, folder.resolve(), command
        self._tasks: list[Any] = []
        self.errors: tuple[type[Exception], ...] = (ray.exceptions.RayError,)
        self.hint = f" where this process sees it; is {self._folder} on storage that all nodes share?"
        largest = max((node.get("CPU", 0) for node in self._nodes()), default=0)
        for run in runs:
            if not run.done and largest < self.needs(run)["num_cpus"]:
                raise UserError(
                    f"--launcher ray: run {run.name} takes {run.threads} cores, and the largest node has "
                    f"{largest:g}; lower THREADS"
                )

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def gpu_threads(self, run: Run) -> int:
        """Return the cores of each GPU on the node that has the fewest; 0 where the run gets no GPU."""
        shares = [int(node.get("CPU", 1) // node["GPU"]) for node in self._nodes() if node.get("GPU", 0) >= 1]
        return max(1, min(shares)) if run.wants_gpu and shares else 0

    def needs(self, run: Run) -> dict[str, float]:
        """Return what a run's task takes of its node."""
        on_gpu = self.gpu_threads(run) > 0
        return {"num_cpus": 1 if on_gpu else run.threads, "num_gpus": int(on_gpu)}

    def fitting(self, ready: Sequence[Run], running: Collection[Run]) -> list[Run]:
        """Return all: those that have to wait do so on the cluster."""
        return list(ready)

    def submit(self, run: Run) -> Future[Outcome]:
        command = self._command(run, self._folder) if self._command else None
        # one that is lost with its node or worker is given to another; one that ends with an error is not
        retried = {"max_retries": RETRIES, "retry_exceptions": [Interrupted]}
        remote = self._ray.remote(**self.needs(run), **retried, name=run.name)(run_on_node)
        environment = needed_environment(run, self._folder)
        task = remote.remote(run, str(self._folder), command, self.gpu_threads(run), environment)
        self._tasks.append(task)
        future: Future[Outcome] = task.future()
        return future

    def stop(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        if not self._tasks:
            return
        _, running = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        for task in running:
            self._ray.cancel(task, force=False)
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS)


def needed_environment(run: Run, folder: Path) -> dict[str, str]:
    """Return the variables that a run reads of this process's environment; a node has that of its ``ray start``."""
    config = run.config_path(folder)
    named = set(re.findall(r"\$\{?(\w+)", config.read_text(encoding="utf-8"))) if config.exists() else set()
    ours = (name for name in os.environ if name.startswith("NST_DET_"))
    return {name: os.environ[name] for name in {*named, *ours, "PYTHONPATH"} if name in os.environ}


def run_on_node(
    run: Run,
    folder: str,
    command: list[str] | None,
    gpu_threads: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Do a run on the node that Ray chose, with ``gpu_threads`` threads (0: no GPU); return the end of its output."""
    if run.done:
        return 0, ""
    # Ray names a task's GPU here, but hides none from a task without one
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpu_threads else ""
    command = command or stage_command(run, Path(folder))
    process = Process(command, run.log_path(Path(folder)), gpu_threads or run.threads, gpu, environment)
    try:
        # short waits: Ray cancels by an exception that comes between them
        while process.running:
            time.sleep(POLL_SECONDS)
    finally:
        if process.running:
            process.signal(signal.SIGTERM)
        code, output = process.outcome()
    if code == EXIT_RESUME:
        raise Interrupted(f"{run.name} was stopped")
    return code, output[-8192:]
