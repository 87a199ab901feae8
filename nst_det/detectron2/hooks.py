"""Detectron2's training loop with what this project adds to its steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from nst_det.engine.clock import SPEED_PERIOD, Clock, Speed
from nst_det.engine.distributed import asked_to_stop, wait_for_all
from nst_det.engine.metrics import SPEED, MetricsWriter
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import seed_everything


class RollbackStep(Exception):
    """The step was not made; the trainer's ``iter`` is an earlier one, whose state is loaded."""


class Loop(DefaultTrainer):
    """Detectron2's trainer, of whose steps one may raise :class:`RollbackStep`."""

    def train(self) -> Any:
        """As Detectron2's, whose loop runs through a range and can't go back."""
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    try:
                        self.run_step()
                    except RollbackStep:
                        # the hooks begin again as well
                        self.before_train()
                        continue
                    self.after_step()
                    self.iter += 1
            except BaseException:
                # Detectron2's hook evaluates after the last step, also where that was not made
                self._hooks[:] = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
                raise
            finally:
                self.after_train()
        if not (self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()):
            return None
        verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results


class StepSeed(HookBase):
    """Seeds everything from (seed, step, rank) before each step; a negative seed leaves chance to chance."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seed."""
        seed_step(self.seed, self.trainer.iter, comm.get_rank())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one step in one process; not where the seed is negative."""
    if seed >= 0:
        seed_everything(seed, "step", step, rank)


class AfterBackwardHook(HookBase):
    """Calls a method of the trainer after each backward pass; of Detectron2's hooks only the inner trainer's can."""

    def __init__(self, call: Callable[[], None]) -> None:
        # the method's trainer holds the inner trainer, and this one must not hold it in turn
        self.call = weakref.WeakMethod(call)

    def after_backward(self) -> None:
        """Call it."""
        call = self.call()
        assert call is not None, "its trainer is running"
        call()


class StopWhenAsked(HookBase):
    """Saves and ends where any process was asked to stop; the last of the hooks."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.leaving = device, False

    def after_step(self) -> None:
        """Look."""
        trainer = self.trainer
        # the last step is saved in any case; what follows is the evaluation
        if trainer.iter + 1 < trainer.max_iter and asked_to_stop(trainer.stop, self.device):
            trainer.save_step()
            self.leaving = True
            trainer.stop.obey()

    def after_train(self) -> None:
        """Wait until all processes have closed their files: as soon as one has ended, the others are ended."""
        if self.leaving:
            wait_for_all()


class StepSpeed(HookBase):
    """Puts among Detectron2's events how fast the steps are; the first process alone knows how long all wait for data.

    Args:
        images: of a step, of all processes.
        device: that computes.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self._clock, self._began = Clock(), 0.0
        self._speed = Speed(images, device, self._clock)

    def before_step(self) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def after_step(self) -> None:
        """Add the step; tell every now and then."""
        storage, done = self.trainer.storage, self.trainer.iter + 1
        # a step that was passed over has no events
        waited, at = storage.latest().get("data_time", (0.0, -1))
        waited = waited if at == self.trainer.iter else 0.0
        self._clock.seconds["data"] += waited
        self._clock.seconds["step"] += time.perf_counter() - self._began - waited
        self._speed.steps += 1
        if done % SPEED_PERIOD == 0 or done == self.trainer.max_iter:
            storage.put_scalars(smoothing_hint=False, **self._speed.read())


class RunMetrics(HookBase):
    """Losses and learning rate of every step, and now and then its speed, as JSON lines in the run folder."""

    def __init__(self, run: RunFolder, wandb: str = "") -> None:
        self.run, self.wandb = run, wandb
        self.writer: MetricsWriter | None = None

    def before_train(self) -> None:
        """Open the file; lines of steps that will be repeated are dropped."""
        self.after_train()
        self.writer = MetricsWriter(self.run.metrics_path, self.trainer.iter, wandb=self.wandb)

    def after_step(self) -> None:
        """Write one line."""
        step = self.trainer.iter
        latest = self.trainer.storage.latest().items()
        assert self.writer is not None
        self.writer.write(step, {key: value for key, (value, at) in latest if at == step and is_curve(key)})

    def after_train(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()


def is_curve(name: str) -> bool:
    """Whether an event is a loss, the learning rate, a figure of the validation split or a speed (no other time)."""
    return name == "lr" or name.startswith(("val/", SPEED)) or "loss" in name or name.startswith("transfer")
