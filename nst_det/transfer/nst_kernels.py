"""MMD^2 between normalized channel maps, and its gradient, in the fewest products and in bounded memory.

Value and gradient are computed together, a few images at a time, so that nothing of a map's size is kept but the
gradient itself.  What makes it cheap:

- For the kernel (x'y)^2 the sum over C x C kernel values equals a squared distance of two N x N Gram matrices over the
  positions; the side with fewer operations is taken.
- On the C x C side maps are not normalized: products of raw maps are scaled instead, and the derivative of the
  normalization is folded into the C x C matrices, so that the gradient is a matrix times the raw maps.
- Where maps are smaller than C x C matrices, it is the maps that are scaled.
- What depends on the teacher alone is computed once for all students.

Legend of the shape suffixes: B images of the batch, b of a chunk, S and T channels of student and teacher, N = H*W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nst_det.transfer.products import ROWS, gram, product, rows_at_a_time, sum_of_products
from nst_det.transfer.tensors import EPS, Shared, full_precision

KERNELS = ("linear", "poly", "gaussian")

# Temporary tensors of one chunk stay below this many bytes, or belong to a single image.  On the CPU a chunk should
# fit into the cache; on an accelerator the number of launches counts more.
CPU_LIMIT = 2 * 2**20
DEVICE_LIMIT = 256 * 2**20

# (maps of a chunk, what it takes of the teacher, where the gradient goes or None) to the values of the images and the
# factor of each channel's gradient
Step = Callable[..., tuple[Tensor, Tensor]]

# sigma^2 lies in [0, 2] for unit vectors; below this all channels are one map and what is left is rounding
SMALLEST_BANDWIDTH = 1e-3


def mmd(
    student_BSN: Tensor,
    teacher_BTN: Tensor,
    kernel: str,
    shared: Shared,
    with_gradient: bool,
    limit: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Batch mean of MMD^2 and, if wanted, its gradient with respect to the student's maps, in two factors.

    Args:
        student_BSN: raw maps of any floating type; computed in float32 (float64 stays).
        teacher_BTN: raw maps at the same positions.
        kernel: one of ``KERNELS``.
        shared: keeps the teacher's part.
        with_gradient: whether the gradient is wanted.
        limit: bytes for the temporary tensors of a chunk; by default what suits the device.

    Returns:
        A scalar >= 0; a tensor like the student's maps; (B, S), by which each channel of it is still to be
        multiplied (the caller multiplies by the outer gradient anyway).  The last two are None if not wanted.
    """
    s, (batch, t, n) = student_BSN.shape[1], teacher_BTN.shape
    if limit is None:
        # torch.compile unrolls the loop over chunks, so these should be few there
        small = student_BSN.device.type == "cpu" and not torch.compiler.is_compiling()
        limit = CPU_LIMIT if small else DEVICE_LIMIT
    step, floats = _plan(kernel, s, t, n)
    per_teacher = _teacher_side(step, teacher_BTN, shared, limit)
    # fp16 can't hold a gradient that no loss scaler has scaled yet
    keep = torch.float32 if student_BSN.dtype == torch.float16 else student_BSN.dtype
    gradient = torch.empty_like(student_BSN, dtype=keep) if with_gradient else None
    values, factors = [], []
    for part in _chunks(batch, floats * 4, limit):
        s_bSN = full_precision(student_BSN[part])
        out = None if gradient is None else gradient[part]
        exact = out if out is None or out.dtype == s_bSN.dtype else torch.empty_like(s_bSN)
        value_b, factor_bS = step(s_bSN, *(x[part] for x in per_teacher), exact)
        values.append(value_b)
        factors.append(factor_bS)
        if out is not None and exact is not None and exact is not out:
            out.copy_(exact)
    # where both sets are equal, rounding can leave -1e-8 on the C x C side
    value = torch.cat(values).mean().clamp_min(0).to(s_bSN.dtype)
    return value, gradient, None if gradient is None else torch.cat(factors) / batch


def positions_side_is_cheaper(student_channels: int, teacher_channels: int, positions: int) -> bool:
    """Whether N x N Gram matrices take fewer operations than the C x C kernel matrices."""
    s, t = student_channels, teacher_channels
    return positions * (s + t) < s * s + t * t + s * t


