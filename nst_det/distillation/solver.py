"""Optimizer, learning rate and gradient clipping of one network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.engine.nan_guard import gradient_norm

# one cycle starts at 1/25 of the largest rate and ends at 1/250000 of it, as in torch's OneCycleLR
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 250_000


def build_optimizer(modules: Iterable[nn.Module], solver: CfgNode) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters; scales, shifts and biases decay by WEIGHT_DECAY_NORM."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": solver.WEIGHT_DECAY_NORM},
    ]
    groups = [group for group in groups if group["params"]]
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, fused=True
        )
    return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)


def lr_factor(step: int, solver: CfgNode) -> float:
    """The learning rate of ``step`` as a fraction of BASE_LR: a function of the step alone."""
    total, warmup = solver.MAX_ITER, solver.WARMUP_ITERS
    factor = _schedule(step, total, solver)
    if step < warmup:
        factor *= solver.WARMUP_FACTOR + (1 - solver.WARMUP_FACTOR) * step / warmup
    return factor


def _schedule(step: int, total: int, solver: CfgNode) -> float:
    if solver.SCHEDULE == "step":
        return float(solver.GAMMA ** sum(step >= at for at in solver.STEPS))
    if solver.SCHEDULE == "cosine":
        return _cosine(1.0, 0.0, step / total)
    if solver.SCHEDULE == "onecycle":
        rise = max(solver.ONECYCLE_RISE * total - 1, 1)
        if step <= rise:
            return _cosine(ONECYCLE_START, 1.0, step / rise)
        return _cosine(1.0, ONECYCLE_END, (step - rise) / max(total - 1 - rise, 1))
    return 1.0


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(part, 1.0)))


def clip_gradients(parameters: Sequence[Tensor], limit: float, norm: Tensor | None = None) -> None:
    """Scale all gradients together so that their L2 norm is at most ``limit``.

    Args:
        parameters: tensors of any shape (...,); the gradients of those that have one are changed in place.
        limit: of the norm of all gradients together, 0 leaves them alone.
        norm: theirs, where it is known already.
    """
    if limit <= 0:
        return
    norm = gradient_norm(parameters) if norm is None else norm
    # on a GPU the question would wait for it; scaling by 1 doesn't
    if norm.device.type != "cpu" or norm > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
