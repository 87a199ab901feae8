"""DIST: class probabilities linearly related, of an image and of a class (Huang et al. 2022, arXiv 2205.10536)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.kd import soft_targets
from nst_det.losses.ops import Shared, check_factors, check_temperature, compute_now, full_precision, unit
from nst_det.losses.registry import LayerPair, register_term

# of probabilities, which are small where there are many classes
EPS = 1e-12


def correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return Pearson's r of (B, K) and (B, K) along ``dim``, mean over the other dimension."""
    x, y = (unit(value - value.mean(dim, keepdim=True), dim, EPS) for value in (x, y))
    return (x * y).sum(dim).mean()


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: float = 1.0,
    shared: Shared = compute_now,
) -> Tensor:
    """``T^2 (inter (1 - r over the classes of an image) + intra (1 - r over the images of a class))`` of logits (B, K).

    r is Pearson's, of probabilities softened by the ``temperature`` T.  Means over images and classes; a scalar in
    [0, 2 T^2 (inter + intra)], 0 for an empty batch.
    """
    target = soft_targets("dist", student, teacher, temperature, shared).exp()
    if not len(student):
        return full_precision(student).sum() * 0
    found = F.softmax(full_precision(student) / temperature, dim=1)
    loss = inter * (1 - correlation(found, target, 1)) + intra * (1 - correlation(found, target, 0))
    return loss * temperature**2


@register_term(
    "dist",
    level="logits",
    weight=2.0,
    source="the DIST paper's beta = gamma = 2 (not verified); the authors' code for segmentation has 1",
    summary="the class probabilities up to scale and shift, of an image and of a class",
)
class DIST(nn.Module):
    """The term ``dist``."""

    reads = ("kd",)

    def __init__(self, pair: LayerPair, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature("dist", temperature)
        check_factors("dist", inter=inter, intra=intra)
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return dist_loss(student, teacher, self.inter, self.intra, self.temperature, shared)
