"""AT: where the channels' energy sits (Zagoruyko, Komodakis 2017, arXiv 1612.03928, activation-based)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, at_size, check_maps, common_size, compute_now, teacher_at, unit
from nst_det.losses.registry import LayerPair, LossSpec, register_term

# On a sum of fourth powers of activations, so it must be far smaller than on a sum of squares; the gradient at zero
# is 0 all the same, because |f|^p with p > 1 is flat there.
EPS = 1e-12


def attention(maps: Tensor, power: float = 2.0) -> Tensor:
    """``mean_c |f|^p`` over the channels as a unit vector over positions: (B, C, H, W) to (B, H*W)."""
    energy = maps.square() if power == 2 else maps.abs().pow(power)
    return unit(energy.mean(1).flatten(1), eps=EPS)


def at_loss(student: Tensor, teacher: Tensor, power: float = 2.0, shared: Shared = compute_now) -> Tensor:
    """Mean squared difference of the two attention vectors, over positions and batch.

    Args:
        student: map (B, C_S, H, W).
        teacher: map (B, C_T, H', W'), of any channel count; no gradient goes there.
        power: p >= 1.
        shared: keeps the teacher's attention for other students.

    Returns:
        A scalar in [0, 4 / (H*W)]; it doesn't change when a map is scaled.
    """
    check_maps(student, teacher)
    size = common_size(student, teacher)
    wanted = shared(("attention", power, size), lambda: attention(teacher_at(size, teacher, shared), power))
    return F.mse_loss(attention(at_size(student, size), power), wanted)


class AT(nn.Module):
    """The term ``at``."""

    reads = ("attention",)

    def __init__(self, pair: LayerPair, power: float = 2.0) -> None:
        super().__init__()
        if power < 1:
            raise ValueError(f"at: power must be at least 1, not {power}")
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """Maps (B, C_S, H, W) and (B, C_T, H', W') to a scalar."""
        return at_loss(student, teacher, self.power, shared)


register_term(
    LossSpec(
        name="at",
        level="maps",
        weight=1000.0,
        source="the AT authors' code and RepDistiller (beta 1000)",
        summary="where the energy of all channels sits",
        build=AT,
        options={"power": 2.0},
    )
)
