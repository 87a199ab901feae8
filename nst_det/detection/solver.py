"""The detector's optimizer: Detectron2's parameter groups, without Detectron2."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.engine.solver import make_optimizer
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
    return make_optimizer(chosen, solver)


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
