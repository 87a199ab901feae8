"""Augmentation of training batches.  Draws come from torch's generator of the CPU: seed it around these calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.transforms import v2


def shift_and_flip(
    images: Tensor,
    shift: int,
    flip: float,
    batch: int | None = None,
    share: slice | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each image by up to ``shift`` pixels each way (borders reflected), mirror it with probability ``flip``.

    The whole batch is one gather of pixels: about a millisecond for 64 images of 64 x 64, where single transforms
    take several.

    Args:
        images: (B, C, H, W).
        shift: pixels, less than H and W.
        flip: 0..1.
        batch: images in the whole batch, for which is drawn; B where these are all.
        share: which of the batch these are.
        generator: to draw from in place of torch's.

    Returns:
        (B, C, H, W) of the same type, channels last in memory.
    """
    count, share = batch or len(images), share or slice(None)
    offsets = torch.randint(-shift, shift + 1, (2, count), generator=generator)[:, share]
    mirrored = (torch.rand(count, generator=generator) < flip)[share]
    return moved(images, offsets, mirrored) if shift or flip else images


def moved(images: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some images, then move each (borders reflected).

    Args:
        images: (B, C, H, W).
        offsets: rows and columns (2, B) int64 by which to move, each less than H and W.
        mirrored: (B,) bool.

    Returns:
        (B, C, H, W) of the same type, channels last in memory.
    """
    count, channels, height, width = images.shape
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = _reflected(offsets[0, :, None] + torch.arange(height), height)
    columns = _reflected(offsets[1, :, None] + columns, width)
    rows = rows + height * torch.arange(count)[:, None]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    taken = pixels.index_select(0, (rows[:, :, None] * width + columns[:, None, :]).view(-1))
    return taken.view(count, height, width, channels).permute(0, 3, 1, 2)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Positions up to ``size - 1`` outside 0 .. size - 1, mirrored at the border pixels."""
    return size - 1 - (size - 1 - positions.abs()).abs()


def crop_and_jitter(images: Sequence[Tensor], size: int, augment: CfgNode) -> Tensor:
    """Random crops of random area and shape, then random colors, image by image.

    Args:
        images: (3, H, W) uint8 each.
        size: side of the result.
        augment: the DATA.AUGMENT node.

    Returns:
        (B, 3, size, size) uint8.
    """
    transform = crops_and_colors(size, augment)
    return torch.stack([transform(image) for image in images])


def crops_and_colors(size: int, augment: CfgNode) -> v2.Transform:
    """What :func:`crop_and_jitter` does to one image; ``size`` is the side of its crop in pixels."""
    steps: list[v2.Transform] = []
    if augment.CROP_AREA:
        area, aspect = tuple(augment.CROP_AREA), tuple(augment.CROP_ASPECT)
        steps.append(v2.RandomResizedCrop(size, scale=area, ratio=aspect, antialias=True))
    if augment.COLOR_JITTER:
        steps.append(v2.ColorJitter(*augment.COLOR_JITTER))
    return v2.Compose(steps)
