"""RoIAlign (He et al. 2017, https://arxiv.org/abs/1703.06870): a map within a box, as so many numbers for each box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

from nst_det.detection.torchvision.batch import to_device
from nst_det.engine.device import autocast


class Pooler(nn.Module):
    """RoIAlign, each box on the level of its size (FPN, equation 1)."""

    def __init__(
        self,
        strides: Sequence[int],
        resolution: int,
        sampling_ratio: int,
        aligned: bool = True,
        canonical_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.strides, self.resolution = list(strides), resolution
        # samples a bin and side, 0 for as many as the bin has pixels; ROIAlignV2 takes half a pixel off (aligned)
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        # a box with sides of this many pixels belongs on this level
        self.canonical_size, self.canonical_level = canonical_size, canonical_level
        self.lowest, self.highest = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))

    def levels(self, boxes: Tensor) -> Tensor:
        """Return (...) index into ``strides`` for (..., 4) boxes."""
        side = torch.sqrt((boxes[..., 2:] - boxes[..., :2]).prod(dim=-1))
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_size + 1e-8))
        return level.clamp(self.lowest, self.highest).long() - self.lowest

    def count(self, boxes: Tensor, valid: Tensor) -> list[list[int]]:
        """Return how many boxes (B, N, 4) that are ``valid`` (B, N) each image has on each level; the host waits."""
        every = torch.arange(len(self.strides), device=boxes.device)
        on_level = (self.levels(boxes)[..., None] == every) & valid[..., None]
        counts: list[list[int]] = on_level.sum(dim=1).tolist()
        return counts

    def forward(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Pool maps (B, C, H, W) a level and (N, 4) boxes an image to (sum of N, C, resolution, resolution).

        ``counts`` of these boxes, where :meth:`count` told them already, spare the host another wait.
        """
        rois = with_images(boxes)
        if len(self.strides) == 1:
            return self._pool(maps[0], rois, self.strides[0])
        level = self.levels(rois[:, 1:])
        if torch.compiler.is_exporting():
            # a graph can't have as many parts as there are boxes
            pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.resolution, self.resolution)
            for index, (map_, stride) in enumerate(zip(maps, self.strides)):
                chosen = torch.nonzero(level == index).squeeze(1)
                pooled = pooled.index_put((chosen,), self._pool(map_, rois[chosen], stride))
            return pooled
        if counts is None:
            counts = self.count(rois[None, :, 1:], torch.ones_like(level[None], dtype=torch.bool))
        order = level.argsort(stable=True)
        parts = rois[order].split([sum(of_level) for of_level in zip(*counts)])
        by_level = torch.cat([self._pool(*of_level) for of_level in zip(maps, parts, self.strides)])
        return by_level.index_select(0, order.argsort())

    def _pool(self, map_: Tensor, rois: Tensor, stride: int) -> Tensor:
        # in float32 under autocast too, as torchvision's does by itself
        values, settings = map_.float(), (self.resolution, 1.0 / stride, self.sampling_ratio, self.aligned)
        on_cpu = map_.device.type == "cpu" and not torch.compiler.is_exporting()
        pooled: Tensor = roi_align_by_rows(values, rois, *settings) if on_cpu else roi_align(values, rois, *settings)
        return pooled


def with_images(boxes: Sequence[Tensor]) -> Tensor:
    """Return (sum of N, 5) of (N, 4) boxes of each image: the number of the image, and the box."""
    if len(boxes) == 1:
        return F.pad(boxes[0], (1, 0))
    numbers = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(found) for found in boxes]))
    found = torch.cat(list(boxes))
    return torch.cat((to_device(numbers.to(found.dtype), found.device)[:, None], found), dim=1)


def roi_align_by_rows(
    map_: Tensor, rois: Tensor, resolution: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Return what torchvision's ``roi_align`` returns, many times faster on the CPU where the map is channels-last.

    Samples of a box lie on a grid, so that each mean is a product with weights of rows and of columns.
    """
    with autocast(map_.device, None):
        pooled: Tensor = _RoiAlign.apply(map_, rois, resolution, scale, sampling_ratio, aligned)
    return pooled


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, map_: Tensor, rois: Tensor, resolution: int, scale: float, sampling_ratio: int, aligned: bool
    ) -> Tensor:
        images, channels, height, width = map_.shape
        corners = rois[:, 1:].to(map_.dtype) * scale - (0.5 if aligned else 0.0)
        starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
        if not aligned:
            sides = sides.clamp(min=1)
        down, tops, rows = _axis_weights(starts[:, 1], sides[:, 1], height, resolution, sampling_ratio)
        across, lefts, columns = _axis_weights(starts[:, 0], sides[:, 0], width, resolution, sampling_ratio)
        ctx.windows = [
            (image, slice(top, top + high), slice(left * channels, (left + wide) * channels), high, wide)
            for image, top, high, left, wide in zip(rois[:, 0].long().tolist(), tops, rows, lefts, columns)
        ]
        ctx.save_for_backward(down, across)
        ctx.shape = map_.shape
        lines = map_.permute(0, 2, 3, 1).reshape(images, height, width * channels)
        pooled = map_.new_zeros(len(rois), resolution, resolution, channels)
        for out, of_rows, of_columns, (image, vertical, horizontal, high, wide) in zip(
            pooled, down, across, ctx.windows
        ):
            if high and wide:
                means = of_rows[:, :high] @ lines[image, vertical, horizontal]
                torch.matmul(of_columns[:, :wide], means.view(resolution, wide, channels), out=out)
        return pooled.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, channels, height, width = ctx.shape
        down, across = ctx.saved_tensors
        lines = gradient.new_zeros(images, height, width * channels)
        for of_roi, of_rows, of_columns, (image, vertical, horizontal, high, wide) in zip(
            gradient.permute(0, 2, 3, 1).contiguous(), down, across, ctx.windows
        ):
            if high and wide:
                means = of_columns[:, :wide].T @ of_roi
                lines[image, vertical, horizontal].addmm_(of_rows[:, :high].T, means.view(len(means), -1))
        return lines.view(images, height, width, channels).permute(0, 3, 1, 2), *[None] * 5


def _axis_weights(
    starts: Tensor, sides: Tensor, length: int, resolution: int, sampling_ratio: int
) -> tuple[Tensor, list[int], list[int]]:
    """Return (R, resolution, N) weights of at most N cells along an axis, the first cell of each box, and how many.

    ``starts`` and ``sides`` (R,) are the boxes' in cells of a map that is ``length`` long.
    """
    bins = (sides / resolution)[:, None, None]
    samples = bins.ceil() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio)
    number = torch.arange(max(int(samples.max()), 1) if len(bins) else 1)
    places = starts[:, None, None] + torch.arange(resolution)[:, None] * bins + (number + 0.5) * bins / samples
    used = (number < samples) & (places >= -1) & (places <= length)
    places = torch.where(used, places, 0.0).clamp(0, length - 1)
    low = places.long()
    high = (low + 1).clamp(max=length - 1)
    share = torch.where(used, 1 / samples, 0.0)
    first = torch.where(used, low, length).flatten(1).amin(dim=1)
    cells = (torch.where(used, high, -1).flatten(1).amax(dim=1) + 1 - first).clamp(min=0)
    weights = starts.new_zeros(len(starts), resolution, max(int(cells.max()), 1) if len(cells) else 1)
    for cell, part in ((low, 1 - (places - low)), (high, places - low)):
        weights.scatter_add_(2, torch.where(used, cell - first[:, None, None], 0), part * share)
    return weights, first.tolist(), cells.tolist()
