"""The training loop of both stages and of both detection engines, and the hooks around its steps.

Names are Detectron2's, so that its hooks work here and these hooks work in its trainer.  Step k draws from (seed, k)
alone, so that on the CPU a resumed run ends with the bits of an undisturbed one.
"""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from nst_det.engine.distributed import is_main_process, largest_of_processes, wait_for_all
from nst_det.engine.format import GIB
from nst_det.engine.metrics import MetricsWriter
from nst_det.engine.progress import Meter, progress
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.signals import Preempted, StopRequest, whole_steps
from nst_det.engine.train_state import TrainState

# steps between two readings of the speed where no key names them; Detectron2 writes its own as often
SPEED_PERIOD = 20


class RollbackStep(Exception):
    """The step was not made; the trainer's ``iter`` is an earlier one, whose state is loaded."""


class Hook:
    """Does something around the steps of a trainer, like Detectron2's ``HookBase``."""

    trainer: Any

    # called again after a step that was rolled back
    def before_train(self) -> None: ...
    def before_step(self) -> None: ...
    def after_step(self) -> None: ...
    # called after an error too
    def after_train(self) -> None: ...

    def due(self) -> bool:
        """Whether ``after_step`` must know that the step was finite, which a GPU tells later."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}


class TrainLoop:
    """Makes the steps from ``start_iter`` to before ``max_iter``; a trainer adds ``run_step``, ``save_step``, hooks."""

    def __init__(self) -> None:
        self.iter = self.start_iter = self.max_iter = 0
        self.stop = StopRequest()
        self._hooks: list[Any] = []
        self._scalars: dict[str, float] = {}
        self._data_seconds = 0.0

    def register_hooks(self, hooks: Sequence[Any]) -> None:
        for hook in hooks:
            # a trainer and its hooks would keep each other alive
            hook.trainer = weakref.proxy(self)
        self._hooks.extend(hooks)

    def train(self) -> Any:
        """Make all steps; SIGTERM and SIGINT end the run after a step, saved."""
        self.iter = self.start_iter
        with whole_steps() as self.stop:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    try:
                        self.run_step()
                    except RollbackStep:
                        self.before_train()
                        continue
                    self.after_step()
                    self.iter += 1
            finally:
                self.after_train()

    def run_step(self) -> None:
        """Make step ``iter``, or set an earlier ``iter`` and raise :class:`RollbackStep`."""
        raise NotImplementedError

    def save_step(self) -> None:
        """Save a checkpoint after step ``iter``."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether the step that was made last is known to be finite, or what to do where it wasn't."""
        return True

    def is_due(self) -> bool:
        """Return whether a hook must know it of this step."""
        return any(hook.due() for hook in self._hooks)

    def finished_rows(self) -> list[tuple[int, Mapping[str, float]]]:
        """Return each step whose scalars are all there, with them, once."""
        return [(self.iter, self.scalars)]

    @property
    def scalars(self) -> Mapping[str, float]:
        """What this step has for the metrics, by name."""
        return self._scalars

    def put_scalars(self, **values: float) -> None:
        self._scalars |= values

    @property
    def data_seconds(self) -> float:
        """Seconds that this step waited for its batch."""
        return self._data_seconds

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def before_step(self) -> None:
        self._scalars = {}
        for hook in self._hooks:
            hook.before_step()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()

    def after_train(self) -> None:
        for hook in self._hooks:
            hook.after_train()


