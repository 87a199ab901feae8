"""Greedy non-maximum suppression in Triton: a program takes one group of boxes, and its boxes one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _suppress(boxes, valid, kept, count, threshold, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * count
    index = tl.arange(0, BLOCK)
    inside = index < count
    corner = boxes + (row + index) * 4
    x0 = tl.load(corner, mask=inside, other=0.0)
    y0 = tl.load(corner + 1, mask=inside, other=0.0)
    x1 = tl.load(corner + 2, mask=inside, other=0.0)
    y1 = tl.load(corner + 3, mask=inside, other=0.0)
    area = (x1 - x0) * (y1 - y0)
    alive = tl.load(valid + row + index, mask=inside, other=0).to(tl.int32)
    for chosen in range(count):
        if tl.sum(tl.where(index == chosen, alive, 0), axis=0) > 0:
            at = boxes + (row + chosen) * 4
            left, top, right, bottom = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
            width = tl.maximum(tl.minimum(x1, right) - tl.maximum(x0, left), 0.0)
            height = tl.maximum(tl.minimum(y1, bottom) - tl.maximum(y0, top), 0.0)
            shared = width * height
            overlap = tl.div_rn(shared, (right - left) * (bottom - top) + area - shared)
            alive = tl.where((overlap > threshold) & (index > chosen), 0, alive)
    tl.store(kept + row + index, alive.to(tl.int8), mask=inside)


def kept_by_triton(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return what :func:`~nst_det.detection.torchvision.nms.kept_by_nms` returns, of boxes in float32."""
    groups, count = valid.shape
    kept = torch.zeros_like(valid, memory_format=torch.contiguous_format)
    if valid.numel():
        block = triton.next_power_of_2(count)
        warps = min(max(block // 256, 1), 32)
        given = boxes.float().contiguous(), valid.contiguous().view(torch.int8), kept.view(torch.int8)
        with torch.cuda.device_of(boxes):
            _suppress[(groups,)](*given, count, threshold, BLOCK=block, num_warps=warps)
    return kept
