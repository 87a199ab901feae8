"""What stage two says as it begins: what is compared with what, and how hard each term pulls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nst_det.detect.feature_maps import backbone_of, feature_maps, level_strides
from nst_det.runtime.processes import is_first
from nst_det.runtime.table import text_table
from nst_det.transfer import Outputs, TermBalance, balance, pair_shapes, shapes

if TYPE_CHECKING:
    from nst_det.detect.distilled import DistilledDetector

log = logging.getLogger(__name__)
# side in pixels of the black image that the shapes are read from
SIDE = 256


def log_shapes(model: DistilledDetector) -> None:
    """A table of all pairs that the method compares, for a black image of :data:`SIDE` pixels; modes are put back.

    Args:
        model: on its device; student and teacher are asked once, in evaluation mode.
    """
    if not is_first():
        return
    ours, theirs = backbone_of(model.student), backbone_of(model.teacher)
    side = max(_side(ours), _side(theirs))
    student = _probe(ours, model.transfer.student_levels, side)
    teacher = _probe(theirs, model.transfer.teacher_levels, side)
    for outputs, widths in zip((student, teacher), model.box_widths):
        outputs.embedding, outputs.logits = (torch.empty(1, width) for width in widths)
    strides = level_strides(ours), level_strides(theirs)
    lines = [line.cells for line in pair_shapes(model.transfer, student, teacher, *strides)]
    log.info("compared at %d x %d pixels:\n%s", side, side, text_table(shapes.HEADINGS, lines))


def _probe(backbone: nn.Module, levels: Sequence[str], side: int) -> Outputs:
    if not levels:
        return Outputs()
    training = [module for module in backbone.modules() if module.training]
    parameter = next(backbone.parameters())
    black = torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    try:
        with torch.no_grad():
            maps: dict[str, Tensor] = feature_maps(backbone, black, levels)
    finally:
        for module in training:
            module.training = True
    return Outputs(maps=maps)


def _side(backbone: Any) -> int:
    """The side in pixels that a backbone asks for (Detectron2's ViT does), or :data:`SIDE` made divisible."""
    multiple = max(int(getattr(backbone, "size_divisibility", 0) or 0), 1)
    wanted = (getattr(backbone, "padding_constraints", None) or {}).get("square_size", 0)
    return int(wanted) or -(-SIDE // multiple) * multiple


def log_balance(lines: Sequence[TermBalance]) -> None:
    """A table of the terms against the detector's own losses, and a warning for each one-sided term."""
    if not is_first():
        return
    rows = [line.cells for line in lines]
    log.info("terms against the detector's own losses:\n%s", text_table(balance.HEADINGS, rows))
    for line in lines:
        if line.one_sided:
            log.warning("%s", line.warning)