class Clock:
    """Adds up seconds by part of a step: ``with clock("data"): ...``."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[part] += self.now() - start

    def total(self) -> float:
        return sum(self.seconds.values())


class SpeedHook(Hook):
    """Reads the speed every ``period`` steps; the first of the hooks, as the others' time doesn't count.

    Adds ``speed/images_per_second``; ``speed/data_wait``, the share of the time that steps waited for data, 0..1; on a
    GPU, which is never waited for, ``speed/gpu_memory_gib``, the peak.  ``images`` are of a step in all processes.
    """

    def __init__(self, images: int, device: torch.device, period: int = SPEED_PERIOD) -> None:
        self.images, self.device, self.period = images, device, period
        self._steps, self._spent, self._waited, self._began = 0, 0.0, 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def before_step(self) -> None:
        self._began = time.perf_counter()

    def after_step(self) -> None:
        self._spent += time.perf_counter() - self._began
        self._waited += self.trainer.data_seconds
        self._steps += 1
        done = self.trainer.iter + 1
        if done % self.period and done != self.trainer.max_iter:
            return
        row = {
            "speed/images_per_second": self.images * self._steps / self._spent,
            "speed/data_wait": self._waited / self._spent,
        }
        if self.device.type == "cuda":
            row["speed/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        self.trainer.put_scalars(**row)
        self._steps, self._spent, self._waited = 0, 0.0, 0.0


class WallTime(Hook):
    """Counts the seconds of a :class:`~nst_det.engine.train_state.TrainState`."""

    def __init__(self, state: TrainState) -> None:
        self.state, self._counted = state, 0.0

    def before_train(self) -> None:
        self._counted = time.monotonic()

    def after_step(self) -> None:
        now = time.monotonic()
        self.state.seconds, self._counted = self.state.seconds + now - self._counted, now


class PeriodicHook(Hook):
    """Calls something every ``period`` steps (0 for never), and after the last step if ``last``."""

    def __init__(self, period: int, call: Callable[[], None], last: bool = False) -> None:
        self.period, self.call, self.last = period, call, last

    def due(self) -> bool:
        done = self.trainer.iter + 1
        return self.last if done == self.trainer.max_iter else bool(self.period) and done % self.period == 0

    def after_step(self) -> None:
        if self.due():
            self.call()


class PeriodicCheckpointer(PeriodicHook):
    """Saves every ``period`` steps and after the last; behind all that writes about a step, so no kill leaves a gap."""

    def __init__(self, period: int) -> None:
        super().__init__(period, lambda: self.trainer.save_step(), last=True)


class MetricsHook(Hook):
    """Writes the scalars of each step to ``metrics.jsonl``, in the main process."""

    def __init__(self, folder: RunFolder, tensorboard: bool = False, wandb: str = "") -> None:
        self.folder, self.board, self.wandb = folder, folder.path / "tensorboard" if tensorboard else None, wandb
        self._writer: MetricsWriter | None = None

    def before_train(self) -> None:
        self.after_train()
        if is_main_process():
            # drops the rows of steps that will be repeated
            self._writer = MetricsWriter(self.folder.metrics_path, self.trainer.iter, self.board, self.wandb)

    def after_step(self) -> None:
        for step, scalars in self.trainer.finished_rows():
            if self._writer is not None:
                self._writer.write(step, scalars)

    def after_train(self) -> None:
        if self._writer is not None:
            self._writer.close()


class ProgressHook(Hook):
    """Shows the progress, with ``losses`` at a bar, and ``note`` in a plain line now and then."""

    def __init__(self, title: str, losses: Callable[[], Mapping[str, float]], note: Callable[[], str]) -> None:
        self.title, self.losses, self.note = title, losses, note
        self._shown: AbstractContextManager[Meter] | None = None

    def before_train(self) -> None:
        if self._shown is None:
            self._shown = progress(self.title, self.trainer.max_iter, training=True)
            self._meter = self._shown.__enter__()
        self._meter.start_at(self.trainer.iter)
        self._meter.wait(f"resumed at step {self.trainer.iter}" if self.trainer.iter else "first step")

    def after_step(self) -> None:
        self._meter.step(self.losses(), self.note)

    def after_train(self) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)


class StopWhenAsked(Hook):
    """Saves and ends where a signal came to any of the processes; the last of the hooks."""

    def __init__(self) -> None:
        # the signal, as soon as all processes know of it
        self.signum, self.leaving = 0, False

    def due(self) -> bool:
        return self.signum > 0

    def after_step(self) -> None:
        self.signum = self.signum or largest_of_processes([self.trainer.stop.signum])[0]
        # else after the next step
        if self.signum and self.trainer.settled:
            self.trainer.save_step()
            self.leaving = True
            raise Preempted(self.signum)

    def after_train(self) -> None:
        if self.leaving:
            # as soon as one process has ended the others are ended, and the first may still be writing
            wait_for_all()
