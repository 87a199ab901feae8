"""LP, locality preserving: the teacher's neighbors are the student's (Chen et al. 2018, arXiv 1812.06597).

The paper's own text and code could not be read.  The form of the loss is known from notes and re-implementations;
k, sigma and the weight are therefore defaults of ours.
"""

from __future__ import annotations

from torch import Tensor, nn

from nst_det.losses.ops import Shared, compute_now, full_precision
from nst_det.losses.registry import OUTPUT, LayerPair, LossSpec, register_term

NEIGHBORS_SIGMA = "neighbors"
SMALLEST_VARIANCE = 1e-12


def neighbor_weights(teacher: Tensor, k: int, sigma: float | str) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest samples of each in the teacher's embedding, and their weights.

    Args:
        teacher: (B, D).
        k: at most B - 1 are found.
        sigma: a length, or ``neighbors``: sigma^2 is the batch mean of the squared distances to the neighbors.

    Returns:
        Indices (B, k) and weights ``exp(-d^2 / sigma^2)`` (B, k); a sample is not its own neighbor.
    """
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
    """``1/B sum_i sum_{j in N_k(i)} alpha_ij |s_i - s_j|^2``, neighbors and alpha from the teacher.

    Args:
        student: embedding (B, D_S).
        teacher: embedding (B, D_T) of the same samples; no gradient goes there.
        k: neighbors of each sample.
        sigma: see :func:`neighbor_weights`.
        shared: keeps neighbors and weights for other students.

    Returns:
        A scalar >= 0; 0 for a single sample.

    Raises:
        ValueError: the two aren't embeddings of one batch.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(f"lp needs embeddings (B, D) of one B, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    x = full_precision(student)
    if len(x) < 2:
        return x.sum() * 0
    indices, weights = shared(("lp", k, sigma), lambda: neighbor_weights(teacher.detach(), k, sigma))
    return (weights * (x[:, None] - x[indices]).square().sum(2)).sum() / len(x)


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
        """Embeddings (B, D_S) and (B, D_T) to a scalar."""
        return lp_loss(student, teacher, self.k, self.sigma, shared)


register_term(
    LossSpec(
        name="lp",
        level="embedding",
        weight=0.01,
        source="ours, like k and sigma: of the size of cross-entropy at the start; the paper's aren't known",
        summary="which samples of the batch are neighbors",
        build=LP,
        options={"k": 5, "sigma": NEIGHBORS_SIGMA},
    )
)
