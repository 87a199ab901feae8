"""Operations of several losses: one floating point width, one spatial size, unit vectors that survive zeros."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How a loss asks for what it computes of the teacher's output, so that it is computed once for all students
# (ModelOutputs.shared).  A key is a tuple that begins with a name, which the loss's class lists in ``reads``.
Shared = Callable[[Hashable, Callable[[], Any]], Any]

# Added to a sum of squares before the root.  A dead channel (all zeros) then has the value 0 and a gradient of at
# most 1e3; a channel counts as alive when its L2 norm is well above 1e-3.
EPS = 1e-6


def compute_now(key: Hashable, compute: Callable[[], Any]) -> Any:
    """Compute without keeping: the ``Shared`` of a loss that is called as a function."""
    with torch.no_grad():
        return compute()


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` (...,) as float32; float64 stays. No copy where nothing changes."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_temperature(term: str, temperature: float) -> None:
    """Refuse a temperature that divides no logits."""
    if temperature <= 0:
        raise ValueError(f"{term}: temperature must be above 0, not {temperature}")


def check_factors(term: str, **factors: float) -> None:
    """Refuse factors of a term's parts that are below 0, or all 0."""
    values = list(factors.values())
    if min(values) < 0 or not any(values):
        names, given = " and ".join(factors), ", ".join(map(str, values))
        raise ValueError(f"{term}: {names} must be at least 0, and not all of them 0; given are {given}")


def check_maps(student: Tensor, teacher: Tensor, same_channels: bool = False) -> None:
    """Refuse what aren't maps (B, C, H, W) of one batch, or of one channel count where the loss needs that."""
    same_batch = student.dim() == teacher.dim() == 4 and len(student) == len(teacher)
    if not same_batch or (same_channels and student.shape[1] != teacher.shape[1]):
        raise ValueError(
            f"maps must be (B, C, H, W) with one B{' and one C' * same_channels}; the student's is "
            f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )


def common_size(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """Return the (H, W) at which two maps are compared: the smaller one, per axis."""
    return min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average ``x`` (B, C, H, W) down to ``size`` (height, width); the same tensor if it has that size."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.adaptive_avg_pool2d(x, size)


def at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (B, C, H, W) in full precision, averaged down to ``size`` (height, width)."""
    return pooled(full_precision(maps), size)


def teacher_at(size: tuple[int, int], teacher: Tensor, shared: Shared) -> Tensor:
    """Return the teacher's maps (B, C, H, W) at ``size`` (height, width), detached, made once for all that ask."""
    maps: Tensor = shared(("aligned", size), lambda: at_size(teacher.detach(), size))
    return maps


def aligned(
    student: Tensor, teacher: Tensor, shared: Shared = compute_now, same_channels: bool = False
) -> tuple[Tensor, Tensor]:
    """Return both maps (B, C, H, W) in full precision at their common size.

    A loss that reads the teacher's side of it declares ``reads = ("aligned",)``.
    """
    check_maps(student, teacher, same_channels)
    size = common_size(student, teacher)
    return at_size(student, size), teacher_at(size, teacher, shared)


def gridded(student: Tensor, teacher: Tensor, grid: int, shared: Shared) -> tuple[Tensor, Tensor]:
    """Return a vector (B, C_S, 1, 1) as it is, and the teacher's map at ``grid`` x ``grid`` positions.

    A grid of 0 is a student that has positions itself, as :func:`aligned`.
    """
    if not grid:
        return aligned(student, teacher, shared)
    check_maps(student, teacher)
    return full_precision(student), teacher_at((grid, grid), teacher, shared)


def checked_grid(term: str, vector: bool, grid: int) -> int:
    """Return ``grid`` where the student's level is a vector, else 0."""
    if int(grid) != grid or grid < 1:
        raise ValueError(f"{term}: grid must be a whole number of at least 1, not {grid}")
    return int(grid) if vector else 0


def spread(before: int, after: int, grid: int, bias: bool) -> nn.Module:
    """Return a 1x1 convolution, or for a grid a linear layer from (B, C, 1, 1) to ``grid`` x ``grid`` positions."""
    if grid:
        # a transposed convolution is the same product, three times slower on a CPU
        linear = nn.Linear(before, after * grid**2, bias=bias)
        return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (after, grid, grid)))
    return nn.Conv2d(before, after, 1, bias=bias)


def channel_adapter(student: int, teacher: int) -> nn.Module:
    """Return a 1x1 convolution from one channel count to the other, nothing where they are equal."""
    return nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)


def unit(x: Tensor, dim: int | tuple[int, ...] = -1, eps: float = EPS) -> Tensor:
    """Return ``x / sqrt(sum x^2 + eps)`` along ``dim``, of any shape (...,): finite value and gradient at zero."""
    return x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()
