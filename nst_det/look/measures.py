"""How near two sets of channel maps are: MMD, CKA, the nearest channel, and a plane to see them in.

Shapes: I images, C channels, N positions of all images together, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nst_det.errors import UserError
from nst_det.transfer import nst_loss
from nst_det.transfer.nst_kernels import KERNELS

# a channel whose norm is below this says nothing about where it is active
DEAD_NORM = 1e-3


def mmd(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """MMD^2 of the normalized channel maps, mean over the images, by kernel: the unweighted NST losses.

    Args:
        student: (I, C_S, H, W).
        teacher: (I, C_T, H', W').

    Returns:
        Values >= 0 for ``linear``, ``poly`` and ``gaussian``.

    Source: Huang & Wang 2017 (arXiv 1707.01219), equations 4 to 7.
    """
    return {kernel: float(nst_loss(student, teacher, kernel)) for kernel in KERNELS}


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centered kernel alignment of two representations of the same P points.

    With columns centered, ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms.  It needs many more points than channels:
    with fewer, any two representations are near 1.

    Args:
        first: (P, C).
        second: (P, D).

    Returns:
        0..1; NaN where one is the same at all points.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 3 and section 3.

    Example:
        >>> points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(points, 3 * points.flip(1) + 1), 6)
        1.0
    """
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    cross = torch.linalg.matrix_norm(y.T @ x).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def positions(maps: Tensor) -> Tensor:
    """Maps (I, C, H, W) as one point a position: (I * H * W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def unit_channels(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel over all images as a unit vector.

    Args:
        maps: (I, C, H, W).

    Returns:
        (C, I * H * W) of norm 1, zeros for a dead channel; and (C,) whether it is alive.
    """
    rows = maps.transpose(0, 1).flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    alive = norms >= DEAD_NORM
    return torch.where(alive[:, None], rows / norms.clamp_min(DEAD_NORM)[:, None], 0.0), alive


def nearest_channels(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """For each channel of the teacher the student's channel that is active at the most similar places.

    Args:
        teacher: (C_T, N) unit vectors.
        student: (C_S, N) unit vectors.

    Returns:
        (C_T,) index, and (C_T,) cosine -1..1.
    """
    cosine, index = (teacher @ student.T).max(dim=1)
    return index, cosine


def principal_plane(points: Tensor) -> tuple[Tensor, float]:
    """Points on the plane in which they spread most.

    Args:
        points: (P, N), at least two.

    Returns:
        (P, 2) coordinates, the longer axis first, each axis turned so that its farthest point is positive; and the part
        of the variance that lies in the plane, 0..1.
    """
    centered = points.double() - points.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centered, full_matrices=False)
    plane = torch.zeros(len(points), 2, dtype=torch.float64)
    found = (left * sizes)[:, :2]
    plane[:, : found.shape[1]] = found
    farthest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    share = sizes[:2].square().sum() / sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return plane * torch.where(farthest < 0, -1.0, 1.0), float(share)


def tsne_plane(points: Tensor, seed: int = 0) -> Tensor:
    """Points on a plane that keeps neighbors together (t-SNE), by scikit-learn.

    Args:
        points: (P, N), at least five.
        seed: of its random start.

    Returns:
        (P, 2).

    Raises:
        UserError: scikit-learn is not installed.

    Source: van der Maaten & Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("--tsne: scikit-learn is not installed; pip install 'nst_det[look]'") from error
    perplexity = min(30.0, (len(points) - 1) / 4)
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.float().numpy())
    return torch.from_numpy(found)
