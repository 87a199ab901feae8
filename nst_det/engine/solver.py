"""Learning rate and gradient clipping of both stages, by Detectron2's keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import Tensor, nn

from nst_det.engine.nan_guard import gradient_norm
from nst_det.errors import UserError

# one cycle starts at 1/25 of the largest rate and ends at 1/250000 of it, as in torch's OneCycleLR
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 250_000


def make_optimizer(groups: list[dict[str, object]], solver: CfgNode) -> torch.optim.Optimizer:
    """Return SGD or AdamW over parameter groups."""
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)
    return torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, fused=True)


def lr_schedule(solver: CfgNode) -> Callable[[int], float]:
    """Return a function from a step to the learning rate as a part of BASE_LR.

    LR_SCHEDULER_NAME is WarmupMultiStepLR (times GAMMA at STEPS), WarmupCosineLR (to BASE_LR_END) or OneCycleLR.  For
    WARMUP_ITERS the rate goes from WARMUP_FACTOR in a line to where the schedule then is, or stays at it.
    """
    after: ParamScheduler | _OneCycle
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        if not 0 <= end <= 1:
            raise UserError(f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; give a number from 0 to BASE_LR")
        after = CosineParamScheduler(1.0, end)
    elif solver.LR_SCHEDULER_NAME == "OneCycleLR":
        after = _OneCycle(solver.MAX_ITER, solver.ONECYCLE_RISE)
    else:
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        if steps != sorted(set(steps)):
            raise UserError(f"SOLVER.STEPS: {list(solver.STEPS)} must rise")
        values = [solver.GAMMA**drops for drops in range(len(steps) + 1)]
        after = MultiStepParamScheduler(values, num_updates=solver.MAX_ITER, milestones=steps)
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    rescaled = solver.RESCALE_INTERVAL
    start, end = solver.WARMUP_FACTOR * after(0.0), after(0.0 if rescaled else length)
    warmup = ConstantParamScheduler(start) if solver.WARMUP_METHOD == "constant" else LinearParamScheduler(start, end)
    scaling = ["rescaled", "rescaled" if rescaled else "fixed"]
    schedule = CompositeParamScheduler([warmup, after], lengths=[length, 1 - length], interval_scaling=scaling)
    return lambda step: float(schedule(step / solver.MAX_ITER))


class _OneCycle(ParamScheduler):
    """torch's OneCycleLR as a function of progress, 0..1."""

    def __init__(self, steps: int, rise: float) -> None:
        self.steps, self.rise = steps, max(rise * steps - 1, 1)

    def __call__(self, where: float) -> float:
        step = round(where * self.steps)
        if step <= self.rise:
            return _cosine(ONE_CYCLE_START, 1.0, step / self.rise)
        return _cosine(1.0, ONE_CYCLE_END, (step - self.rise) / max(self.steps - 1 - self.rise, 1))


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(part, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times what it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def clip_gradients(parameters: Iterable[Tensor], node: CfgNode, norm: Tensor | None = None) -> None:
    """Clip by CLIP_GRADIENTS: each entry (``value``), each parameter's norm (``norm``) or that of all (``full_model``).

    ``value`` and ``norm`` are Detectron2's.  ``norm`` may give the L2 norm of all gradients, where it is known.
    """
    if not node.ENABLED:
        return
    kept = [parameter for parameter in parameters if parameter.grad is not None]
    grads = [parameter.grad for parameter in kept if parameter.grad is not None]
    if node.CLIP_TYPE == "value":
        nn.utils.clip_grad_value_(kept, node.CLIP_VALUE, foreach=True)
    elif node.CLIP_TYPE == "norm":
        own = torch.stack(torch._foreach_norm(grads, node.NORM_TYPE))
        torch._foreach_mul_(grads, (node.CLIP_VALUE / (own + 1e-6)).clamp(max=1.0).unbind())
    else:
        if node.NORM_TYPE != 2.0:
            norm = nn.utils.get_total_norm(grads, node.NORM_TYPE)
        elif norm is None:
            norm = gradient_norm(kept)
        # on a GPU the question would wait for it; scaling by 1 doesn't
        if norm.device.type != "cpu" or norm > node.CLIP_VALUE:
            nn.utils.clip_grads_with_norm_(kept, node.CLIP_VALUE, norm, foreach=True)
