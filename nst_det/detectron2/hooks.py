"""Hooks that only Detectron2's trainer needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from detectron2.engine import HookBase, hooks

from nst_det.engine.metrics import SPEED


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


class EvalHook(hooks.EvalHook):
    """Detectron2's, which evaluates after the last step also where that was not made."""

    def after_train(self) -> None:
        """Evaluate once all steps are made."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


def is_curve(name: str) -> bool:
    """Whether an event is a loss, the learning rate, a figure of the validation split or a speed (no other time)."""
    return name == "lr" or name.startswith(("val/", SPEED)) or "loss" in name or name.startswith("transfer")
