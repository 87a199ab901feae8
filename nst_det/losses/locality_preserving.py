"""LP, locality preserving: the teacher's neighbors are the student's (Chen et al. 2018, arXiv 1812.06597).

The paper's own text and code could not be read.  The form of the loss is known from notes and re-implementations;
k, sigma and the weight are therefore defaults of ours.
"""

from torch import Tensor, nn

from nst_det.losses.ops import Shared, compute_now, full_precision
from nst_det.losses.registry import OUTPUT, LayerPair, register_term

NEIGHBORS_SIGMA = "neighbors"
SMALLEST_VARIANCE = 1e-12


def neighbor_weights(teacher: Tensor, k: int, sigma: float | str) -> tuple[Tensor, Tensor]:
    """Return the k nearest samples of each in an embedding (B, D), indices (B, k), and weights exp(-d^2 / sigma^2)."""
    embedding = full_precision(teacher)
    # centering changes no distance and keeps the digits that a common offset would eat
    embedding = embedding - embedding.mean(0)
    squares = embedding.square().sum(1)
    distance = (squares[:, None] + squares - 2 * embedding @ embedding.T).clamp_min(0)
    distance.fill_diagonal_(float("inf"))
    nearest = distance.topk(min(k, len(teacher) - 1), dim=1, largest=False)
    if sigma == NEIGHBORS_SIGMA:
        return nearest.indices, (-nearest.values / nearest.values.mean().clamp_min(SMALLEST_VARIANCE)).exp()
    return nearest.indices, (-nearest.values / float(sigma) ** 2).exp()


def lp_loss(
    student: Tensor, teacher: Tensor, k: int = 5, sigma: float | str = NEIGHBORS_SIGMA, shared: Shared = compute_now
) -> Tensor:
    """``1/B sum_i sum_{j in N_k(i)} alpha_ij |s_i - s_j|^2`` of embeddings (B, D_S) and (B, D_T): a scalar >= 0.

    The ``k`` neighbors of a sample and alpha come from the teacher; ``sigma`` is a length, or ``neighbors``: sigma^2 is
    the batch mean of the squared distances to the neighbors.  A single sample has the value 0.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(f"lp needs embeddings (B, D) of one B, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    x = full_precision(student)
    if len(x) < 2:
        return x.sum() * 0
    indices, weights = shared(("lp", k, sigma), lambda: neighbor_weights(teacher.detach(), k, sigma))
    return (weights * (x[:, None] - x[indices]).square().sum(2)).sum() / len(x)


@register_term(
    "lp",
    level="embedding",
    weight=0.001,
    source="docs/study_fitnet_nst.md, where 0.01 and above did harm; the paper's isn't known, k and sigma are ours",
    summary="which samples of the batch are neighbors",
)
class LP(nn.Module):
    """The term ``lp``."""

    # neighbors are found among the batch, so no image has them by itself
    reads = (OUTPUT,)

    def __init__(self, pair: LayerPair, k: int = 5, sigma: float | str = NEIGHBORS_SIGMA) -> None:
        super().__init__()
        if int(k) != k or k < 1:
            raise ValueError(f"lp: k must be a whole number of at least 1, not {k}")
        if sigma != NEIGHBORS_SIGMA and not (isinstance(sigma, int | float) and sigma > 0):
            raise ValueError(f"lp: sigma must be '{NEIGHBORS_SIGMA}' or a number above 0, not {sigma!r}")
        self.k, self.sigma = int(k), sigma

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return lp_loss(student, teacher, self.k, self.sigma, shared)
