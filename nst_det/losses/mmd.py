"""MMD^2 between normalized channel maps, and its gradient, in the fewest products and in bounded memory: a CPU's way.

A GPU's is in ``mmd_gpu.py``.  Value and gradient are computed together, a few images at a time, so that nothing of a
map's size is kept but the gradient itself.  What makes it cheap:

- For the kernel (x'y)^2 the sum over C x C kernel values equals a squared distance of two N x N Gram matrices over the
  positions; the side with fewer operations is taken.
- On the C x C side maps are not normalized: products of raw maps are scaled instead, and the derivative of the
  normalization is folded into the C x C matrices, so that the gradient is a matrix times the raw maps.
- Where maps are smaller than C x C matrices, it is the maps that are scaled.
- What depends on the teacher alone is computed once for all students.

Legend of the shape suffixes: B images of the batch, b of a chunk, S and T channels of student and teacher, J = S + T of
both, N = H*W.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from nst_det.losses.ops import EPS, Shared, full_precision
from nst_det.losses.products import ROWS, gram, product, product_minus, rows_at_a_time, sum_of_products

KERNELS = ("linear", "poly", "gaussian")

# temporary tensors of one chunk stay below this many bytes, to fit into the cache, or belong to a single image
LIMIT = 2 * 2**20

# (maps of a chunk, what it takes of the teacher, where the gradient goes or None) to the values of the images, and the
# factor of each channel's gradient: a tensor times a number
Step = Callable[..., tuple[Tensor, Tensor, float]]

# sigma^2 lies in [0, 2] for unit vectors; below this all channels are one map and what is left is rounding
SMALLEST_BANDWIDTH = 1e-3


def mmd(
    student_BSN: Tensor,
    t: int,
    teacher_BTN: Callable[[], Tensor],
    kernel: str,
    shared: Shared,
    with_gradient: bool,
    limit: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Batch mean of MMD^2 and, if wanted, its gradient with respect to the student's maps, in two factors.

    Args:
        student_BSN: raw maps of any floating type; computed in float32 (float64 stays).
        t: T.
        teacher_BTN: gives raw maps at the same positions; asked where ``shared`` hasn't what is computed of them.
        kernel: one of ``KERNELS``.
        shared: keeps the teacher's part.
        with_gradient: whether the gradient is wanted.
        limit: bytes for the temporary tensors of a chunk; by default what suits a CPU.

    Returns:
        A scalar >= 0; a tensor like the student's maps; (B, S), by which each channel of it is still to be
        multiplied (the caller multiplies by the outer gradient anyway).  The last two are None if not wanted.
    """
    batch, s, n = student_BSN.shape
    limit = LIMIT if limit is None else limit
    step, floats = _plan(kernel, s, t, n, min(ROWS, t))
    per_teacher = _teacher_side(step, teacher_BTN, shared, limit // max(1, 4 * t * n))
    # fp16 can't hold a gradient that no loss scaler has scaled yet
    keep = torch.float32 if student_BSN.dtype == torch.float16 else student_BSN.dtype
    gradient = torch.empty_like(student_BSN, dtype=keep) if with_gradient else None
    values, factors = [], []
    for s_bSN, out, *of_teacher in chunks(limit // max(1, 4 * floats), student_BSN, gradient, *per_teacher):
        s_bSN = full_precision(s_bSN)
        exact = out if out is None or out.dtype == s_bSN.dtype else torch.empty_like(s_bSN)
        value_b, factor_bS, constant = step(s_bSN, *of_teacher, exact)
        values.append(value_b)
        factors.append(factor_bS)
        if exact is not out:
            out.copy_(exact)
    value = joined(values).mean().to(s_bSN.dtype)
    return value, gradient, None if gradient is None else joined(factors).mul_(constant / batch)


def positions_side_is_cheaper(student_channels: int, teacher_channels: int, positions: int) -> bool:
    """Whether N x N Gram matrices take fewer operations than the C x C kernel matrices."""
    s, t = student_channels, teacher_channels
    return positions * (s + t) < s * s + t * t + s * t


def products_side_is_cheaper(student_channels: int, teacher_channels: int, positions: int) -> bool:
    """Whether ``gaussian`` takes less from products of raw maps than from maps that are scaled."""
    s, t = student_channels, teacher_channels
    return (s + t) * positions > 2 * (s * s + s * t + t * t)


def _plan(kernel: str, s: int, t: int, n: int, rows: int) -> tuple[Step, int]:
    """The way to compute a chunk, and the floats of temporary tensors of an image, ``rows`` of T x T among them."""
    if kernel == "linear":
        # no temporary tensor is as large as a map; chunks only keep the map in the cache
        return _linear, s * n // 2
    if kernel == "poly":
        if positions_side_is_cheaper(s, t, n):
            return _poly_by_positions, 2 * s * n + 2 * n * n
        return _poly_by_channels, s * (s + t)
    if products_side_is_cheaper(s, t, n):
        return _gaussian_by_scaled_products, 2 * s * (s + t) + t * t
    return _gaussian_by_scaled_maps, 3 * (s + t) * n + s * (s + t) + rows * t


def _teacher_side(step: Step, teacher: Callable[[], Tensor], shared: Shared, images: int) -> tuple[Tensor, ...]:
    """What ``step`` takes of the teacher, each of it computed once a batch, some images at a time."""

    def once(name: str, compute: Callable[..., Tensor], *more: Tensor) -> Tensor:
        def all_images() -> Tensor:
            return joined([compute(*map(full_precision, chunk)) for chunk in chunks(images, teacher(), *more)])

        found: Tensor = shared(name, all_images)
        return found

    if step is _poly_by_positions:
        return (once("gram", _gram_over_positions),)
    if step is _linear:
        return (once("mean", _mean_of_normalized),)
    maps_BTN, scale_BT = shared("maps", teacher), once("scale", _inverse_norm)
    if step is _poly_by_channels:
        return maps_BTN, scale_BT, once("poly", _mean_square_product, scale_BT)
    mean_B1N = once("mean", _mean_of_normalized, scale_BT)
    if step is _gaussian_by_scaled_products:
        return maps_BTN, scale_BT, mean_B1N, once("products", _products, scale_BT)
    return maps_BTN, scale_BT, mean_B1N


def chunks(count: int, *of_batch: Any) -> Iterable[tuple[Any, ...]]:
    """The tensors (or None in their place) ``count`` images at a time, but at least one."""
    count = max(1, count)
    if count >= len(of_batch[0]):
        return [of_batch]
    return zip(*(repeat(None) if x is None else x.split(count) for x in of_batch))


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _inverse_norm(x_bCN: Tensor) -> Tensor:
    norm_bC = torch.linalg.vector_norm(x_bCN, dim=2)
    return norm_bC.mul_(norm_bC).add_(EPS).rsqrt_()


def _mean_of_normalized(x_bCN: Tensor, scale_bC: Tensor | None = None) -> Tensor:
    scale_bC = _inverse_norm(x_bCN) if scale_bC is None else scale_bC
    return torch.bmm(scale_bC[:, None], x_bCN).div_(x_bCN.shape[1])


def _gram_over_positions(x_bCN: Tensor) -> Tensor:
    unit_bNC = (x_bCN * _inverse_norm(x_bCN)[:, :, None]).mT
    return product(unit_bNC, unit_bNC).div_(x_bCN.shape[1])


def _products(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    return gram(x_bCN).mul_(scale_bC[:, :, None]).mul_(scale_bC[:, None])


def _joint_products(s_bSN: Tensor, t_bTN: Tensor) -> Tensor:
    """Products of the student's raw maps with those of the joint set, (b, S, J)."""
    s, t = s_bSN.shape[1], t_bTN.shape[1]
    products_bSJ = s_bSN.new_empty(len(s_bSN), s, s + t)
    gram(s_bSN, products_bSJ[:, :, :s])
    product(s_bSN, t_bTN, products_bSJ[:, :, s:])
    return products_bSJ


def _upper_rows(left_bCN: Tensor, right_bCN: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Blocks of rows of the symmetric ``left right'``, from the diagonal on, and their number of rows."""
    at_a_time = rows_at_a_time(left_bCN)
    for start in range(0, left_bCN.shape[1], at_a_time):
        rows_brN = left_bCN[:, start : start + at_a_time]
        yield product(rows_brN, right_bCN[:, start:]), rows_brN.shape[1]


def _mean_square_product(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    total, start = x_bCN.new_zeros(len(x_bCN)).double(), 0
    for block, rows in _upper_rows(x_bCN, x_bCN):
        block.mul_(scale_bC[:, start : start + rows, None]).mul_(scale_bC[:, None, start:])
        total = total + 2 * _sum_of_squares(block) - _sum_of_squares(block[:, :, :rows])
        start += rows
    return total / x_bCN.shape[1] ** 2


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2)).double().square()


def _linear(s_bSN: Tensor, mean_b1N: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, float]:
    s = s_bSN.shape[1]
    inverse_bS1 = _inverse_norm(s_bSN)[:, :, None]
    difference_b1N = torch.baddbmm(mean_b1N, inverse_bS1.mT, s_bSN, beta=-1, alpha=1 / s)
    if out is not None:
        radial_bS1 = torch.bmm(s_bSN, difference_b1N.mT).mul_(inverse_bS1).mul_(inverse_bS1)
        torch.addcmul(difference_b1N, s_bSN, radial_bS1, value=-1, out=out)
    return torch.linalg.vector_norm(difference_b1N, dim=(1, 2)).square_(), inverse_bS1[:, :, 0], 2 / s


def _poly_by_positions(s_bSN: Tensor, gram_bNN: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, float]:
    s = s_bSN.shape[1]
    inverse_bS = _inverse_norm(s_bSN)
    unit_bSN = s_bSN * inverse_bS[:, :, None]
    difference_bNN = product_minus(unit_bSN.mT, unit_bSN.mT, 1 / s, gram_bNN)
    if out is not None:
        product(unit_bSN, difference_bNN, out)
        radial_bS = (out * unit_bSN).sum(2)
        out.addcmul_(unit_bSN, radial_bS[:, :, None], value=-1)
    return torch.linalg.vector_norm(difference_bNN, dim=(1, 2)).square(), inverse_bS, 4 / s


def _poly_by_channels(
    s_bSN: Tensor, t_bTN: Tensor, scale_bT: Tensor, term_b: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    s, t_bTN = s_bSN.shape[1], full_precision(t_bTN)
    t = t_bTN.shape[1]
    products_bSJ = _joint_products(s_bSN, t_bTN)
    # the squared norms stand on the diagonal already
    scale_bJ = torch.cat([(products_bSJ.diagonal(dim1=1, dim2=2) + EPS).rsqrt_(), scale_bT], 1)
    products_bSJ.mul_(scale_bJ[:, :s, None]).mul_(scale_bJ[:, None])
    rows_own, rows_cross = (torch.linalg.vector_norm(x, dim=2).square_() for x in products_bSJ.split([s, t], 2))
    if out is not None:
        weight_own, weight_cross = 4 / s**2, -4 / (s * t)
        diagonal_bS = -(weight_own * rows_own + weight_cross * rows_cross)
        products_bSJ[:, :, :s].mul_(weight_own)
        products_bSJ[:, :, s:].mul_(weight_cross)
        _pull_back(out, products_bSJ, diagonal_bS, s_bSN, t_bTN, scale_bJ)
    return _three_terms(term_b, rows_own, rows_cross, t), torch.ones_like(rows_own), 1.0


def _three_terms(term_b: Tensor, rows_own_bS: Tensor, rows_cross_bS: Tensor, t: int) -> Tensor:
    own_b, cross_b = rows_own_bS.double().sum(1), rows_cross_bS.double().sum(1)
    s = rows_own_bS.shape[1]
    # where both sets are equal, rounding can leave -1e-8
    return (term_b + own_b / s**2 - cross_b * 2 / (s * t)).clamp_min_(0)


def _pull_back(
    out: Tensor, weights_bSJ: Tensor, diagonal_bS: Tensor, s_bSN: Tensor, t_bTN: Tensor, scale_bJ: Tensor
) -> None:
    """``out = (weights + diag) maps`` for the normalized maps of the joint set, written for the raw ones.

    Overwrites the weights.
    """
    weights_bSJ.diagonal(dim1=1, dim2=2).add_(diagonal_bS)
    weights_bSJ.mul_(scale_bJ[:, : s_bSN.shape[1], None]).mul_(scale_bJ[:, None])
    sum_of_products(weights_bSJ, s_bSN, t_bTN, out)


def _bandwidth(mean_s_b1N: Tensor, mean_t_b1N: Tensor, norms_bS: Tensor, norms_bT: Tensor) -> Tensor:
    """Mean squared distance over all pairs of the joint set, per image, from its mean alone."""
    s, t = norms_bS.shape[1], norms_bT.shape[1]
    mean_norm_b = (norms_bS.sum(1) + norms_bT.sum(1)) / (s + t)
    mean_b1N = (mean_s_b1N * s + mean_t_b1N * t) / (s + t)
    return (2 * (mean_norm_b - mean_b1N.square().sum((1, 2)))).clamp_min(SMALLEST_BANDWIDTH)


def _squared_norms(inverse_bC: Tensor) -> Tensor:
    # q / (q + eps), where inverse = 1 / sqrt(q + eps)
    return 1 - EPS * inverse_bC.square()


def _gaussian_by_scaled_products(
    s_bSN: Tensor,
    t_bTN: Tensor,
    scale_bT: Tensor,
    mean_b1N: Tensor,
    products_bTT: Tensor,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, float]:
    s, t_bTN = s_bSN.shape[1], full_precision(t_bTN)
    t = t_bTN.shape[1]
    # by the same sums as the teacher's, since a small bandwidth magnifies what rounding makes of equal maps
    inverse_bS = _inverse_norm(s_bSN)
    scale_bJ = torch.cat([inverse_bS, scale_bT], 1)
    norms_bJ = _squared_norms(scale_bJ)
    norms_bS, norms_bT = norms_bJ.split([s, t], 1)
    variance_b11 = _bandwidth(_mean_of_normalized(s_bSN, inverse_bS), mean_b1N, norms_bS, norms_bT)[:, None, None]

    def kernel(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (products - left[:, :, None] / 2).sub_(right[:, None] / 2).div_(variance_b11).exp_()

    products_bSJ = _joint_products(s_bSN, t_bTN).mul_(inverse_bS[:, :, None]).mul_(scale_bJ[:, None])
    kernel_bSJ = kernel(products_bSJ, norms_bS, norms_bJ)
    rows_own, rows_cross = (x.sum(2) for x in kernel_bSJ.split([s, t], 2))
    if out is not None:
        kernel_bSJ[:, :, :s].mul_(2 / s**2 / variance_b11)
        kernel_bSJ[:, :, s:].mul_(-2 / (s * t) / variance_b11)
        diagonal_bS = -kernel_bSJ.sum(2)
        radial_bS = products_bSJ.mul_(kernel_bSJ).sum(2) + diagonal_bS * norms_bS
        _pull_back(out, kernel_bSJ, diagonal_bS - radial_bS, s_bSN, t_bTN, scale_bJ)
    term_b = kernel(products_bTT, norms_bT, norms_bT).double().mean((1, 2))
    return _three_terms(term_b, rows_own, rows_cross, t), torch.ones_like(inverse_bS), 1.0


def _gaussian_by_scaled_maps(
    s_bSN: Tensor, t_bTN: Tensor, scale_bT: Tensor, mean_b1N: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    s, n = s_bSN.shape[1:]
    t = t_bTN.shape[1]
    inverse_bS = _inverse_norm(s_bSN)
    norms_bS, norms_bT = _squared_norms(inverse_bS), _squared_norms(scale_bT)
    variance_b = _bandwidth(_mean_of_normalized(s_bSN, inverse_bS), mean_b1N, norms_bS, norms_bT)
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
    total_b = s_bSN.new_zeros(len(s_bSN)).double()
    for block, rows in _upper_rows(left_t, right_t):
        block.exp_()
        total_b = total_b + 2 * block.sum((1, 2)).double() - block[:, :, :rows].sum((1, 2)).double()
    return _three_terms(total_b / t**2, rows_own, rows_cross, t), inverse_bS * root_b11[:, :, 0], 1.0
