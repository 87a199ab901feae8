"""torchvision's ColorJitter for a whole batch on the device that trains, each image in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

# luma of ITU-R 601, as torchvision has it
GREY = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# of a blend: the image's factor for each channel of each channel, then that of each channel's mean
NUMBERS = 12


def draw_colors(jitter: Sequence[float], rng: Random) -> list[tuple[int, float]]:
    """Return kind and amount of each step for one image, in an order of its own, by DATA.AUGMENT.COLOR_JITTER."""
    *amounts, hue = jitter
    steps = [(kind, rng.uniform(max(0.0, 1 - amount), 1 + amount)) for kind, amount in enumerate(amounts)]
    steps += [(HUE, rng.uniform(-hue, hue))] if hue else []
    return sorted(steps, key=lambda _: rng.random())


def color_row(steps: Sequence[tuple[int, float]]) -> list[float]:
    """Return the numbers of one image's steps as :func:`jittered` takes them: its blends, then the turn of its hue."""
    row: list[float] = []
    for kind, amount in steps:
        # as many for all images: three before the hue and three after it, some of which change nothing
        row += _blend(kind, amount) if kind != HUE else 3 * _blend(BRIGHTNESS, 1.0)
    return [*row, dict(steps).get(HUE, 0.0)]


def _blend(kind: int, factor: float) -> list[float]:
    """Return what makes an image ``factor`` times itself and for the rest black, its mean grey, or its grey."""
    red, green, blue = ((1 - factor) * part for part in GREY)
    if kind == SATURATION:
        own = [factor + red, green, blue, red, factor + green, blue, red, green, factor + blue]
        return [*own, 0.0, 0.0, 0.0]
    own = [factor, 0.0, 0.0, 0.0, factor, 0.0, 0.0, 0.0, factor]
    return [*own, red, green, blue] if kind == CONTRAST else [*own, 0.0, 0.0, 0.0]


def jittered(images: Tensor, colors: Tensor) -> Tensor:
    """Return images (B, 3, H, W) 0..255 with other colors, as float32, by rows (B, R) of :func:`color_row`.

    Where float32 products are TF32, a tenth of a level is lost.
    """
    if images.device.type == "cpu" and len(images) > 1:
        # one by one they stay in the processor's cache
        result = torch.empty(images.shape)
        for number in range(len(images)):
            result[number] = jittered(images[number, None], colors[number, None])
        return result
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format).flatten(2)
    for number, blend in enumerate(colors[:, :-1].unflatten(1, (-1, NUMBERS)).unbind(1)):
        if number == 3:
            pixels = _with_hue(pixels, colors[:, -1:, None])
        own, of_means = blend[:, :9].unflatten(1, (3, 3)), blend[:, 9:, None]
        added = (of_means * pixels.mean(2, keepdim=True)).sum(1, keepdim=True)
        pixels = torch.bmm(own, pixels).add_(added).clamp_(0, 255)
    return pixels.view(images.shape)


def _with_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of pixels (B, 3, N) by ``shift`` (B, 1, 1) of a circle."""
    red, green, blue = pixels.split(1, dim=1)
    largest, smallest = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = largest - smallest
    of_green, of_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    sixths = torch.where(largest == red, green - blue, torch.where(largest == green, of_green, of_blue))
    sixths = sixths / chroma.where(chroma > 0, 1) + 6 * shift
    # HSV to RGB: each channel falls from the largest to the smallest value and rises again
    place = torch.cat([(sixths + start).remainder_(6) for start in (5, 3, 1)], dim=1)
    return largest - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
