"""SP: which images of the batch have similar maps (Tung, Mori 2019, arXiv 1907.09682)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, aligned, compute_now, unit
from nst_det.losses.registry import LayerPair, register_term


def similarity(maps: Tensor) -> Tensor:
    """Return the products of all pairs of images of (B, C, H, W), each row a unit vector: (B, B)."""
    rows = maps.flatten(1)
    return unit(rows @ rows.T)


def sp_loss(student: Tensor, teacher: Tensor, shared: Shared = compute_now) -> Tensor:
    """Mean squared difference of the similarity of maps (B, C_S, H, W) and (B, C_T, H', W'), over the B x B pairs.

    The larger map is averaged down; a scalar in [0, 4 / B].  No gradient goes to the teacher.
    """
    small, large = aligned(student, teacher, shared)
    return F.mse_loss(similarity(small), shared(("sp", tuple(large.shape[2:])), lambda: similarity(large)))


@register_term(
    "sp",
    level="maps",
    weight=3000.0,
    source="RepDistiller (beta 3000)",
    summary="which images of the batch have similar maps",
)
class SP(nn.Module):
    """The term ``sp``."""

    # the similarity is the batch's, no image has it by itself
    reads = ("aligned",)

    def __init__(self, pair: LayerPair) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return sp_loss(student, teacher, shared)
