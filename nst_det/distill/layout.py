"""Memory layout of feature maps between the networks and the losses."""

from __future__ import annotations

import torch
from torch import Tensor


def by_positions(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) as losses read them fastest: on the CPU one channel after the other, in float32.

    Networks run channels last and in bf16; one copy here costs less than the strided reads of the losses.  On a
    GPU the maps stay as they are: there the copy is what would cost.
    """
    if maps.device.type != "cpu":
        return maps
    if maps.requires_grad or maps.is_contiguous():
        return maps.to(torch.float32, memory_format=torch.contiguous_format)
    # a teacher's many channels: image by image what is transposed stays in the processor's cache
    return torch.stack([image.contiguous() for image in maps]).float()
