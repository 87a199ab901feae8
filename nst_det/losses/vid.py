"""VID: the teacher's output is likely under a Gaussian that the student predicts (Ahn et al. 2019, arXiv 1904.05835).

The loss is the negative log likelihood ``-log q(t | s)`` without its constant.  The mean is a small trained network of
the student's output, the variance one trained number per channel (per class for logits).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, checked_grid, full_precision, gridded, spread
from nst_det.losses.registry import OUTPUT, LayerPair, LossSpec, register_term

NETWORKS = ("repdistiller", "bn", "linear")
# keeps the variance away from zero whatever its parameter does
EPS = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """``1/2 ((mean - target)^2 / variance + log variance)``, averaged over all elements.

    Args:
        mean: (B, C, ...).
        target: the same shape.
        variance: (C,), above 0.

    Returns:
        A scalar; it can be negative.
    """
    per_channel = variance.view(1, -1, *[1] * (mean.dim() - 2))
    return 0.5 * ((mean - target).square() / per_channel + per_channel.log()).mean()


class ChannelVariance(nn.Module):
    """``softplus(alpha) + eps`` with one trained ``alpha`` per channel.

    ``alpha`` is a parameter like any other, so that it reaches the optimizer, the checkpoint and the device.
    """

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        if initial <= EPS:
            raise ValueError(f"vid: variance must be above {EPS}, not {initial}")
        self.alpha = nn.Parameter(torch.full((channels,), math.log(math.expm1(initial - EPS))))

    def forward(self) -> Tensor:
        """The variances (C,)."""
        return F.softplus(self.alpha) + EPS


def mean_network(kind: str, student: int, teacher: int, grid: int = 0) -> nn.Module:
    """The network from the student's channels to the teacher's.

    Args:
        kind: ``repdistiller`` three 1x1 convolutions with ReLU between, no bias, as wide as the teacher's map;
            ``bn`` twice BN, ReLU, 1x1 convolution, hidden width 2 (C_S + C_T), by the workshop authors;
            ``linear`` one 1x1 convolution with bias.
        student: C_S.
        teacher: C_T.
        grid: where it isn't 0 the student gives a vector: the first convolution spreads it over ``grid`` x ``grid``
            positions.

    Raises:
        ValueError: another kind.
    """
    if kind == "repdistiller":
        widths, layers = (student, teacher, teacher, teacher), list[nn.Module]()
        for before, after in pairwise(widths):
            layers += [spread(before, after, 0 if layers else grid, bias=False), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if kind == "bn":
        hidden = 2 * (student + teacher)
        layers = []
        for before, after in ((student, hidden), (hidden, teacher)):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), spread(before, after, 0 if layers else grid, bias=False)]
        return nn.Sequential(*layers)
    if kind == "linear":
        return spread(student, teacher, grid, bias=True)
    raise ValueError(f"vid: network must be one of {', '.join(NETWORKS)}, not '{kind}'")


class VID(nn.Module):
    """The term ``vid``, for maps; a student's vector predicts a grid of positions."""

    reads = ("aligned",)

    def __init__(self, pair: LayerPair, network: str = "repdistiller", variance: float = 5.0, grid: int = 4) -> None:
        super().__init__()
        self.grid = checked_grid("vid", pair.vector, grid)
        self.mean = mean_network(network, pair.student_channels, pair.teacher_channels, self.grid)
        self.variance = ChannelVariance(pair.teacher_channels, variance)

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """Maps (B, C_S, H, W) and (B, C_T, H', W') to a scalar."""
        small, target = gridded(student, teacher, self.grid, shared)
        return gaussian_nll(self.mean(small), target, self.variance())


class VIDLogits(nn.Module):
    """The term ``vid-logits``: a linear mean from the student's embedding to the teacher's logits."""

    reads = (OUTPUT,)

    def __init__(self, pair: LayerPair, variance: float = 5.0) -> None:
        super().__init__()
        self.mean = nn.Linear(pair.student_channels, pair.teacher_channels)
        self.variance = ChannelVariance(pair.teacher_channels, variance)

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """The student's embedding (B, D) and the teacher's logits (B, K) to a scalar."""
        return gaussian_nll(self.mean(full_precision(student)), full_precision(teacher.detach()), self.variance())


register_term(
    LossSpec(
        name="vid",
        level="maps",
        weight=1.0,
        source="RepDistiller (beta 1); the paper's lambda is not stated in any source found",
        summary="how well the student's map predicts the teacher's, through a trained network",
        build=VID,
        options={"network": "repdistiller", "variance": 5.0, "grid": 4},
        needs_widths=True,
        vectors=True,
    )
)
register_term(
    LossSpec(
        name="vid-logits",
        level="logits",
        student_level="embedding",
        weight=1.0,
        source="ours: as for maps; the paper's lambda is not stated in any source found",
        summary="how well the student's embedding predicts the teacher's logits",
        build=VIDLogits,
        options={"variance": 5.0},
        needs_widths=True,
    )
)
