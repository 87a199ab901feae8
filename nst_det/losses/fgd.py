"""FGD: maps of detectors, objects and background apart (Yang et al. 2022, arXiv 2111.11837)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import (
    Shared,
    aligned,
    channel_adapter,
    check_factors,
    check_temperature,
    full_precision,
)
from nst_det.losses.registry import OUTPUT, LayerPair, register_term


def attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return by how much each position (B, H, W) and each channel (B, C) of maps counts, 1 in the mean."""
    size = maps.abs()
    positions, channels = size.mean(1).flatten(1), size.mean((2, 3))
    spatial = positions.shape[1] * F.softmax(positions / temperature, dim=1)
    return spatial.view(len(maps), *maps.shape[2:]), channels.shape[1] * F.softmax(channels / temperature, dim=1)


def box_masks(boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Return what each position counts as part of an object, and of the background: (B, H, W) each, for each size.

    The former is 1 / area of the smallest box (N, 4) over it, in positions; the latter sums to 1 in each image.
    """
    corners = full_precision(torch.cat(list(boxes)))
    image = torch.tensor([at for at, of_image in enumerate(boxes) for _ in of_image], dtype=torch.int64)
    image = image.to(corners.device, non_blocking=True)[:, None, None]
    across, wide = _covered(corners[:, 0::2], [width for _, width in sizes])
    down, high = _covered(corners[:, 1::2], [height for height, _ in sizes])
    shares, found = 1 / (wide * high), []
    for at, (columns, rows) in enumerate(zip(across, down)):
        over = torch.where(rows[:, :, None] & columns[:, None, :], shares[:, at, None, None], 0.0)
        objects = over.new_zeros(len(boxes), *sizes[at]).scatter_reduce_(0, image.expand_as(over), over, "amax")
        background = (objects == 0).to(objects.dtype)
        found.append((objects, background / background.sum((1, 2), keepdim=True).clamp(min=1)))
    return found


def _covered(edges: Tensor, lengths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return which positions of an axis (N, length) intervals (N, 2) cover, for each length, and how many (N, L)."""
    scale = torch.tensor(lengths, dtype=edges.dtype).to(edges.device, non_blocking=True)
    first, last = (edges[:, :1] * scale).floor(), (edges[:, 1:] * scale).ceil()
    covered = []
    for at, length in enumerate(lengths):
        place = torch.arange(length, device=edges.device)
        covered.append((first[:, at, None] <= place) & (place <= last[:, at, None]))
    return covered, last - first + 1


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    objects: float = 5e-5,
    background: float = 2.5e-5,
    focus: float = 5e-5,
    temperature: float = 0.5,
) -> Tensor:
    """The focal part of FGD, of maps (B, C, H, W) of one size: a scalar >= 0, sums over an image, mean over the batch.

    ``boxes`` are those of each image, (N, 4) in shares of its sides.  ``objects`` and ``background`` weigh the squared
    differences there, ``focus`` the L1 distance of the attention, which a lower ``temperature`` makes sharper.
    """
    teacher = teacher.detach()
    ((inside, around),) = box_masks(boxes, [(student.shape[2], student.shape[3])])
    weights = objects * inside + background * around
    return _focal(student, teacher, weights, attention(teacher, temperature), focus, temperature)


def _focal(
    student: Tensor, teacher: Tensor, weights: Tensor, attended: tuple[Tensor, Tensor], focus: float, temperature: float
) -> Tensor:
    """Return the focal part where each position's ``weights`` (B, H, W), and the teacher's attention, are known."""
    spatial, channels = attended
    by_position = (spatial * weights.to(spatial.dtype)).flatten(1)[:, :, None]
    by_channel = (student - teacher).square().flatten(2) @ by_position
    loss = (by_channel * channels[:, :, None]).sum()
    if focus:
        both = zip(attention(student, temperature), attended)
        loss = loss + focus * sum(F.l1_loss(mine, theirs, reduction="sum") for mine, theirs in both)
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
        context = maps.flatten(2) @ weights.mT
        changed: Tensor = maps + self.change(context[:, :, 0])[:, :, None, None]
        return changed


@register_term(
    "fgd",
    level="maps",
    weight=1.0,
    source="the FGD authors' code for Faster R-CNN",
    summary="maps on objects and on background, each by itself, where the teacher attends; the whole image's relations",
    truth="boxes",
    joint=True,
)
class FGD(nn.Module):
    """The term ``fgd``: adapter and contexts of each level; what boxes cover is computed for all levels at once."""

    # masks are the batch's
    reads = (OUTPUT,)

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        objects: float = 5e-5,
        background: float = 2.5e-5,
        focus: float = 5e-5,
        relation: float = 5e-7,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        check_temperature("fgd", temperature)
        check_factors("fgd", objects=objects, background=background, focus=focus, relation=relation)
        self.objects, self.background, self.focus = objects, background, focus
        self.relation, self.temperature = relation, temperature
        self.levels = nn.ModuleList(_Level(pair, bool(relation)) for pair in pairs)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], shared: Sequence[Shared], boxes: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the value of each level, in their order."""
        maps = [aligned(*given) for given in zip(student, teacher, shared)]
        sizes = [(mine.shape[2], mine.shape[3]) for mine, _ in maps]
        masks = shared[0](("fgd", "masks", *sizes), lambda: box_masks(boxes, sizes))
        values = []
        for level, (mine, theirs), share, (inside, around) in zip(self.levels, maps, shared, masks):
            assert isinstance(level, _Level)
            mine = level.adapter(mine)
            weights = self.objects * inside + self.background * around
            attended = share(
                ("fgd", "attention", *mine.shape[2:], self.temperature),
                partial(attention, theirs, self.temperature),
            )
            value = _focal(mine, theirs, weights, attended, self.focus, self.temperature)
            if self.relation:
                one, other = (context(given) for context, given in zip(level.contexts, (mine, theirs)))
                value = value + self.relation * F.mse_loss(one, other, reduction="sum") / len(mine)
            values.append(value)
        return values


class _Level(nn.Module):
    def __init__(self, pair: LayerPair, related: bool) -> None:
        super().__init__()
        self.adapter = channel_adapter(pair.student_channels, pair.teacher_channels)
        self.contexts = nn.ModuleList(Context(pair.teacher_channels) for _ in range(2 if related else 0))
