"""Batch normalization over the images of all processes, on the CPU too, where torch's own refuses to work."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nst_det.engine.distributed import world_size


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's on a GPU.  On the CPU the same by gloo, and with a single process plain batch normalization."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if not self.training or world_size() == 1:
            plain: Tensor = _BatchNorm.forward(self, x)
            return plain
        axes, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        values = x.float()
        sums = _Sum.apply(torch.cat([values.sum(axes), values.new_tensor([values.numel() / values.shape[1]])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # in a second pass: a difference of two large sums would lose its digits
        centered = values - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        scaled = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)


class _WithAct(SyncBatchNormAct, SyncBatchNorm):
    """timm's layer of normalization, dropout and activation in one; its normalization is the class above."""


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace all batch normalization by one over all processes, of the same values and names."""
    converted: nn.Module = convert_sync_batchnorm(module)
    for layer in converted.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            # the class alone differs: parameters, buffers and hooks stay
            layer.__class__ = _WithAct if isinstance(layer, SyncBatchNormAct) else SyncBatchNorm
    return converted
