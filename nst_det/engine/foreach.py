"""What would be a launch a tensor, by a launch a list: copies, casts of weights, counters of normalization."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# layers whose own parameters enter one convolution or product as they are
CAST_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def copy_together(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources):
        # a list of several kinds would be copied one by one
        into, of = kinds.setdefault((target.device, target.dtype, source.dtype), ([], []))
        into.append(target)
        of.append(source)
    for into, of in kinds.values():
        torch._foreach_copy_(into, of)


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, by one copy; their gradients come back by another one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        casts = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        copy_together(casts, tensors)
        ctx.mark_non_differentiable(*(cast for cast, tensor in zip(casts, tensors) if not tensor.requires_grad))
        return casts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, ctx.dtypes)
        found = [None if one is None else torch.empty_like(one, dtype=dtype) for one, dtype in pairs]
        kept = [(into, of) for into, of in zip(found, gradients) if into is not None and of is not None]
        copy_together([into for into, _ in kept], [of for _, of in kept])
        return (None, *found)


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Cast the weights of convolutions and products within the block, to the bits to which ``torch.autocast`` would.

    Gradients go to the weights as they are outside.  None casts nothing.
    """
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (layer._parameters, name, parameter)
        for layer in (model.modules() if dtype is not None else ())
        if type(layer) in CAST_LAYERS
        for name, parameter in layer._parameters.items()
        if parameter is not None and parameter.dtype != dtype
    ]
    if not places:
        yield
        return
    # a weight that two layers share is cast once
    own = {id(parameter): parameter for _, _, parameter in places}
    casts = dict(zip(own, _Cast.apply(dtype, *own.values())))
    try:
        for parameters, name, parameter in places:
            parameters[name] = casts[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


class _Calls:
    """Counts on the host in place of a ``num_batches_tracked``."""

    def __init__(self) -> None:
        self.count = 0

    def add_(self, count: int) -> None:
        self.count += count


@contextmanager
def counted_together(model: nn.Module) -> Iterator[None]:
    """Add to the counters of batch normalization at the end of the block, to all at once."""
    counters: list[tuple[dict[str, Any], Tensor, _Calls]] = [
        (layer._buffers, layer.num_batches_tracked, _Calls())
        for layer in model.modules()
        # a mean over all batches reads its counter
        if isinstance(layer, _BatchNorm) and layer.training and layer.momentum is not None
        # another library's layer might do more with it than these
        if type(layer).__module__.startswith(("torch.", "timm.")) and layer.num_batches_tracked is not None
    ]
    if not counters:
        yield
        return
    try:
        for buffers, _, calls in counters:
            buffers["num_batches_tracked"] = calls
        yield
    finally:
        for buffers, counter, _ in counters:
            buffers["num_batches_tracked"] = counter
    torch._foreach_add_([counter for _, counter, _ in counters], [calls.count for _, _, calls in counters])
