"""RKD: distances and angles among the embeddings of a batch (Park et al. 2019, arXiv 1904.05068)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nst_det.losses.ops import EPS, Shared, check_factors, compute_now, full_precision, unit
from nst_det.losses.registry import OUTPUT, LayerPair, register_term

# of angles or directions at once: 64 MiB in float32; all angles of a batch of 256
MOST_NUMBERS = 1 << 24


def _distances_from(x: Tensor, rows: slice) -> Tensor:
    return ((x[rows, None] - x).square().sum(2) + EPS).sqrt()


def distances(x: Tensor) -> Tensor:
    """Return the distances of all pairs of (B, D), divided by their mean over different samples: (B, B).

    Of more than :data:`MOST_NUMBERS` differences at once those of a few rows, which the backward pass computes again.
    """
    count = len(x)
    at_once = max(MOST_NUMBERS // x.numel(), 1)
    if at_once >= count:
        found = _distances_from(x, slice(None))
    else:
        found = torch.cat([_again_in_backward(_distances_from, x, rows) for rows in _slices(count, at_once)])
    found = found * (1 - torch.eye(count, dtype=x.dtype, device=x.device))
    return found / (found.sum() / (count * (count - 1)))


def _slices(count: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, count, at_once))


def _again_in_backward(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    found: Tensor = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return found


def angles(x: Tensor, corners: slice = slice(None)) -> Tensor:
    """Return the cosines of the angles at each of ``corners`` of (B, D) to all pairs of the others: (b, B, B)."""
    directions = unit(x[corners, None] - x)
    return directions @ directions.mT


def _at_corners(x: Tensor, y: Tensor, corners: slice) -> Tensor:
    return F.smooth_l1_loss(angles(x, corners), angles(y, corners), reduction="sum")


def angles_loss(x: Tensor, y: Tensor, shared: Shared) -> Tensor:
    """Return the mean Huber loss of all angles; of more than :data:`MOST_NUMBERS` at once those at a few corners.

    These are computed again in the backward pass, so that memory stays bounded; they are summed in another order.
    """
    count = len(x)
    at_once = MOST_NUMBERS // (count * max(count, x.shape[1], y.shape[1]))
    if at_once >= count:
        return F.smooth_l1_loss(angles(x), shared(("rkd", "angles"), lambda: angles(y)))
    parts = [_again_in_backward(_at_corners, x, y, corners) for corners in _slices(count, max(at_once, 1))]
    return torch.stack(parts).sum() / count**3


def rkd_loss(
    student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0, shared: Shared = compute_now
) -> Tensor:
    """``distance`` x Huber loss of distances + ``angle`` x that of angles, of embeddings (B, D_S) and (B, D_T).

    Means over all B^2 pairs and B^3 triples: a scalar >= 0, 0 for a single sample.  A factor of 0 leaves its part out.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(f"rkd needs embeddings (B, D) of one B, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    x, y = full_precision(student), full_precision(teacher.detach())
    loss = x.sum() * 0
    if len(x) < 2:
        return loss
    if distance:
        loss = loss + distance * F.smooth_l1_loss(distances(x), shared(("rkd", "distances"), lambda: distances(y)))
    if angle:
        loss = loss + angle * angles_loss(x, y, shared)
    return loss


@register_term(
    "rkd",
    level="embedding",
    weight=1.0,
    source="RepDistiller (beta 1; distance 25, angle 50 in it)",
    summary="distances and angles among the samples of the batch",
)
class RKD(nn.Module):
    """The term ``rkd``."""

    # pairs and triples are the batch's
    reads = (OUTPUT,)

    def __init__(self, pair: LayerPair, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        check_factors("rkd", distance=distance, angle=angle)
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return rkd_loss(student, teacher, self.distance, self.angle, shared)
