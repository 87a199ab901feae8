"""Networks from backbone files, and what they make of images, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nst_det.backbones import Card, bottomup_from_file, load_card
from nst_det.detect.predict import find_sources, read_sources
from nst_det.errors import UserError

MOST_IMAGES = 64
BATCH = 8


@dataclass(frozen=True)
class Looked:
    """A network and its maps on the images.

    Attributes:
        name: for people.
        card: of its backbone file.
        maps: by level, (I, C, H, W) float32.
    """

    name: str
    card: Card
    maps: dict[str, Tensor]


def read_squares(paths: Sequence[str], size: int) -> tuple[list[str], Tensor]:
    """Names and pixels of images, each one's central square.

    Args:
        paths: images, and folders of images.
        size: side of the squares, pixels.

    Returns:
        I names, and (I, 3, size, size) uint8, RGB.

    Raises:
        UserError: one can't be read, or there are more than :data:`MOST_IMAGES`.
    """
    sources = find_sources(paths)
    if len(sources) > MOST_IMAGES or any(source.is_video for source in sources):
        raise UserError(f"--image: {len(sources)} files; name at most {MOST_IMAGES}, and no video")
    names, squares = [], []
    for id_, _, pixels in read_sources(sources):
        names.append(id_)
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True)
        squares.append(F.center_crop(image, [size, size]))
    return names, torch.stack(squares)


@torch.no_grad()
def look_at(weights: str, images: Tensor) -> Looked:
    """Run a backbone file's network on images, normalized as its card says.

    Args:
        weights: ``backbone://NAME`` or a backbone file.
        images: (I, 3, S, S) uint8, RGB.

    Raises:
        UserError: it can't be read.
    """
    card = load_card(weights)
    model = bottomup_from_file(weights, list(card.levels)).eval()
    pixels = card.input
    mean, std = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    parts: list[dict[str, Tensor]] = []
    for batch in images.split(BATCH):
        ordered = batch.flip(1) if pixels["channel_order"] == "BGR" else batch
        parts.append(model((ordered / 255 - mean) / std))
    maps = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
    method = f" ({card.method})" if card.method else ""
    return Looked(f"{weights.rpartition('/')[2].removesuffix('.safetensors')}{method}", card, maps)


def common_levels(networks: Sequence[Looked], wanted: Sequence[str]) -> list[str]:
    """The levels to look at: those that all networks have, or the wanted ones.

    Raises:
        UserError: a wanted level that one lacks, or none in common.
    """
    for level in wanted:
        for network in networks:
            if level not in network.maps:
                raise UserError(f"--levels: {network.name} has no {level}; it has {', '.join(network.maps)}")
    levels = list(wanted) or [level for level in networks[0].maps if all(level in n.maps for n in networks)]
    if not levels:
        raise UserError("--weights: these networks have no level in common")
    return levels
