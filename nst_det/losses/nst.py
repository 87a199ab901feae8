"""NST: the distributions of the channels' maps agree (Huang, Wang 2017, arXiv 1707.01219).

Each channel's map, divided by its L2 norm over the positions, is one sample.  The loss is the squared maximum mean
discrepancy (MMD^2) between the C_T samples of the teacher and the C_S samples of the student, per image, with all
three terms, so that it is >= 0 and 0 for equal sets:

    MMD^2 = mean k(t_i, t_i') + mean k(s_j, s_j') - 2 mean k(t_i, s_j)

Shapes: B batch, C channels, N = H*W positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nst_det.losses.mmd import KERNELS, mmd
from nst_det.losses.mmd_gpu import mmd_in_few_launches
from nst_det.losses.ops import Shared, at_size, check_maps, common_size, compute_now, teacher_at
from nst_det.losses.registry import LayerPair, register_term

# value, gradient, and what the gradient is still to be multiplied by
Computed = tuple[Tensor, Tensor | None, Tensor | None]


def nst_loss(
    student: Tensor,
    teacher: Tensor,
    kernel: str = "poly",
    shared: Shared = compute_now,
    limit: int | None = None,
    few_launches: bool | None = None,
) -> Tensor:
    """MMD^2 between the normalized channel maps of student and teacher, mean over the batch.

    Args:
        student: map (B, C_S, H, W).
        teacher: map (B, C_T, H', W'); no gradient goes there.  The larger one is averaged down; C_T may differ.
        kernel: ``linear`` x'y, ``poly`` (x'y)^2, or ``gaussian`` exp(-|x - y|^2 / (2 sigma^2)) with sigma^2 the mean
            squared distance of all pairs of one image, a constant for the gradient.
        shared: keeps what is the teacher's alone for other students and kernels.
        limit: bytes for temporary tensors beside the gradient, as far as single images fit in; by default 2 MiB on
            the CPU and 1/32 of a GPU's memory.
        few_launches: compute as suits a GPU, many images at once, instead of a few images in a CPU's cache; by default
            where the maps are not on a CPU, and under ``torch.compile``.  There maps in bf16 or fp16 have a gradient
            from TF32 products (1e-3 of its norm off, as their own type is), unless FLOAT32_PRECISION is ``highest``.

    Returns:
        A scalar >= 0, in float32 (float64 for float64 maps) whatever autocast says.

    Raises:
        ValueError: an unknown kernel, or shapes that aren't maps of one batch.

    Example:
        >>> maps = torch.rand(2, 8, 7, 7)
        >>> bool(nst_loss(maps, maps) < 1e-6)
        True
    """
    if kernel not in KERNELS:
        raise ValueError(f"nst: kernel must be one of {', '.join(KERNELS)}, not '{kernel}'")
    check_maps(student, teacher)
    if torch.is_autocast_enabled(student.device.type):
        with torch.autocast(student.device.type, enabled=False):
            return nst_loss(student, teacher, kernel, shared, limit, few_launches)
    size = common_size(student, teacher)
    # maps of the right size are taken in their own precision, which is widened a few images at a time
    small = student if tuple(student.shape[2:]) == size else at_size(student, size)

    def target() -> Tensor:
        maps = teacher.detach() if tuple(teacher.shape[2:]) == size else teacher_at(size, teacher, shared)
        return maps.flatten(2)

    wanted = small.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if few_launches is None:
        few_launches = compiling or student.device.type != "cpu"
    way: Callable[..., Computed] = mmd_in_few_launches if few_launches else mmd

    def named(name: str, make: Callable[[], Any]) -> Any:
        return shared((f"nst-{name}", size), make)

    def compute(maps: Tensor, with_gradient: bool) -> Computed:
        value, gradient, factor = way(maps.flatten(2), teacher.shape[1], target, kernel, named, with_gradient, limit)
        gradient = None if gradient is None else gradient.view(maps.shape)
        return value, gradient, None if factor is None else factor[..., None, None]

    with torch.no_grad():
        value, gradient, factor = compute(small.detach(), wanted)
    if gradient is None:
        return value
    if compiling:
        return _WithGradient.apply(small, value, gradient if factor is None else gradient * factor)
    return _WithGradientOnce.apply(small, (value, gradient, factor), compute)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already; this form is the one that can be compiled."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = maps.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None, None


class _WithGradientOnce(torch.autograd.Function):
    """The same without a second tensor of the map's size: the first backward hands out the gradient's own memory.

    Another backward through the same graph (``retain_graph``) computes the gradient again.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, ready: tuple[Tensor, Tensor, Tensor | None], compute: Callable[..., Any]
    ) -> Tensor:
        ctx.save_for_backward(maps)
        value, *ctx.ready = ready
        ctx.compute, ctx.dtype = compute, maps.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        if ctx.ready is None:
            # autograd refuses these after a backward that freed the graph
            _, *ctx.ready = ctx.compute(*ctx.saved_tensors, True)
        (gradient, factor), ctx.ready = ctx.ready, None
        if factor is not None:
            outer = (factor * outer).to(gradient.dtype)
        return gradient.mul_(outer).to(ctx.dtype), None, None


class NST(nn.Module):
    """The terms ``nst-linear``, ``nst-poly`` and ``nst-gaussian``."""

    # which of them depends on kernel and shapes; "nst-maps" are the teacher's maps themselves
    reads = ("nst-mean", "nst-gram", "nst-maps", "nst-scale", "nst-poly", "nst-products")

    def __init__(self, kernel: str, pair: LayerPair, center: bool = False, relu: bool = False) -> None:
        super().__init__()
        self.kernel, self.center, self.relu = kernel, center, relu

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """Maps (B, C_S, H, W) and (B, C_T, H', W') to a scalar."""
        if not (self.center or self.relu):
            return nst_loss(student, teacher, self.kernel, shared)
        prepared = ("center", self.center, "relu", self.relu)

        def shared_so(key: Any, compute: Callable[[], Any]) -> Any:
            return shared((*key, *prepared), compute)

        maps = shared_so(("nst-prepared",), lambda: self._prepare(teacher.detach()))
        return nst_loss(self._prepare(student), maps, self.kernel, shared_so)

    def _prepare(self, maps: Tensor) -> Tensor:
        maps = maps.relu() if self.relu else maps
        return maps - maps.mean((2, 3), keepdim=True) if self.center else maps


for _kernel, _weight, _source, _summary in (
    ("linear", 50.0, "the NST paper's 5e1 (not verified)", "the mean of the normalized channel maps"),
    ("poly", 50.0, "the NST authors' code and RepDistiller (50)", "which positions are active together"),
    ("gaussian", 100.0, "the NST paper's 1e2 (not verified)", "the distribution of the normalized channel maps"),
):
    register_term(f"nst-{_kernel}", "maps", _weight, _source, _summary)(partial(NST, _kernel))
