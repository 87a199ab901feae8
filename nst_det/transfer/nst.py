"""NST: the distributions of the channels' maps agree (Huang, Wang 2017, arXiv 1707.01219).

Each channel's map, divided by its L2 norm over the positions, is one sample.  The loss is the squared maximum mean
discrepancy (MMD^2) between the C_T samples of the teacher and the C_S samples of the student, per image, with all
three terms, so that it is >= 0 and 0 for equal sets:

    MMD^2 = mean k(t_i, t_i') + mean k(s_j, s_j') - 2 mean k(t_i, s_j)

Shapes: B batch, C channels, N = H*W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nst_det.transfer.registry import Pair, Term, register_term
from nst_det.transfer.tensors import Shared, aligned, compute_now, unit

KERNELS = ("linear", "poly", "gaussian")


def nst_loss(student: Tensor, teacher: Tensor, kernel: str = "poly", shared: Shared = compute_now) -> Tensor:
    """MMD^2 between the normalized channel maps of student and teacher, mean over the batch.

    Args:
        student: map (B, C_S, H, W).
        teacher: map (B, C_T, H', W'); no gradient goes there.  The larger one is averaged down; C_T may differ.
        kernel: ``linear`` x'y, ``poly`` (x'y)^2, or ``gaussian`` exp(-|x - y|^2 / (2 sigma^2)) with sigma^2 the mean
            squared distance of all pairs of one image, a constant for the gradient.
        shared: keeps what is the teacher's alone for other students and kernels.

    Returns:
        A scalar >= 0, in float32 (float64 for float64 maps) whatever autocast says.

    Raises:
        ValueError: an unknown kernel, or shapes that aren't maps of one batch.

    Example:
        >>> maps = torch.rand(2, 8, 7, 7)
        >>> float(nst_loss(maps, maps))
        0.0
    """
    if kernel not in KERNELS:
        raise ValueError(f"nst: kernel must be one of {', '.join(KERNELS)}, not '{kernel}'")
    with torch.autocast(student.device.type, enabled=False):
        small, target = aligned(student, teacher, shared)
        size = tuple(target.shape[2:])
        s_BCN = unit(small.flatten(2))
        t_BCN = shared(("unit", size), lambda: unit(target.flatten(2)))
        if kernel == "linear":
            return _linear(s_BCN, t_BCN).mean()
        if kernel == "poly":
            return _poly(s_BCN, t_BCN, size, shared).mean()
        return _gaussian(s_BCN, t_BCN).mean()


def positions_side_is_cheaper(student_channels: int, teacher_channels: int, positions: int) -> bool:
    """Whether N x N Gram matrices take fewer operations than the C x C kernel matrices."""
    s, t = student_channels, teacher_channels
    return positions * (s + t) < s * s + t * t + s * t


def _linear(s_BCN: Tensor, t_BCN: Tensor) -> Tensor:
    return (s_BCN.mean(1) - t_BCN.mean(1)).square().sum(1)


def _poly(s_BCN: Tensor, t_BCN: Tensor, size: tuple[int, ...], shared: Shared) -> Tensor:
    if positions_side_is_cheaper(s_BCN.shape[1], t_BCN.shape[1], s_BCN.shape[2]):
        gram_t = shared(("gram", size), lambda: t_BCN.mT @ t_BCN / t_BCN.shape[1])
        return (s_BCN.mT @ s_BCN / s_BCN.shape[1] - gram_t).square().sum((1, 2))
    term_t = shared(("poly", size), lambda: (t_BCN @ t_BCN.mT).square().mean((1, 2)))
    term_s = (s_BCN @ s_BCN.mT).square().mean((1, 2))
    return _not_negative(term_t + term_s - 2 * (s_BCN @ t_BCN.mT).square().mean((1, 2)))


def _gaussian(s_BCN: Tensor, t_BCN: Tensor) -> Tensor:
    joint = torch.cat([s_BCN, t_BCN], 1)
    gram = joint @ joint.mT
    norms = gram.diagonal(dim1=1, dim2=2)
    distance = (norms[:, :, None] + norms[:, None, :] - 2 * gram).clamp_min(0)
    bandwidth = distance.detach().mean((1, 2), keepdim=True).clamp_min(1e-12)
    kernel = torch.exp(-distance / (2 * bandwidth))
    c = s_BCN.shape[1]
    terms = kernel[:, :c, :c].mean((1, 2)) + kernel[:, c:, c:].mean((1, 2)) - 2 * kernel[:, :c, c:].mean((1, 2))
    return _not_negative(terms)


def _not_negative(value: Tensor) -> Tensor:
    # rounding can leave -1e-8 where two sets are equal; the gradient there is right and stays
    return value + (value.clamp_min(0) - value).detach()


class NST(nn.Module):
    """The terms ``nst-linear``, ``nst-poly`` and ``nst-gaussian``."""

    def __init__(self, pair: Pair, kernel: str, center: bool = False, relu: bool = False) -> None:
        super().__init__()
        self.kernel, self.center, self.relu = kernel, center, relu

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """Maps (B, C_S, H, W) and (B, C_T, H', W') to a scalar."""
        if not (self.center or self.relu):
            return nst_loss(student, teacher, self.kernel, shared)
        key = ("nst", self.center, self.relu)
        prepared = shared(key, lambda: self._prepare(teacher.detach()))
        return nst_loss(self._prepare(student), prepared, self.kernel, lambda k, compute: shared((key, k), compute))

    def _prepare(self, maps: Tensor) -> Tensor:
        maps = maps.relu() if self.relu else maps
        return maps - maps.mean((2, 3), keepdim=True) if self.center else maps


def _register(kernel: str, weight: float, source: str, summary: str) -> None:
    register_term(
        Term(
            name=f"nst-{kernel}",
            level="maps",
            weight=weight,
            source=source,
            summary=summary,
            build=lambda pair, **options: NST(pair, kernel, **options),
            options={"center": False, "relu": False},
        )
    )


_register("linear", 50.0, "the NST paper's 5e1 as remembered", "the mean of the normalized channel maps")
_register("poly", 50.0, "the NST authors' code and RepDistiller (50)", "which positions are active together")
_register("gaussian", 100.0, "the NST paper's 1e2 as remembered", "the distribution of the normalized channel maps")
