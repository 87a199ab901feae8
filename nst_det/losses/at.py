"""AT: where the channels' energy sits (Zagoruyko, Komodakis 2017, arXiv 1612.03928, activation-based)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, at_size, check_maps, common_size, compute_now, teacher_at, unit
from nst_det.losses.registry import LayerPair, register_term

# Far smaller than on a sum of squares, since this is on one of fourth powers; the gradient at zero is 0 all the same.
EPS = 1e-12


def attention(maps: Tensor, power: float = 2.0) -> Tensor:
    """``mean_c |f|^p`` over the channels as a unit vector over positions: (B, C, H, W) to (B, H*W)."""
    energy = maps.square() if power == 2 else maps.abs().pow(power)
    return unit(energy.mean(1).flatten(1), eps=EPS)


def at_loss(student: Tensor, teacher: Tensor, power: float = 2.0, shared: Shared = compute_now) -> Tensor:
    """Mean squared difference of the attention of maps (B, C_S, H, W) and (B, C_T, H', W'), over positions and batch.

    A scalar in [0, 4 / (H*W)] that doesn't change when a map is scaled; ``power`` is p >= 1.  No gradient goes to the
    teacher; ``shared`` keeps its attention for other students.
    """
    check_maps(student, teacher)
    size = common_size(student, teacher)
    wanted = shared(("attention", power, size), lambda: attention(teacher_at(size, teacher, shared), power))
    return F.mse_loss(attention(at_size(student, size), power), wanted)


@register_term(
    "at",
    level="maps",
    weight=1000.0,
    source="the AT authors' code and RepDistiller (beta 1000)",
    summary="where the energy of all channels sits",
)
class AT(nn.Module):
    """The term ``at``."""

    reads = ("attention",)

    def __init__(self, pair: LayerPair, power: float = 2.0) -> None:
        super().__init__()
        if power < 1:
            raise ValueError(f"at: power must be at least 1, not {power}")
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return at_loss(student, teacher, self.power, shared)
