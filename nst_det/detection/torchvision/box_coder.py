"""Anchors, box coding, matching and sampling: the arithmetic on boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.ops import box_iou

# an anchor or proposal that is trained on neither as object nor as background
IGNORED = -1
# what the random choices for each image of a batch are drawn from
Generators = Sequence[torch.Generator | None]


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


class BoxCoder(_utils.BoxCoder):
    """Detectron2's Box2BoxTransform, by torchvision's coder."""

    def decode_rows(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Apply (N, ..., K * 4) deltas to (N, ..., 4) boxes in pixels, of the same leading shape."""
        flat: Tensor = self.decode_single(deltas.flatten(0, -2), boxes.flatten(0, -2))
        return flat.reshape(deltas.shape)

    def regression_loss(self, deltas: Tensor, boxes: Tensor, targets: Tensor, beta: float) -> Tensor:
        """Sum the smooth L1 distances between (N, 4) deltas and those that lead from boxes to targets."""
        return smooth_l1_sum(deltas, self.encode_single(targets, boxes), beta)


def smooth_l1_sum(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the summed smooth L1 distance, a scalar; quadratic below ``beta``, plain L1 for beta 0."""
    if beta < 1e-5:
        return F.l1_loss(predicted, target, reduction="sum")
    return F.smooth_l1_loss(predicted, target, beta=beta, reduction="sum")


def match(
    truth: Tensor, boxes: Tensor, thresholds: Sequence[float], labels: Sequence[int], low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Return, of (N, 4) boxes, the (N,) index of the object in ``truth`` (M, 4) with the highest IoU, and (N,) label.

    ``labels`` (-1 ignored, 0 background, 1 object) are one more than the ascending ``thresholds`` between them.
    """
    if len(truth) == 0:
        return boxes.new_zeros(len(boxes), dtype=torch.int64), boxes.new_full((len(boxes),), labels[0]).long()
    iou = box_iou(truth, boxes)
    best, index = iou.max(dim=0)
    bounds = torch.tensor(list(thresholds), dtype=best.dtype, device=best.device)
    kinds = torch.tensor(list(labels), device=best.device)
    label = kinds[torch.bucketize(best, bounds, right=True)]
    if low_quality:
        # the best anchors of each object, ties included, learn something however low their IoU is: not necessarily
        # this object, as in Detectron2
        label[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return index, label


def sample(
    label: Tensor, background: int, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw indices of objects, at most that fraction of ``count``, and of background for the rest, by (N,) labels."""
    positive = torch.nonzero((label != IGNORED) & (label != background)).squeeze(1)
    negative = torch.nonzero(label == background).squeeze(1)
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    chosen = torch.randperm(len(positive), device=label.device, generator=generator)[:positives]
    rest = torch.randperm(len(negative), device=label.device, generator=generator)[:negatives]
    return positive[chosen], negative[rest]


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (..., 4) boxes off at an image of (height, width)."""
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """Return (...) whether both sides of (..., 4) boxes are longer than ``side``."""
    return ((boxes[..., 2] - boxes[..., 0]) > side) & ((boxes[..., 3] - boxes[..., 1]) > side)
