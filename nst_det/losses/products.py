"""Batched matrix products, at the speed that a CPU has for convolutions.

torch multiplies float32 matrices on the CPU by MKL, which on processors that aren't Intel's reaches about half of what
oneDNN reaches on the same machine; convolutions go through oneDNN.  Where torch has oneDNN's product (the operator that
its own compiler calls for linear layers), large products are taken from there; everywhere else from ``matmul``.

Legend of the shape suffixes: b images, M, K, N rows and columns, C, S, T channels.
"""

from functools import cache

import torch
from torch import Tensor

# multiply-adds of one image from which on the separate call for each image is worth it, and rows and columns of the
# result below which oneDNN is no faster
WORTH_A_CALL = 2**21
NARROW = 64

# rows of a symmetric matrix that a CPU computes at a time: of the blocks left of the diagonal none is computed
ROWS = 256

# what a slice of two stacked maps may take, so that it stays in the cache
SLICE_BYTES = 512 * 2**10


def product(left_bMK: Tensor, right_bNK: Tensor, out_bMN: Tensor | None = None) -> Tensor:
    """``left right'`` of each image, (b, M, N), written to ``out`` where that is given."""
    if not _by_onednn(left_bMK, right_bNK):
        right_bKN = right_bNK.mT
        return left_bMK @ right_bKN if out_bMN is None else out_bMN.baddbmm_(left_bMK, right_bKN, beta=0)
    if out_bMN is None:
        out_bMN = left_bMK.new_empty(len(left_bMK), left_bMK.shape[1], right_bNK.shape[1])
    for image, left, right in zip(out_bMN, left_bMK, right_bNK):
        image.copy_(_onednn(left, right))
    return out_bMN


def product_minus(left_bMK: Tensor, right_bNK: Tensor, factor: float, minus_bMN: Tensor) -> Tensor:
    """``factor left right' - minus`` of each image, (b, M, N)."""
    if not _by_onednn(left_bMK, right_bNK):
        return torch.baddbmm(minus_bMN, left_bMK, right_bNK.mT, beta=-1, alpha=factor)
    return product(left_bMK, right_bNK).mul_(factor).sub_(minus_bMN)


def rows_at_a_time(x_bCK: Tensor) -> int:
    """How many rows :func:`gram` and whoever walks over its upper blocks should take at a time."""
    return min(ROWS, max(64, -(-x_bCK.shape[1] // 4)))


def gram(x_bCK: Tensor, out_bCC: Tensor | None = None) -> Tensor:
    """``x x'`` of each image, (b, C, C), of which only the blocks from the diagonal on are multiplied out."""
    channels, rows = x_bCK.shape[1], rows_at_a_time(x_bCK)
    # with few columns mirroring costs more than it saves
    if channels <= rows or x_bCK.shape[2] < channels:
        return product(x_bCK, x_bCK, out_bCC)
    out = x_bCK.new_empty(len(x_bCK), channels, channels) if out_bCC is None else out_bCC
    for start in range(0, channels, rows):
        block = product(x_bCK[:, start : start + rows], x_bCK[:, start:])
        out[:, start : start + rows, start:] = block
        out[:, start:, start : start + rows] = block.mT
    return out


def sum_of_products(weights_bMJ: Tensor, s_bSN: Tensor, t_bTN: Tensor, out_bMN: Tensor) -> None:
    """``weights [s; t]`` of each image, the rows of ``t`` below those of ``s`` (J = S + T), written to ``out``."""
    (s, n), t = s_bSN.shape[1:], t_bTN.shape[1]
    width = max(256, SLICE_BYTES // (4 * (s + t)))
    if not _large(weights_bMJ, weights_bMJ.shape[1] * (s + t) * min(n, width)):
        out_bMN.baddbmm_(weights_bMJ[:, :, :s], s_bSN, beta=0)
        out_bMN.baddbmm_(weights_bMJ[:, :, s:], t_bTN)
        return
    for out, weights, s_SN, t_TN in zip(out_bMN, weights_bMJ, s_bSN, t_bTN):
        for start in range(0, n, width):
            columns = slice(start, start + width)
            out[:, columns] = _onednn(weights, torch.cat([s_SN[:, columns], t_TN[:, columns]]).mT)


def _by_onednn(left_bMK: Tensor, right_bNK: Tensor) -> bool:
    rows, columns = left_bMK.shape[1], right_bNK.shape[1]
    wide = min(rows, columns) >= NARROW
    return (
        wide and _large(left_bMK, rows * left_bMK.shape[2] * columns) and _is_packed(left_bMK) and _is_packed(right_bNK)
    )


def _large(x: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= WORTH_A_CALL
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
    )


def _is_packed(x_bMK: Tensor) -> bool:
    # oneDNN has no fast way for rows with gaps between them
    (rows, columns), strides = x_bMK.shape[1:], x_bMK.stride()[1:]
    return strides in ((columns, 1), (1, rows))


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return out


@cache
def _has_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_onednn(left, right), left @ right.mT)
    except (RuntimeError, TypeError):
        # another release of torch may ask for other arguments
        return False
