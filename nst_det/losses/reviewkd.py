"""ReviewKD: levels fused from the deepest up, against the teacher's (Chen et al. 2021, arXiv 2104.09044)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, aligned, compute_now, full_precision
from nst_det.losses.registry import LayerPair, register_term

# sides of the averages that are compared besides the maps themselves
POOLED = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor, shared: Shared = compute_now) -> Tensor:
    """Mean squared difference of maps (B, C, H, W), and of their averages over 4 x 4, 2 x 2 and 1 x 1 parts.

    Their weights are 1, 1/2, 1/4 and 1/8, divided by their sum; parts that maps are too small for are left out.  The
    larger map is averaged down first; a scalar >= 0.
    """
    found, wanted = aligned(student, teacher, shared, same_channels=True)
    total, weight, weights = F.mse_loss(found, wanted), 1.0, 1.0
    for side in POOLED:
        if side < min(found.shape[2:]):
            weight /= 2
            weights += weight
            mine, theirs = (F.adaptive_avg_pool2d(maps, side) for maps in (found, wanted))
            total = total + weight * F.mse_loss(mine, theirs)
    return total / weights


class Fusion(nn.Module):
    """A level's map and what came from the levels below it, mixed by attention (the paper's ABF)."""

    def __init__(self, student: int, width: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        enter, leave = nn.Conv2d(student, width, 1, bias=False), nn.Conv2d(width, teacher, 3, padding=1, bias=False)
        for conv in (enter, leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher))

    def forward(self, maps: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what is compared with the teacher (B, C_T, H, W), and what the next level gets (B, width, H, W)."""
        mixed: Tensor = self.enter(full_precision(maps))
        if self.attention is not None and below is not None:
            below = F.interpolate(below, mixed.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([mixed, below], 1))
            mixed = mixed * shares[:, :1] + below * shares[:, 1:]
        return self.leave(mixed), mixed


@register_term(
    "reviewkd",
    level="maps",
    weight=1.0,
    source="mdistiller's detectors, and the ReviewKD authors' code for ImageNet",
    summary="the maps of all levels, each predicted from its own and all deeper ones",
    joint=True,
)
class ReviewKD(nn.Module):
    """The term ``reviewkd``: one network over all levels, named from the largest map to the smallest."""

    reads = ("aligned",)

    def __init__(self, pairs: Sequence[LayerPair], width: int = 512) -> None:
        super().__init__()
        if int(width) != width or width < 1:
            raise ValueError(f"reviewkd: width must be a whole number of at least 1, not {width}")
        width = min(int(width), max(pair.student_channels for pair in pairs))
        self.fusions = nn.ModuleList(
            Fusion(pair.student_channels, width, pair.teacher_channels, pair is pairs[-1]) for pair in pairs
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], shared: Sequence[Shared]) -> list[Tensor]:
        """Return the value of each level, in their order."""
        sizes = [tuple(maps.shape[2:]) for maps in student]
        if any(after[0] > before[0] or after[1] > before[1] for before, after in itertools.pairwise(sizes)):
            raise ValueError("reviewkd: name its levels from the largest map to the smallest")
        values, below = [], None
        for fusion, mine, theirs, share in reversed(list(zip(self.fusions, student, teacher, shared))):
            found, below = fusion(mine, below)
            values.append(hcl_loss(found, theirs, share))
        return values[::-1]
