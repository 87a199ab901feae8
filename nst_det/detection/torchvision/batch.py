"""A batch of images and objects, padded to equal sizes on the device that computes with it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nst_det.engine.seeds import derive_seed

# of a padded object
NO_OBJECT = -1


class Truth(NamedTuple):
    """What a batch of B images is trained on; images with fewer than M objects have rows of label :data:`NO_OBJECT`."""

    boxes: Tensor  # (B, M, 4) float32 xyxy in pixels
    labels: Tensor  # (B, M) int64 from 0
    seeds: Tensor  # (B, 4) int32, two each of the choice of anchors and of proposals

    @property
    def real(self) -> Tensor:
        """Return (B, M) whether there is an object."""
        return self.labels != NO_OBJECT


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU through pinned memory, which the host doesn't wait for."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def limits_of(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return (B, 4) float64: width, height, width, height of images of (height, width)."""
    return torch.tensor([[width, height] * 2 for height, width in sizes], dtype=torch.float64)


def read_truth(batch: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[Tensor, Truth]:
    """Return the images' limits (B, 4), as :func:`limits_of`, and their objects, copied to the device in one go.

    An item without a ``seed`` gets one from torch's generator of the CPU.
    """
    limits = limits_of([tuple(item["image"].shape[-2:]) for item in batch])
    seeds = [int(item["seed"]) if "seed" in item else int(torch.randint(2**62, ())) for item in batch]
    drawn = [[derive_seed(seed, choice) for choice in ("anchors", "proposals")] for seed in seeds]
    halves = [[seed >> bits & 0x7FFFFFFF for seed in of_image for bits in (0, 31)] for of_image in drawn]
    most = max(1, *(len(item["boxes"]) for item in batch))
    objects = torch.zeros(len(batch), most, 5, dtype=torch.float64)
    objects[..., 4] = NO_OBJECT
    for rows, item in zip(objects, batch):
        count = len(item["boxes"])
        rows[:count, :4], rows[:count, 4] = item["boxes"], item["labels"]
    # float64 holds each of them exactly
    table = to_device(torch.cat((limits, torch.tensor(halves, dtype=torch.float64), objects.flatten(1)), dim=1), device)
    limits, numbers, objects = table.split((4, 4, 5 * most), dim=1)
    objects = objects.unflatten(1, (most, 5))
    return limits.float(), Truth(objects[..., :4].float(), objects[..., 4].long(), numbers.int())


def stack_images(images: Sequence[Tensor], height: int, width: int, device: torch.device) -> Tensor:
    """Return (B, 3, height, width) on the device of images (3, h, w), with zeros right and below.

    To a GPU they are copied in one go; without another copy on the host if they follow each other in one buffer, as a
    loader leaves them.
    """
    shapes = [image.shape for image in images]
    if device.type == "cuda" and all(image.device.type == "cpu" for image in images):
        sizes = [image.numel() for image in images]
        parts = to_device(_flat(images), device).split(sizes)
        images = [part.view(shape) for part, shape in zip(parts, shapes)]
    stacked = torch.zeros(len(images), 3, height, width, dtype=images[0].dtype, device=device)
    torch._foreach_copy_([rows[:, :h, :w] for rows, (_, h, w) in zip(stacked, shapes)], list(images))
    return stacked


def _flat(images: Sequence[Tensor]) -> Tensor:
    """Return all values of images one after the other; of images that lie so in memory a view."""
    first = images[0]
    ends = itertools.accumulate((image.numel() for image in images), initial=first.storage_offset())
    if all(
        image.is_contiguous()
        and image.dtype == first.dtype
        and image.storage_offset() == end
        and image.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for image, end in zip(images, ends)
    ):
        return first.as_strided((sum(image.numel() for image in images),), (1,))
    return torch.cat([image.flatten() for image in images])
