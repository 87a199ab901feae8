"""Optimizer, learning rate and gradient clipping as Detectron2 defines them, without Detectron2."""

from __future__ import annotations

from collections.abc import Iterable

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

from nst_det.errors import UserError

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of a detector, or of what is around it.

    Reads OPTIMIZER, BASE_LR, BACKBONE_MULTIPLIER, BIAS_LR_FACTOR, WEIGHT_DECAY, WEIGHT_DECAY_NORM (layers that
    normalize), WEIGHT_DECAY_BIAS (all biases; None means WEIGHT_DECAY or WEIGHT_DECAY_NORM), MOMENTUM and NESTEROV.

    Raises:
        UserError: every parameter is frozen.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                groups.setdefault(_rate_and_decay(module_name, module, name, solver), []).append(parameter)
    if not groups:
        raise UserError("MODEL.BACKBONE.FREEZE_AT: every parameter is frozen, there is nothing to train")
    chosen = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(chosen, lr=solver.BASE_LR, fused=True)
    return torch.optim.SGD(chosen, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, fused=True)


def _rate_and_decay(module_name: str, module: nn.Module, name: str, solver: CfgNode) -> tuple[float, float]:
    lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY
    if isinstance(module, NORM_LAYERS) and solver.WEIGHT_DECAY_NORM is not None:
        decay = solver.WEIGHT_DECAY_NORM
    if is_backbone(f"{module_name}.{name}"):
        lr *= solver.BACKBONE_MULTIPLIER
    if name == "bias":
        if solver.BIAS_LR_FACTOR != 1.0:
            lr = solver.BASE_LR * solver.BIAS_LR_FACTOR
        decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
    return lr, decay


def is_backbone(name: str) -> bool:
    """Whether a detector's parameter belongs to the bottom-up, which may be pre-trained; the pyramid doesn't."""
    words = name.split(".")
    return "bottom_up" in words or ("backbone" in words and not any(word.startswith("fpn_") for word in words))


def lr_schedule(solver: CfgNode) -> ParamScheduler:
    """Progress (step / MAX_ITER) to the learning rate as a part of BASE_LR.

    LR_SCHEDULER_NAME is WarmupMultiStepLR (times GAMMA at each of STEPS) or WarmupCosineLR (to BASE_LR_END).  For
    WARMUP_ITERS the rate goes from WARMUP_FACTOR in a line to where the schedule then is, or stays at it.

    Raises:
        UserError: BASE_LR_END is not between 0 and BASE_LR, or STEPS don't rise.
    """
    after: ParamScheduler
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        if not 0 <= end <= 1:
            raise UserError(f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; give a number from 0 to BASE_LR")
        after = CosineParamScheduler(1.0, end)
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
    return CompositeParamScheduler([warmup, after], lengths=[length, 1 - length], interval_scaling=scaling)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes ``factor`` times what it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def clip_gradients(parameters: Iterable[Tensor], node: CfgNode) -> None:
    """CLIP_GRADIENTS: each entry (``value``), or each parameter's own norm (``norm``), is at most CLIP_VALUE.

    Args:
        parameters: tensors of any shape (...,); the gradients of those that have one are changed in place.
        node: SOLVER.CLIP_GRADIENTS.

    Source: Detectron2's ``SOLVER.CLIP_GRADIENTS``, whose ``norm`` clips each parameter by itself.
    """
    if not node.ENABLED:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if node.CLIP_TYPE == "value":
        for grad in grads:
            grad.clamp_(-node.CLIP_VALUE, node.CLIP_VALUE)
        return
    for grad in grads:
        norm = torch.linalg.vector_norm(grad, node.NORM_TYPE)
        grad.mul_((node.CLIP_VALUE / (norm + 1e-6)).clamp(max=1.0))
