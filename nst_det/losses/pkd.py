"""PKD: each channel is linearly related to the teacher's (Cao et al. 2022, arXiv 2207.02039)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import EPS, Shared, aligned, compute_now
from nst_det.losses.registry import LayerPair, register_term


def standardize(maps: Tensor) -> Tensor:
    """Return maps (B, C, H, W) of which each channel has mean 0 and variance 1 over batch and positions."""
    mean = maps.mean((0, 2, 3), keepdim=True)
    count = max(1, maps.numel() // maps.shape[1] - 1)
    # unbiased, and 1e-6 more, so that a constant channel gives zeros and a finite gradient
    variance = (maps - mean).square().sum((0, 2, 3), keepdim=True) / count
    return (maps - mean) * (variance + EPS).rsqrt()


def pkd_loss(student: Tensor, teacher: Tensor, shared: Shared = compute_now) -> Tensor:
    """Half the mean squared difference of the standardized maps: 1 - Pearson's r, averaged over the channels.

    Maps are (B, C, H, W) and (B, C, H', W'), the larger one is averaged down; a scalar in [0, 2] that doesn't change
    under a positive scale and a shift of a channel.  No gradient goes to the teacher; ``shared`` keeps its part.
    """
    small, large = aligned(student, teacher, shared, same_channels=True)
    target = shared(("pkd", tuple(large.shape[2:])), lambda: standardize(large))
    return F.mse_loss(standardize(small), target) / 2


@register_term(
    "pkd",
    level="maps",
    weight=6.0,
    source="mmrazor, two-stage detectors on FPN p2..p5 (6 a level)",
    summary="each channel up to scale and shift",
)
class PKD(nn.Module):
    """The term ``pkd``."""

    # what is standardized over the batch no image has by itself
    reads = ("aligned",)

    def __init__(self, pair: LayerPair) -> None:
        super().__init__()
        if pair.student_channels != pair.teacher_channels:
            raise ValueError(
                f"pkd compares channel by channel, but {pair.label} has {pair.student_channels} in the student and "
                f"{pair.teacher_channels} in the teacher; take FPN levels, or cwd, fitnet or nst-poly"
            )

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return pkd_loss(student, teacher, shared)
