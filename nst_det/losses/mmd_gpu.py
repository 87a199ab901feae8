"""MMD^2 between normalized channel maps, and its gradient, in few launches: the way of a GPU.

There a launch costs more than most of what it computes, so as many images are taken at once as its memory allows, and
nothing that a product gives for free is computed by itself.  Let x_i be the raw channels of both sets, the student's
first; q_i = |x_i|^2, c_i = 1 / (q_i + eps), r_i = sqrt(c_i); u_i = r_i x_i the normalized ones; P_ij = x_i'x_j for i of
the student; and w_j = 1 for the student's channels, -S/T for the teacher's.

- ``poly`` over the channels.  (u_i'u_j)^2 = c_i c_j P_ij^2, and the chain through the normalization takes away what
  points along x_i.  So with U_ij = w_j c_j P_ij and e_i = sum_j U_ij P_ij, of which e'_i are the student's columns,
      MMD^2 = mean_TT + sum_i c_i (2 e_i - e'_i) / S^2,    gradient_i = 4/S^2 c_i (sum_j U_ij x_j - c_i e_i x_i),
  where the last bracket is one product, of U with -c_i e_i added on its diagonal and all maps.
- ``poly`` over the positions, where there are fewer of these: sum_ij (u_i'u_j)^2 = |sum_i u_i u_i'|^2, so that MMD^2 is
  |D|^2 for D = sum_S u_i u_i' / S - sum_T u_i u_i' / T, N x N, and with g_i = D u_i
      gradient_i = 4/S r_i (g_i - (u_i'g_i) u_i).
- ``linear`` is the same with d = sum_S u_i / S - sum_T u_i / T in the place of D and of g_i, and 2/S.
- ``gaussian``.  K_ij = w_j exp((u_i'u_j - u_i'u_i / 2 - u_j'u_j / 2) / sigma^2) has rows d_i = sum_j K_ij, and with
  K_ii -= d_i:  gradient_i = 2 / (S sigma)^2 r_i (sum_j K_ij u_j - (sum_j K_ij u_i'u_j) u_i).

The teacher's part is named as in ``mmd.py``, so that a cache serves both.  Shape suffixes are those there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nst_det.engine.device import tf32_in
from nst_det.losses.mmd import SMALLEST_BANDWIDTH, chunks, joined, positions_side_is_cheaper, products_side_is_cheaper
from nst_det.losses.ops import EPS, Shared, full_precision

HALF = (torch.bfloat16, torch.float16)
# temporary tensors stay below this part of a GPU's memory, or belong to a single image
PART = 1 / 32
# tiles of a product's result that keep a large GPU busy, some two a multiprocessor, and their sides
TILES, TILE = 256, 128
# positions below which a slice of a sum isn't worth it
SLICE = 2048


def mmd_in_few_launches(
    student_BSN: Tensor,
    t: int,
    teacher_BTN: Callable[[], Tensor],
    kernel: str,
    shared: Shared,
    with_gradient: bool,
    limit: int | None = None,
) -> tuple[Tensor, Tensor | None, None]:
    """Batch mean of MMD^2 and, if wanted, its gradient: arguments and result are those of :func:`mmd`.

    Products of bf16 or fp16 maps are exact and summed in float32.  The gradient of such maps, which is rounded to their
    type, is multiplied in TF32 where convolutions are (all but FLOAT32_PRECISION ``highest``); nothing else is.
    """
    batch, s, n = student_BSN.shape
    limit = memory_limit(student_BSN.device) if limit is None else limit
    # products and their kernels; both sets side by side, and in float32
    floats = 3 * s * (s + t) + 2 * (s + t) * n + (2 * t * t if kernel == "gaussian" else 0)
    images = limit // max(1, 4 * floats)
    # fp16 can't hold a gradient that no loss scaler has scaled yet
    keep = torch.float32 if student_BSN.dtype == torch.float16 else student_BSN.dtype
    gradient = torch.empty_like(student_BSN, dtype=keep) if with_gradient else None

    def once(names: tuple[str, ...], compute: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        images = limit // max(1, 4 * t * (t + n))
        made: list[Tensor] = []

        def make(place: int) -> Tensor:
            if not made:
                made.extend(joined(list(of)) for of in zip(*(compute(x) for (x,) in chunks(images, teacher_BTN()))))
            return made[place]

        return [shared(name, partial(make, place)) for place, name in enumerate(names)]

    step: Callable[..., Tensor]
    if kernel == "linear":
        step, of_teacher = _linear, once(("mean",), _mean_of_normalized)
    elif kernel == "poly" and positions_side_is_cheaper(s, t, n):
        step, of_teacher = _poly_by_positions, once(("gram",), _gram_over_positions)
    elif kernel == "poly":
        step, of_teacher = _poly_by_channels, once(("scale", "poly"), _scale_and_mean_square)
    elif products_side_is_cheaper(s, t, n):
        step, of_teacher = _gaussian, once(("scale", "mean", "products"), _scale_mean_and_products)
    else:
        # the products are too large to be kept
        step, of_teacher = _gaussian, once(("scale", "mean"), _scale_and_mean)
    if step in (_poly_by_channels, _gaussian):
        of_teacher = [shared("maps", teacher_BTN), *of_teacher]
    values = [step(x, out, batch, *rest) for x, out, *rest in chunks(images, student_BSN, gradient, *of_teacher)]
    return torch.stack(values).sum() if len(values) > 1 else values[0], gradient, None


def memory_limit(device: torch.device) -> int:
    """Return the bytes that temporary tensors may take by default."""
    if device.type != "cuda":
        return 2**30
    return int(PART * torch.cuda.get_device_properties(device).total_memory)


def map_products(left_bSN: Tensor, right_bJN: Tensor) -> Tensor:
    """``left right'`` of each image, (b, S, J) in float32 (float64 for float64), exact products of bf16 and fp16.

    A product of few rows and columns, but many positions, is a few tiles of work for the GPU; so the positions are cut
    into slices, whose products are summed.
    """
    (b, s, n), j = left_bSN.shape, right_bJN.shape[1]
    tiles = b * -(-s // TILE) * -(-j // TILE)
    most = max(1, min(TILES // tiles, n // SLICE))
    slices = max(count for count in range(1, most + 1) if n % count == 0)
    left, right = (
        x if slices == 1 else x.unflatten(2, (slices, n // slices)).movedim(2, 1).flatten(0, 1)
        for x in (left_bSN, right_bJN)
    )
    if left.dtype in HALF and _multiplies_half(left.device):
        products = torch.bmm(left, right.mT, out_dtype=torch.float32)
    else:
        products = full_precision(left) @ full_precision(right).mT
    return products if slices == 1 else products.unflatten(0, (b, slices)).sum(1)


def _multiplies_half(device: torch.device) -> bool:
    # into float32, since torch 2.8
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.bmm, "dtype")


@contextmanager
def _as_convolutions(maps: Any) -> Iterator[None]:
    """Multiply in TF32 what belongs to bf16 or fp16 maps, where convolutions are."""
    matmul = torch.backends.cuda.matmul
    if torch.compiler.is_compiling() or not (maps.is_cuda and maps.dtype in HALF and tf32_in()["convolutions"]):
        yield
        return
    # where a user has set the newer switch, the older one can't be read
    name, tf32 = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, tf32)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _inverse_norm(x_bCN: Tensor) -> Tensor:
    norm_bC: Tensor = torch.linalg.vector_norm(x_bCN, dim=2, dtype=torch.promote_types(x_bCN.dtype, torch.float32))
    return norm_bC.square_().add_(EPS).rsqrt_()


def _scaled_product(left_bMK: Tensor, right_bKN: Tensor, factor: float) -> Tensor:
    return torch.baddbmm(left_bMK.new_empty(1, 1, 1), left_bMK, right_bKN, beta=0, alpha=factor)


def _mean(x_bCN: Tensor, scale_bC: Tensor) -> Tensor:
    return _scaled_product(scale_bC[:, None], full_precision(x_bCN), 1 / x_bCN.shape[1])


def _mean_of_normalized(x_bCN: Tensor) -> tuple[Tensor]:
    return (_mean(x_bCN, _inverse_norm(x_bCN)),)


def _gram_over_positions(x_bCN: Tensor) -> tuple[Tensor]:
    with _as_convolutions(x_bCN):
        unit_bCN = x_bCN * _inverse_norm(x_bCN)[:, :, None]
        return (_scaled_product(unit_bCN.mT, unit_bCN, 1 / x_bCN.shape[1]),)


def _scale_and_products(x_bCN: Tensor) -> tuple[Tensor, Tensor]:
    products_bCC = map_products(x_bCN, x_bCN)
    scale_bC = _scale(products_bCC)
    return scale_bC, _normalized(products_bCC, scale_bC)


def _normalized(products_bCC: Tensor, scale_bC: Tensor) -> Tensor:
    return products_bCC.mul_(scale_bC[:, :, None]).mul_(scale_bC[:, None])


def _scale(products_bSJ: Tensor) -> Tensor:
    # the squared norms stand on the diagonal
    return (products_bSJ.diagonal(dim1=1, dim2=2) + EPS).rsqrt_()


def _scale_and_mean_square(x_bCN: Tensor) -> tuple[Tensor, Tensor]:
    scale_bC, products_bCC = _scale_and_products(x_bCN)
    # by rows first: a float64 copy of them is small
    return scale_bC, products_bCC.square_().mean(2).mean(1, dtype=_wide(x_bCN))


def _scale_mean_and_products(x_bCN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale_bC, products_bCC = _scale_and_products(x_bCN)
    return scale_bC, _mean(x_bCN, scale_bC), products_bCC


def _scale_and_mean(x_bCN: Tensor) -> tuple[Tensor, Tensor]:
    scale_bC = _inverse_norm(x_bCN)
    return scale_bC, _mean(x_bCN, scale_bC)


def _side_by_side(s_bSN: Tensor, t_bTN: Tensor) -> Tensor:
    # channels last, as networks on a GPU give them, is position by position
    return torch.cat([s_bSN.mT, t_bTN.mT], 2).mT


def _squares(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.dot(flat, flat)


def _linear(s_bSN: Tensor, out: Tensor | None, batch: int, mean_b1N: Tensor) -> Tensor:
    r_bS1, s_bSN = _inverse_norm(s_bSN)[:, :, None], full_precision(s_bSN)
    s = s_bSN.shape[1]
    factor = 2 / (s * batch)
    d_b1N = torch.baddbmm(mean_b1N, r_bS1.mT, s_bSN, beta=-factor, alpha=factor / s)
    if out is not None:
        radial_bS1 = torch.bmm(s_bSN, d_b1N.mT).mul_(r_bS1).mul_(r_bS1)
        torch.mul(torch.addcmul(d_b1N, s_bSN, radial_bS1, value=-1), r_bS1, out=out)
    return _squares(d_b1N) * (1 / (factor**2 * batch))


def _poly_by_positions(s_bSN: Tensor, out: Tensor | None, batch: int, gram_bNN: Tensor) -> Tensor:
    with _as_convolutions(s_bSN):
        r_bS1 = _inverse_norm(s_bSN)[:, :, None]
        u_bSN = s_bSN * r_bS1
        s, root = u_bSN.shape[1], batch**-0.5
        d_bNN = torch.baddbmm(gram_bNN, u_bSN.mT, u_bSN, beta=-root, alpha=root / s)
        if out is not None:
            g_bSN = torch.empty_like(u_bSN).baddbmm_(u_bSN, d_bNN, beta=0, alpha=4 / s * root)
            g_bSN.addcmul_(u_bSN, (g_bSN * u_bSN).sum(2, keepdim=True), value=-1)
            torch.mul(g_bSN, r_bS1, out=out)
    return _squares(d_bNN)


def _poly_by_channels(
    s_bSN: Tensor, out: Tensor | None, batch: int, t_bTN: Tensor, scale_bT: Tensor, term_b: Tensor
) -> Tensor:
    s, t = s_bSN.shape[1], t_bTN.shape[1]
    both_bJN = _side_by_side(s_bSN, t_bTN)
    p_bSJ = map_products(both_bJN[:, :s], both_bJN)
    c_bS = (p_bSJ.diagonal(dim1=1, dim2=2) + EPS).reciprocal_()
    u_bSJ = p_bSJ * torch.cat([c_bS, scale_bT.square().mul_(-s / t)], 1)[:, None]
    squares_bSJ = p_bSJ.mul_(u_bSJ)
    rows_bS, own_bS = squares_bSJ.sum(2), squares_bSJ[:, :, :s].sum(2)
    if out is not None:
        u_bSJ.diagonal(dim1=1, dim2=2).addcmul_(c_bS, rows_bS, value=-1)
        _pull_back(u_bSJ, both_bJN, c_bS, 4 / (s * s * batch), out)
    return _value(term_b, own_bS.sub_(rows_bS, alpha=2).mul_(c_bS), batch)


def _gaussian(
    s_bSN: Tensor,
    out: Tensor | None,
    batch: int,
    t_bTN: Tensor,
    scale_bT: Tensor,
    mean_b1N: Tensor,
    products_bTT: Tensor | None = None,
) -> Tensor:
    s, t = s_bSN.shape[1], t_bTN.shape[1]
    j = s + t
    both_bJN = _side_by_side(s_bSN, t_bTN)
    p_bSJ = map_products(both_bJN[:, :s], both_bJN)
    products_bTT = _normalized(map_products(t_bTN, t_bTN), scale_bT) if products_bTT is None else products_bTT
    scale_bJ = torch.cat([_scale(p_bSJ), scale_bT], 1)
    scale_bS = scale_bJ[:, :s]
    z_bSJ = p_bSJ.mul_(scale_bS[:, :, None]).mul_(scale_bJ[:, None])
    squared_bJ = torch.cat([z.diagonal(dim1=1, dim2=2) for z in (z_bSJ, products_bTT)], 1)
    # the mean squared distance of all pairs is twice their mean squared norm less that of their mean; here -2 sigma^2
    twice_mean_b1N = torch.baddbmm(mean_b1N, scale_bS[:, None], full_precision(s_bSN), beta=2 * t / j, alpha=2 / j)
    width_b = twice_mean_b1N.square_().sum((1, 2)).sub_(squared_bJ.sum(1), alpha=4 / j)
    width_b11 = width_b.clamp_max_(-2 * SMALLEST_BANDWIDTH)[:, None, None]
    half_b1J = squared_bJ[:, None] / width_b11

    def kernel(z: Tensor, left_b1I: Tensor, right_b1J: Tensor) -> Tensor:
        return torch.addcdiv(right_b1J, z, width_b11, value=-2).add_(left_b1I.mT).exp_()

    k_bSJ = kernel(z_bSJ, half_b1J[:, :, :s], half_b1J)
    k_bSJ[:, :, s:].mul_(-s / t)
    rows_bS, own_bS = k_bSJ.sum(2), k_bSJ[:, :, :s].sum(2)
    if out is not None:
        diagonal_bS = k_bSJ.diagonal(dim1=1, dim2=2)
        diagonal_bS.sub_(rows_bS)
        radial_bS = z_bSJ.mul_(k_bSJ).sum(2)
        k_bSJ.mul_(scale_bJ[:, None])
        diagonal_bS.addcmul_(radial_bS, scale_bS, value=-1)
        _pull_back(k_bSJ, both_bJN, scale_bS / width_b11[:, 0], -4 / (s * s * batch), out)
    half_b1T = half_b1J[:, :, s:]
    term_b = kernel(products_bTT, half_b1T, half_b1T).mean(2).mean(1, dtype=_wide(z_bSJ))
    return _value(term_b, own_bS.sub_(rows_bS, alpha=2), batch)


def _value(term_b: Tensor, less_bS: Tensor, batch: int) -> Tensor:
    """The terms nearly cancel, so they are summed in float64; where both sets are equal, rounding can leave -1e-8."""
    s = less_bS.shape[1]
    values_b = torch.sub(term_b, less_bS.sum(1, dtype=term_b.dtype), alpha=1 / s**2).clamp_min_(0)
    mean = values_b.mean(dtype=less_bS.dtype)
    return mean if len(values_b) == batch else mean * (len(values_b) / batch)


def _pull_back(weights_bSJ: Tensor, both_bJN: Tensor, factor_bS: Tensor, constant: float, out: Tensor) -> None:
    """Write ``constant factor weights maps``."""
    exact = out if out.dtype == weights_bSJ.dtype else torch.empty_like(out, dtype=weights_bSJ.dtype)
    with _as_convolutions(both_bJN):
        exact.baddbmm_(weights_bSJ, full_precision(both_bJN), beta=0, alpha=constant)
    torch.mul(exact, factor_bS[:, :, None], out=out)
