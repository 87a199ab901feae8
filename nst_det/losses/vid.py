"""VID: the teacher's output is likely under a Gaussian that the student predicts (Ahn et al. 2019, arXiv 1904.05835).

The loss is ``-log q(t | s)`` without its constant.  The mean is a small trained network of the student's output, the
variance one trained number per channel (per class for logits).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, checked_grid, full_precision, gridded, spread
from nst_det.losses.registry import OUTPUT, LayerPair, register_term

NETWORKS = ("repdistiller", "bn", "linear")
# keeps the variance away from zero whatever its parameter does
EPS = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """``1/2 ((mean - target)^2 / variance + log variance)`` averaged over all elements: a scalar, maybe below 0.

    Mean and target are (B, C, ...), the variance of each channel is (C,).
    """
    per_channel = variance.view(1, -1, *[1] * (mean.dim() - 2))
    return 0.5 * ((mean - target).square() / per_channel + per_channel.log()).mean()


class ChannelVariance(nn.Module):
    """``softplus(alpha) + eps`` (C,), with one trained ``alpha`` per channel."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        if initial <= EPS:
            raise ValueError(f"vid: variance must be above {EPS}, not {initial}")
        # the inverse of softplus, as a large variance needs it
        start = initial - EPS
        self.alpha = nn.Parameter(torch.full((channels,), start + math.log(-math.expm1(-start))))

    def forward(self) -> Tensor:
        return F.softplus(self.alpha) + EPS


def mean_network(kind: str, student: int, teacher: int, grid: int = 0) -> nn.Module:
    """Return the network from the student's channels to the teacher's; for a grid its first layer takes a vector.

    ``repdistiller``: three 1x1 convolutions with ReLU between, no bias, as wide as the teacher's map; ``bn``: twice BN,
    ReLU, 1x1 convolution, hidden width 2 (C_S + C_T), by the workshop authors; ``linear``: one 1x1 convolution.
    """
    if kind not in NETWORKS:
        raise ValueError(f"vid: network must be one of {', '.join(NETWORKS)}, not '{kind}'")
    if kind == "linear":
        return spread(student, teacher, grid, bias=True)
    hidden = [teacher, teacher] if kind == "repdistiller" else [2 * (student + teacher)]
    layers: list[nn.Module] = []
    for before, after in pairwise([student, *hidden, teacher]):
        convolution = spread(before, after, 0 if layers else grid, bias=False)
        if kind == "bn":
            layers += [nn.BatchNorm2d(before), nn.ReLU(), convolution]
        else:
            layers += [convolution, nn.ReLU()]
    return nn.Sequential(*(layers if kind == "bn" else layers[:-1]))


@register_term(
    "vid",
    level="maps",
    weight=30.0,
    source="docs/study_fitnet_nst.md; RepDistiller's 1 was as good as none there, the paper's lambda isn't known",
    summary="how well the student's map predicts the teacher's, through a trained network",
    vectors=True,
)
class VID(nn.Module):
    """The term ``vid``, for maps; a student's vector predicts a grid of positions."""

    reads = ("aligned",)

    def __init__(self, pair: LayerPair, network: str = "repdistiller", variance: float = 5.0, grid: int = 4) -> None:
        super().__init__()
        self.grid = checked_grid("vid", pair.vector, grid)
        self.mean = mean_network(network, pair.student_channels, pair.teacher_channels, self.grid)
        self.variance = ChannelVariance(pair.teacher_channels, variance)

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        small, target = gridded(student, teacher, self.grid, shared)
        return gaussian_nll(self.mean(small), target, self.variance())


@register_term(
    "vid-logits",
    level="logits",
    student_kind="embedding",
    weight=1.0,
    source="ours: as for maps; the paper's lambda is not stated in any source found",
    summary="how well the student's embedding predicts the teacher's logits",
)
class VIDLogits(nn.Module):
    """The term ``vid-logits``: a linear mean from the student's embedding (B, D) to the teacher's logits (B, K)."""

    reads = (OUTPUT,)

    def __init__(self, pair: LayerPair, variance: float = 5.0) -> None:
        super().__init__()
        if not (pair.student_channels and pair.teacher_channels):
            raise ValueError("vid-logits: the widths of the student's embedding and the teacher's logits must be given")
        self.mean = nn.Linear(pair.student_channels, pair.teacher_channels)
        self.variance = ChannelVariance(pair.teacher_channels, variance)

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return gaussian_nll(self.mean(full_precision(student)), full_precision(teacher.detach()), self.variance())
