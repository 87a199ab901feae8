"""Anchors, box coding and clipping: the arithmetic on boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of the logarithm of a side's growth, as in Detectron2
LARGEST_GROWTH = math.log(1000.0 / 16)


class Anchors(nn.Module):
    """(H * W * A, 4) xyxy of each level: rows, then columns, then the anchors of a cell."""

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides, self.offset = list(strides), offset
        sizes = list(sizes) * len(self.strides) if len(sizes) == 1 else sizes
        aspect_ratios = list(aspect_ratios) * len(self.strides) if len(aspect_ratios) == 1 else aspect_ratios
        cells = [cell_anchors(*of_level) for of_level in zip(sizes, aspect_ratios)]
        for level, cell in enumerate(cells):
            self.register_buffer(f"cell{level}", cell, persistent=False)
        self.per_cell = len(cells[0])
        if any(len(cell) != self.per_cell for cell in cells):
            raise ValueError(f"every level needs as many anchors a cell, there are {sorted({*map(len, cells)})}")

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of maps (B, C, H, W), level by level."""
        anchors = []
        for level, (map_, stride) in enumerate(zip(maps, self.strides)):
            cell = self.get_buffer(f"cell{level}")
            rows, columns = (
                (torch.arange(side, dtype=torch.float32, device=cell.device) + self.offset) * stride
                for side in map_.shape[-2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((shifts + cell).reshape(-1, 4))
        return anchors


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Return (len(sizes) * len(aspect_ratios), 4) anchors around (0, 0), all ratios of a size in a row."""
    rows = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(float(size) ** 2 / ratio)
            height = ratio * width
            rows.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(rows, dtype=torch.float32)


class BoxCoder(nn.Module):
    """Detectron2's Box2BoxTransform: a box as it is moved and grown from another one, times ``weights``."""

    # (4,), of x, y, width and height
    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32), persistent=False)

    def encode(self, targets: Tensor, boxes: Tensor) -> Tensor:
        """Return the deltas (..., 4) that lead from boxes (..., 4) xyxy to targets."""
        size, target_size = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
        moved = (targets[..., :2] + 0.5 * target_size) - (boxes[..., :2] + 0.5 * size)
        # multiplied before it is divided, as in torchvision and Detectron2, to the last bit
        return torch.cat((self.weights[:2] * moved / size, self.weights[2:] * torch.log(target_size / size)), dim=-1)

    def decode_rows(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Apply (..., K * 4) deltas to (..., 4) boxes in pixels, of the same leading shape."""
        rows = deltas.unflatten(-1, (-1, 4)) / self.weights
        size = (boxes[..., 2:] - boxes[..., :2]).unsqueeze(-2)
        center = boxes[..., :2].unsqueeze(-2) + 0.5 * size
        moved = rows[..., :2] * size + center
        half = 0.5 * (torch.exp(rows[..., 2:].clamp(max=LARGEST_GROWTH)) * size)
        return torch.cat((moved - half, moved + half), dim=-1).flatten(-2)

    def distances(self, deltas: Tensor, boxes: Tensor, targets: Tensor, beta: float) -> Tensor:
        """Return the smooth L1 distances (...) between deltas (..., 4) and those that lead from boxes to targets."""
        return smooth_l1(deltas, self.encode(targets, boxes), beta).sum(dim=-1)


def smooth_l1(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the smooth L1 distance of each entry; quadratic below ``beta``, plain L1 for beta 0."""
    if beta < 1e-5:
        return F.l1_loss(predicted, target, reduction="none")
    return F.smooth_l1_loss(predicted, target, beta=beta, reduction="none")


def clip(boxes: Tensor, limits: Tensor) -> Tensor:
    """Cut (..., 4) boxes off at 0 and at ``limits`` (..., 4): width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), limits)


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """Return (...) whether both sides of (..., 4) boxes are longer than ``side``."""
    return ((boxes[..., 2:] - boxes[..., :2]) > side).all(dim=-1)
