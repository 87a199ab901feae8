"""FitNet hints: the student's map, through a trained regressor, equals the teacher's (arXiv 1412.6550)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, aligned, checked_grid, compute_now, gridded, spread
from nst_det.losses.registry import LayerPair, register_term

REGRESSORS = ("conv", "conv-bn-relu")


def hint_loss(student: Tensor, teacher: Tensor, shared: Shared = compute_now) -> Tensor:
    """Mean squared difference of two maps (B, C, H, W) of equal C, the larger pooled down; a scalar."""
    small, target = aligned(student, teacher, shared, same_channels=True)
    return F.mse_loss(small, target)


@register_term(
    "fitnet",
    level="maps",
    weight=100.0,
    source="RepDistiller (beta 100); the NST paper's 1e2 (not verified)",
    summary="the map itself, through a trained 1x1 convolution",
    vectors=True,
)
class FitNet(nn.Module):
    """The term ``fitnet``: a trained 1x1 regressor to the teacher's channels; for a vector to a grid."""

    reads = ("aligned",)

    def __init__(self, pair: LayerPair, regressor: str = "conv", grid: int = 4) -> None:
        super().__init__()
        if regressor not in REGRESSORS:
            raise ValueError(f"fitnet: regressor must be one of {', '.join(REGRESSORS)}, not '{regressor}'")
        plain = regressor == "conv"
        self.grid = checked_grid("fitnet", pair.vector, grid)
        conv = spread(pair.student_channels, pair.teacher_channels, self.grid, bias=plain)
        self.regressor = nn.Sequential(conv, *([] if plain else [nn.BatchNorm2d(pair.teacher_channels), nn.ReLU()]))

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        small, target = gridded(student, teacher, self.grid, shared)
        return F.mse_loss(self.regressor(small), target)
