"""Non-maximum suppression of many groups of boxes at once."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op("nst_det::kept_by_nms", mutates_args=())
def kept_by_nms(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return (G, N) bool: which boxes of each group NMS keeps; groups don't touch each other.

    torchvision's ``batched_nms`` compares every box with every other one, of other groups too, or waits for each group
    on a GPU.  There this is one kernel, a program a group, that nothing waits for.

    Args:
        boxes: (G, N, 4) xyxy, the best of each group first.
        valid: (G, N) bool; the other boxes are neither kept nor suppress any.
        threshold: of two boxes with a larger IoU the first is kept.
    """
    return _group_by_group(boxes, valid, threshold)


def _group_by_group(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    kept = torch.zeros_like(valid)
    for group, usable, found in zip(boxes, valid, kept):
        rows = torch.nonzero(usable).squeeze(1)
        falling = torch.arange(len(rows), 0, -1, dtype=torch.float32, device=rows.device)
        found[rows[nms(group[rows], falling, threshold)]] = True
    return kept


@kept_by_nms.register_kernel("cuda")
def _on_gpu(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    if find_spec("triton") is None:
        return _group_by_group(boxes, valid, threshold)
    from nst_det.detection.torchvision.nms_kernel import kept_by_triton

    return kept_by_triton(boxes, valid, threshold)
