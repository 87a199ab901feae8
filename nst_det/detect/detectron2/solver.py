"""SGD as Detectron2 builds it, or AdamW; a learning rate of its own for the backbone."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from nst_det.detect.solver import is_backbone
from nst_det.errors import UserError

OPTIMIZERS = ("SGD", "ADAMW")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``SOLVER``; with the defaults of the extra keys it is Detectron2's own.

    Args:
        cfg: reads SOLVER.OPTIMIZER and BACKBONE_MULTIPLIER besides Detectron2's keys.
        model: a detector, or the :class:`~nst_det.detect.distilled.DistilledDetector` around it.

    Raises:
        UserError: an optimizer that isn't known.
    """
    solver = cfg.SOLVER
    kind = solver.OPTIMIZER.upper()
    if kind not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER: '{solver.OPTIMIZER}' is not one of {', '.join(OPTIMIZERS)}")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if is_backbone(name) else 1.0,
    )
    on_gpu = next(model.parameters()).is_cuda
    way: dict[str, Any] = {"fused": on_gpu, "foreach": not on_gpu}
    if kind == "ADAMW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **way
        )
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            **way,
        )
    # Detectron2's "norm" clips every parameter by itself
    return maybe_add_gradient_clipping(cfg, optimizer)
