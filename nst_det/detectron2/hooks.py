"""Hooks that only Detectron2's trainer needs."""

from __future__ import annotations

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from torch import nn

from nst_det.engine.keys import FULL_MODEL
from nst_det.engine.nan_guard import gradient_norm, raise_together
from nst_det.engine.solver import clip_gradients


class FiniteCheck(HookBase):
    """Keeps batch and losses of a pass, and ends the step in all processes where a loss or gradient is not finite.

    A hook of the inner trainer, as only its hooks are called between the backward pass and the optimizer.  It also
    clips the norm of all gradients, which Detectron2's optimizer can't.
    """

    def __init__(self, model: nn.Module, parallel: nn.Module, clip: CfgNode) -> None:
        self.parameters, self.clip = list(model.parameters()), clip
        self.batch: list[dict[str, Any]] = []
        self.losses: dict[str, Any] = {}
        parallel.register_forward_pre_hook(self.see_batch)
        parallel.register_forward_hook(self.see_losses)

    def see_batch(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.batch, self.losses = inputs[0], {}

    def see_losses(self, _: nn.Module, __: Any, losses: Any) -> None:
        self.losses = losses if isinstance(losses, dict) else {}

    def after_backward(self) -> None:
        norm = gradient_norm(self.parameters)
        total = sum(value.detach() for value in self.losses.values()) + norm
        raise_together(not math.isfinite(total))
        if self.clip.CLIP_TYPE == FULL_MODEL:
            clip_gradients(self.parameters, self.clip, norm)


class EvalHook(hooks.EvalHook):
    """Detectron2's, which evaluates after the last step also where that was not made."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
