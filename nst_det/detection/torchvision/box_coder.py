"""Anchors, box coding and sampling: the arithmetic on boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

# of the matcher: an anchor or proposal that is trained on neither as object nor as background
IGNORED = -1
# what the random choices for each image of a batch are drawn from
Generators = Sequence[torch.Generator | None]


class Anchors(nn.Module):
    """Anchors of every cell of every level.

    Example:
        >>> anchors = Anchors([[32]], [[1.0]], [16])
        >>> anchors([torch.zeros(1, 8, 2, 2)])[0][3].tolist()
        [0.0, 0.0, 32.0, 32.0]
    """

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
        for level, (level_sizes, level_ratios) in enumerate(zip(sizes, aspect_ratios)):
            self.register_buffer(f"cell{level}", cell_anchors(level_sizes, level_ratios), persistent=False)
        counts = {len(level_sizes) * len(level_ratios) for level_sizes, level_ratios in zip(sizes, aspect_ratios)}
        if len(counts) != 1:
            raise ValueError(f"every level needs as many anchors a cell, there are {sorted(counts)}")
        self.per_cell = counts.pop()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(H * W * A, 4) xyxy a level for maps (B, C, H, W): rows, then columns, then the anchors of a cell."""
        return [self._level(level, map_.shape[-2], map_.shape[-1]) for level, map_ in enumerate(maps)]

    def _level(self, level: int, height: int, width: int) -> Tensor:
        cell = self.get_buffer(f"cell{level}")
        stride = self.strides[level]
        y, x = torch.meshgrid(
            (torch.arange(height, dtype=torch.float32, device=cell.device) + self.offset) * stride,
            (torch.arange(width, dtype=torch.float32, device=cell.device) + self.offset) * stride,
            indexing="ij",
        )
        shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        return (shifts + cell).reshape(-1, 4)


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """(len(sizes) * len(aspect_ratios), 4) anchors around (0, 0), a size's ratios side by side."""
    rows = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(float(size) ** 2 / ratio)
            height = ratio * width
            rows.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(rows, dtype=torch.float32)


class Box2BoxTransform(BoxCoder):
    """Detectron2's coding of boxes as deltas, by torchvision's coder."""

    def decode_rows(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(N, ..., K * 4) deltas applied to (N, ..., 4) boxes in pixels, of the same leading shape."""
        flat: Tensor = self.decode_single(deltas.flatten(0, -2), boxes.flatten(0, -2))
        return flat.reshape(deltas.shape)

    def regression_loss(self, deltas: Tensor, boxes: Tensor, targets: Tensor, beta: float) -> Tensor:
        """Sum of the smooth L1 distances between (N, 4) deltas and those that lead from boxes to targets."""
        return smooth_l1_sum(deltas, self.encode_single(targets, boxes), beta)


def smooth_l1_sum(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Summed smooth L1 distance of two (N, D) tensors, a scalar; quadratic below ``beta``, plain L1 for beta 0."""
    if beta < 1e-5:
        return F.l1_loss(predicted, target, reduction="sum")
    return F.smooth_l1_loss(predicted, target, beta=beta, reduction="sum")


def match(
    truth: Tensor, boxes: Tensor, thresholds: Sequence[float], labels: Sequence[int], low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Deal boxes to objects by IoU.

    Args:
        truth: (M, 4) boxes of the objects.
        boxes: (N, 4) anchors or proposals.
        thresholds: ascending bounds between the labels.
        labels: one more than thresholds; -1 ignored, 0 background, 1 object.
        low_quality: also call the best anchors of each object (ties included) objects, however low their IoU; which
            object they learn is left as it is.

    Returns:
        (N,) index of the object with the highest IoU (0 without objects), and (N,) label.
    """
    if len(truth) == 0:
        return boxes.new_zeros(len(boxes), dtype=torch.int64), boxes.new_full((len(boxes),), labels[0]).long()
    iou = box_iou(truth, boxes)
    best, index = iou.max(dim=0)
    bounds = torch.tensor(list(thresholds), dtype=best.dtype, device=best.device)
    kinds = torch.tensor(list(labels), device=best.device)
    label = kinds[torch.bucketize(best, bounds, right=True)]
    if low_quality:
        label[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return index, label


def sample(
    label: Tensor, background: int, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random indices of objects and of background: as many objects as the fraction allows, background for the rest.

    Args:
        label: (N,) :data:`IGNORED`, ``background``, or any other number for an object.
        background: the label that means background.
        count: how many of both together.
        positive_fraction: of ``count``, the most that may be objects.
        generator: on the labels' device; None takes torch's own.
    """
    positive = torch.nonzero((label != IGNORED) & (label != background)).squeeze(1)
    negative = torch.nonzero(label == background).squeeze(1)
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    chosen = torch.randperm(len(positive), device=label.device, generator=generator)[:positives]
    rest = torch.randperm(len(negative), device=label.device, generator=generator)[:negatives]
    return positive[chosen], negative[rest]


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., 4) boxes cut off at an image of (height, width)."""
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """(N,) whether both sides of (N, 4) boxes are longer than ``side``."""
    return ((boxes[:, 2] - boxes[:, 0]) > side) & ((boxes[:, 3] - boxes[:, 1]) > side)