def _plan(kernel: str, s: int, t: int, n: int) -> tuple[Step, int]:
    """The way to compute a chunk, and the floats of temporary tensors that an image takes."""
    if kernel == "linear":
        return _linear, s * n
    if kernel == "poly":
        if positions_side_is_cheaper(s, t, n):
            return _poly_by_positions, 2 * s * n + 2 * n * n
        return _poly_by_channels, 2 * s * (s + t)
    if (s + t) * n > 2 * (s * s + s * t + t * t):
        return _gaussian_by_scaled_products, 4 * s * (s + t)
    return _gaussian_by_scaled_maps, 3 * (s + t) * n + s * (s + t) + min(ROWS, t) * t


def _teacher_side(step: Step, maps_BTN: Tensor, shared: Shared, limit: int) -> tuple[Tensor, ...]:
    """What ``step`` takes of the teacher, each of it computed once a batch."""

    def once(name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        per_image = 4 * sum(x[0].numel() for x in inputs)
        parts = _chunks(len(maps_BTN), per_image, limit)
        return shared(name, lambda: torch.cat([compute(*(full_precision(x[part]) for x in inputs)) for part in parts]))

    if step is _poly_by_positions:
        return (once("gram", _gram_over_positions, maps_BTN),)
    scale_BT = once("scale", _inverse_norm, maps_BTN)
    if step is _poly_by_channels:
        return maps_BTN, scale_BT, once("poly", _mean_square_product, maps_BTN, scale_BT)
    mean_BN = once("mean", _mean_of_normalized, maps_BTN, scale_BT)
    if step is _linear:
        return (mean_BN,)
    if step is _gaussian_by_scaled_products:
        return maps_BTN, scale_BT, mean_BN, once("products", _products, maps_BTN, scale_BT)
    return maps_BTN, scale_BT, mean_BN


def _chunks(batch: int, bytes_per_image: int, limit: int) -> list[slice]:
    count = max(1, limit // max(1, bytes_per_image))
    return [slice(start, min(start + count, batch)) for start in range(0, batch, count)]


def _inverse_norm(x_bCN: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(x_bCN, dim=2).square() + EPS).rsqrt()


def _mean_of_normalized(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    return (scale_bC[:, None] @ x_bCN)[:, 0] / x_bCN.shape[1]


def _gram_over_positions(x_bCN: Tensor) -> Tensor:
    unit_bNC = (x_bCN * _inverse_norm(x_bCN)[:, :, None]).mT
    return product(unit_bNC, unit_bNC).div_(x_bCN.shape[1])


def _products(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    return gram(x_bCN).mul_(scale_bC[:, :, None]).mul_(scale_bC[:, None])


def _products_and_scale(x_bCN: Tensor) -> tuple[Tensor, Tensor]:
    """Products of normalized maps, and the inverse norms, which stand on the diagonal already."""
    products_bCC = gram(x_bCN)
    scale_bC = (products_bCC.diagonal(dim1=1, dim2=2) + EPS).rsqrt()
    return products_bCC.mul_(scale_bC[:, :, None]).mul_(scale_bC[:, None]), scale_bC


def _cross(s_bSN: Tensor, t_bTN: Tensor, scale_bS: Tensor, scale_bT: Tensor) -> Tensor:
    return product(s_bSN, t_bTN).mul_(scale_bS[:, :, None]).mul_(scale_bT[:, None])


def _upper_rows(left_bCN: Tensor, right_bCN: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Blocks of rows of the symmetric ``left right'``, from the diagonal on, and their number of rows."""
    at_a_time = rows_at_a_time(left_bCN)
    for start in range(0, left_bCN.shape[1], at_a_time):
        rows_brN = left_bCN[:, start : start + at_a_time]
        yield product(rows_brN, right_bCN[:, start:]), rows_brN.shape[1]


def _mean_square_product(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    total, start = _wide(x_bCN.new_zeros(len(x_bCN))), 0
    for block, rows in _upper_rows(x_bCN, x_bCN):
        block.mul_(scale_bC[:, start : start + rows, None]).mul_(scale_bC[:, None, start:])
        total = total + 2 * _sum_of_squares(block) - _sum_of_squares(block[:, :, :rows])
        start += rows
    return total / x_bCN.shape[1] ** 2


def _sum_of_squares(x: Tensor) -> Tensor:
    return _wide(torch.linalg.vector_norm(x, dim=(1, 2))).square()


def _wide(x: Tensor) -> Tensor:
    # the three terms nearly cancel, so their sums are kept in float64 where the device has it
    return x if x.device.type == "mps" else x.double()


def _linear(s_bSN: Tensor, mean_bN: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    s = s_bSN.shape[1]
    inverse_bS = _inverse_norm(s_bSN)
    difference_b1N = torch.baddbmm(mean_bN[:, None], inverse_bS[:, None], s_bSN, beta=-1, alpha=1 / s)
    if out is not None:
        radial_bS1 = (s_bSN @ difference_b1N.mT) * inverse_bS.square()[:, :, None]
        torch.addcmul(difference_b1N, s_bSN, radial_bS1, value=-1, out=out)
    return difference_b1N.square().sum((1, 2)), inverse_bS * (2 / s)


def _poly_by_positions(s_bSN: Tensor, gram_bNN: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    s = s_bSN.shape[1]
    inverse_bS = _inverse_norm(s_bSN)
    unit_bSN = s_bSN * inverse_bS[:, :, None]
    difference_bNN = product(unit_bSN.mT, unit_bSN.mT).div_(s).sub_(gram_bNN)
    if out is not None:
        out.copy_(product(unit_bSN, difference_bNN))
        radial_bS = (out * unit_bSN).sum(2)
        out.addcmul_(unit_bSN, radial_bS[:, :, None], value=-1)
    return torch.linalg.vector_norm(difference_bNN, dim=(1, 2)).square(), inverse_bS * (4 / s)


def _poly_by_channels(
    s_bSN: Tensor, t_bTN: Tensor, scale_bT: Tensor, term_b: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    s, t_bTN = s_bSN.shape[1], full_precision(t_bTN)
    t = t_bTN.shape[1]
    own_bSS, inverse_bS = _products_and_scale(s_bSN)
    cross_bST = _cross(s_bSN, t_bTN, inverse_bS, scale_bT)
    rows_own = torch.linalg.vector_norm(own_bSS, dim=2).square()
    rows_cross = torch.linalg.vector_norm(cross_bST, dim=2).square()
    if out is not None:
        weight_own, weight_cross = 4 / s**2, -4 / (s * t)
        diagonal_bS = -(weight_own * rows_own + weight_cross * rows_cross)
        own_bSS.mul_(weight_own)
        cross_bST.mul_(weight_cross)
        _pull_back(out, own_bSS, cross_bST, diagonal_bS, s_bSN, t_bTN, inverse_bS, scale_bT)
    return _three_terms(term_b, rows_own, rows_cross, t), torch.ones_like(inverse_bS)


def _three_terms(term_b: Tensor, rows_own_bS: Tensor, rows_cross_bS: Tensor, t: int) -> Tensor:
    own_b, cross_b = _wide(rows_own_bS).sum(1), _wide(rows_cross_bS).sum(1)
    s = rows_own_bS.shape[1]
    return term_b + own_b / s**2 - cross_b * 2 / (s * t)


def _pull_back(
    out: Tensor,
    own_bSS: Tensor,
    cross_bST: Tensor,
    diagonal_bS: Tensor,
    s_bSN: Tensor,
    t_bTN: Tensor,
    inverse_bS: Tensor,
    scale_bT: Tensor,
) -> None:
    """``out = (own + diag) s + cross t`` for normalized maps, written for the raw ones; overwrites both matrices."""
    own_bSS.diagonal(dim1=1, dim2=2).add_(diagonal_bS)
    own_bSS.mul_(inverse_bS[:, :, None]).mul_(inverse_bS[:, None])
    cross_bST.mul_(inverse_bS[:, :, None]).mul_(scale_bT[:, None])
    sum_of_products(own_bSS, s_bSN, cross_bST, t_bTN, out)


def _bandwidth(mean_s_bN: Tensor, mean_t_bN: Tensor, norms_bS: Tensor, norms_bT: Tensor) -> Tensor:
    """Mean squared distance over all pairs of the joint set, per image, from its mean alone."""
    s, t = norms_bS.shape[1], norms_bT.shape[1]
    mean_norm_b = (norms_bS.sum(1) + norms_bT.sum(1)) / (s + t)
    mean_bN = (mean_s_bN * s + mean_t_bN * t) / (s + t)
    return (2 * (mean_norm_b - mean_bN.square().sum(1))).clamp_min(SMALLEST_BANDWIDTH)


def _squared_norms(inverse_bC: Tensor) -> Tensor:
    # q / (q + eps), where inverse = 1 / sqrt(q + eps)
    return 1 - EPS * inverse_bC.square()


def _gaussian_by_scaled_products(
    s_bSN: Tensor,
    t_bTN: Tensor,
    scale_bT: Tensor,
    mean_bN: Tensor,
    products_bTT: Tensor,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    s, t_bTN = s_bSN.shape[1], full_precision(t_bTN)
    t = t_bTN.shape[1]
    # by the same sums as the teacher's, since a small bandwidth magnifies what rounding makes of equal maps
    inverse_bS = _inverse_norm(s_bSN)
    products_own = _products(s_bSN, inverse_bS)
    norms_bS, norms_bT = _squared_norms(inverse_bS), _squared_norms(scale_bT)
    variance_b11 = _bandwidth(_mean_of_normalized(s_bSN, inverse_bS), mean_bN, norms_bS, norms_bT)[:, None, None]

    def kernel(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return torch.exp(((products - left[:, :, None] / 2).sub_(right[:, None] / 2)).div_(variance_b11))

    products_cross = _cross(s_bSN, t_bTN, inverse_bS, scale_bT)
    own_bSS, cross_bST = kernel(products_own, norms_bS, norms_bS), kernel(products_cross, norms_bS, norms_bT)
    rows_own, rows_cross = own_bSS.sum(2), cross_bST.sum(2)
    if out is not None:
        own_bSS.mul_(2 / s**2 / variance_b11)
        cross_bST.mul_(-2 / (s * t) / variance_b11)
        diagonal_bS = -own_bSS.sum(2) - cross_bST.sum(2)
        radial_bS = (own_bSS * products_own).sum(2) + (cross_bST * products_cross).sum(2) + diagonal_bS * norms_bS
        _pull_back(out, own_bSS, cross_bST, diagonal_bS - radial_bS, s_bSN, t_bTN, inverse_bS, scale_bT)
    term_b = _wide(kernel(products_bTT, norms_bT, norms_bT)).mean((1, 2))
    return _three_terms(term_b, rows_own, rows_cross, t), torch.ones_like(inverse_bS)


def _gaussian_by_scaled_maps(
    s_bSN: Tensor, t_bTN: Tensor, scale_bT: Tensor, mean_bN: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    s, n = s_bSN.shape[1:]
    t = t_bTN.shape[1]
    inverse_bS = _inverse_norm(s_bSN)
    norms_bS, norms_bT = _squared_norms(inverse_bS), _squared_norms(scale_bT)
    variance_b = _bandwidth(_mean_of_normalized(s_bSN, inverse_bS), mean_bN, norms_bS, norms_bT)
    root_b11 = variance_b.rsqrt()[:, None, None]

    def extended(x_bCN: Tensor, inverse_bC: Tensor, norms_bC: Tensor) -> tuple[Tensor, Tensor]:
        # two more columns, so that one product gives -|x - y|^2 / (2 sigma^2) itself
        half_bC1 = norms_bC[:, :, None] / (-2 * variance_b[:, None, None])
        scaled_bCN = x_bCN * (inverse_bC[:, :, None] * root_b11)
        ones = torch.ones_like(half_bC1)
        return torch.cat([scaled_bCN, half_bC1, ones], 2), torch.cat([scaled_bCN, ones, half_bC1], 2)

    left_s, right_s = extended(s_bSN, inverse_bS, norms_bS)
    left_t, right_t = extended(full_precision(t_bTN), scale_bT, norms_bT)
    own_bSS, cross_bST = product(left_s, right_s).exp_(), product(left_s, right_t).exp_()
    rows_own, rows_cross = own_bSS.sum(2), cross_bST.sum(2)
    if out is not None:
        weight_own, weight_cross = 2 / s**2, -2 / (s * t)
        scaled_bSN = left_s[:, :, :n]
        out.baddbmm_(own_bSS, scaled_bSN, beta=0, alpha=weight_own)
        out.baddbmm_(cross_bST, left_t[:, :, :n], alpha=weight_cross)
        out.addcmul_(scaled_bSN, (weight_own * rows_own + weight_cross * rows_cross)[:, :, None], value=-1)
        radial_bS = (out * scaled_bSN).sum(2) * variance_b[:, None]
        out.addcmul_(scaled_bSN, radial_bS[:, :, None], value=-1)
    total_b = _wide(s_bSN.new_zeros(len(s_bSN)))
    for block, rows in _upper_rows(left_t, right_t):
        block.exp_()
        total_b = total_b + 2 * _wide(block.sum((1, 2))) - _wide(block[:, :, :rows].sum((1, 2)))
    return _three_terms(total_b / t**2, rows_own, rows_cross, t), inverse_bS * root_b11[:, :, 0]
