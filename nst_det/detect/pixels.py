"""The same pixels for two detectors that normalize and pad differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def translate_pixels(
    pixels: Tensor, student: nn.Module, teacher: nn.Module, sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Pixels normalized for the student as the teacher wants them; padding stays zero.

    Args:
        pixels: (B, 3, H, W).
        student: has ``pixel_mean``, ``pixel_std`` and ``input_format``.
        teacher: as ``student``.
        sizes: (height, width) of each image without padding.
    """
    (mean, std), (new_mean, new_std) = (_normalization(module) for module in (student, teacher))
    flip = _format(student) != _format(teacher)
    raw = pixels * std + mean
    changed = ((raw.flip(1) if flip else raw) - new_mean) / new_std
    out = torch.zeros_like(changed)
    for image, (height, width) in enumerate(sizes):
        out[image, :, :height, :width] = changed[image, :, :height, :width]
    return out


def take_same_pixels(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether both normalize alike, or one of them doesn't say how; on a GPU the answer takes two waits for it."""
    if not all(hasattr(module, "pixel_mean") and hasattr(module, "pixel_std") for module in (student, teacher)):
        return True
    pairs = zip(_normalization(student), _normalization(teacher))
    return _format(student) == _format(teacher) and all(torch.equal(*pair) for pair in pairs)


def _normalization(detector: Any) -> tuple[Tensor, Tensor]:
    return detector.pixel_mean, detector.pixel_std


def _format(detector: Any) -> str:
    return getattr(detector, "input_format", None) or "BGR"


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """Pixels (B, 3, H, W) with zeros right and below, so that H and W are multiples; below 2 nothing is padded."""
    height, width = pixels.shape[-2:]
    if multiple < 2 or (height % multiple == 0 and width % multiple == 0):
        return pixels
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))
