"""FGD: maps of detectors, objects and background apart (Yang et al. 2022, arXiv 2111.11837)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import (
    Shared,
    aligned,
    channel_adapter,
    check_factors,
    check_temperature,
    compute_now,
    full_precision,
)
from nst_det.losses.registry import OUTPUT, LayerPair, register_term


def attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return by how much each position (B, H, W) and each channel (B, C) of maps counts, 1 in the mean."""
    size = maps.abs()
    positions, channels = size.mean(1).flatten(1), size.mean((2, 3))
    spatial = positions.shape[1] * F.softmax(positions / temperature, dim=1)
    return spatial.view(len(maps), *maps.shape[2:]), channels.shape[1] * F.softmax(channels / temperature, dim=1)


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what each position counts as part of an object, and of the background: (B, H, W) each.

    The former is 1 / area of the smallest box (N, 4) over it, in positions; the latter sums to 1 in each image.
    """
    height, width = size
    found = []
    for of_image in boxes:
        left, top, right, bottom = full_precision(of_image).unbind(1)
        left, right = (left * width).floor(), (right * width).ceil()
        top, bottom = (top * height).floor(), (bottom * height).ceil()
        area = (right - left + 1) * (bottom - top + 1)
        x, y = (torch.arange(length, device=area.device) for length in (width, height))
        across, down = ((left[:, None] <= x) & (x <= right[:, None])), ((top[:, None] <= y) & (y <= bottom[:, None]))
        inside = down[:, :, None] & across[:, None, :]
        shares = torch.where(inside, 1 / area[:, None, None], 0.0)
        # of no object at all
        found.append(torch.cat([shares, shares.new_zeros(1, height, width)]).amax(0))
    objects = torch.stack(found)
    background = (objects == 0).to(objects.dtype)
    return objects, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    objects: float = 5e-5,
    background: float = 2.5e-5,
    focus: float = 5e-5,
    temperature: float = 0.5,
    shared: Shared = compute_now,
) -> Tensor:
    """The focal part of FGD, of maps (B, C, H, W) of one size: a scalar >= 0, sums over an image, mean over the batch.

    ``objects`` and ``background`` weigh the squared differences there, ``focus`` the L1 distance of the attention.
    """
    teacher, size = teacher.detach(), (student.shape[2], student.shape[3])
    in_objects, around = shared(("fgd", "masks", size), lambda: box_masks(boxes, size))
    spatial, channels = shared(("fgd", "attention", size, temperature), lambda: attention(teacher, temperature))
    squares = (student - teacher).square() * channels[:, :, None, None]
    by_position = squares.sum(1) * spatial
    loss = (by_position * (objects * in_objects + background * around).to(by_position.dtype)).sum()
    if focus:
        own_spatial, own_channels = attention(student, temperature)
        loss = loss + focus * ((own_spatial - spatial).abs().sum() + (own_channels - channels).abs().sum())
    return loss / len(student)


class Context(nn.Module):
    """Maps plus what the whole image says about each channel (GcBlock, Cao et al. 2019, arXiv 1904.11492)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.where = nn.Conv2d(channels, 1, 1)
        half = max(channels // 2, 1)
        self.change = nn.Sequential(
            nn.Linear(channels, half), nn.LayerNorm(half), nn.ReLU(inplace=True), nn.Linear(half, channels)
        )
        nn.init.kaiming_normal_(self.where.weight, nonlinearity="relu")
        assert self.where.bias is not None
        for value in (self.where.bias, *self.change[-1].parameters()):
            nn.init.zeros_(value)

    def forward(self, maps: Tensor) -> Tensor:
        weights = F.softmax(self.where(maps).flatten(2), dim=2)
        context = (maps.flatten(2) * weights).sum(2)
        changed: Tensor = maps + self.change(context)[:, :, None, None]
        return changed


@register_term(
    "fgd",
    level="maps",
    weight=1.0,
    source="the FGD authors' code for Faster R-CNN",
    summary="maps on objects and on background, each by itself, where the teacher attends; the whole image's relations",
    truth="boxes",
)
class FGD(nn.Module):
    """The term ``fgd``."""

    # masks are the batch's
    reads = (OUTPUT,)

    def __init__(
        self,
        pair: LayerPair,
        objects: float = 5e-5,
        background: float = 2.5e-5,
        focus: float = 5e-5,
        relation: float = 5e-7,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        check_temperature("fgd", temperature)
        check_factors("fgd", objects=objects, background=background, focus=focus, relation=relation)
        self.factors = (objects, background, focus, temperature)
        self.relation = relation
        self.adapter = channel_adapter(pair.student_channels, pair.teacher_channels)
        self.contexts = nn.ModuleList(Context(pair.teacher_channels) for _ in range(2 if relation else 0))

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared, boxes: Sequence[Tensor]) -> Tensor:
        small, large = aligned(student, teacher, shared)
        small = self.adapter(small)
        loss = fgd_loss(small, large, boxes, *self.factors, shared)
        if self.relation:
            mine, theirs = (context(maps) for context, maps in zip(self.contexts, (small, large)))
            loss = loss + self.relation * (mine - theirs).square().sum() / len(small)
        return loss
