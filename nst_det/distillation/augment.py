"""Decoded images and their augmentation; every draw comes from a seed of its own.

A worker of the loader decodes and cuts (:func:`cut_out`); what changes pixels is drawn there, and done to the batch
on the device that trains (:func:`changed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.data.folders import ImageSplit
from nst_det.data.images import EncodedImage
from nst_det.distillation.color_jitter import color_row, draw_colors, jittered
from nst_det.engine.loader import together
from nst_det.engine.seeds import derive_seed

T = TypeVar("T")
# images read to estimate the memory of all
PROBED = 16
# boxes that are drawn before one from the middle is taken
ATTEMPTS = 10
END_OF_IMAGE = b"\xff\xd9"
# what asks OpenCV for 1 / n of a JPEG's sides; the color is that of the flag beside it
SCALES = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class ImageStore:
    """The images of one split by index, kept in memory where at most ``limit`` bytes are needed.

    They are the central squares that evaluation sees, or with ``square=False`` whole images for random crops; those of
    a batch are decoded by ``threads``.
    """

    def __init__(
        self, split: ImageSplit, size: int, crop_ratio: float, square: bool, limit: float, threads: int = 1
    ) -> None:
        self.split, self.size, self.crop_ratio, self.square, self.threads = split, size, crop_ratio, square, threads
        self.labels = torch.from_numpy(split.labels)
        self._squares = torch.empty(0)
        self._whole: list[np.ndarray | bytes] = []
        self.cached = 0 < self._estimated_bytes() <= limit
        if not self.cached:
            return
        everywhere = min(torch.get_num_threads() + 1, 16)
        if square:
            self._squares = self._batch(self._square, range(len(self)), everywhere)
        else:
            self._whole = together(self._read, range(len(self)), everywhere)
        if not any(isinstance(one, bytes) for one in self._whole):
            # what is decoded already is cut faster than handed to threads
            self.threads = 1

    def __len__(self) -> int:
        return len(self.split)

    def squares(self, indices: Tensor) -> Tensor:
        """Return the images of a square store at ``indices`` (B,): (B, 3, S, S) uint8."""
        if self.cached:
            return self._squares[indices]
        return self._batch(self._square, indices.tolist(), self.threads)

    def crops(
        self, indices: Tensor, generators: Iterable[Random], area: Sequence[float], aspect: Sequence[float]
    ) -> Tensor:
        """Return :meth:`crop` of the images at ``indices`` (B,), each by its generator: (B, 3, S, S) uint8."""
        drawn = list(zip(indices.tolist(), generators))
        return self._batch(lambda one: self.crop(one[0], area, aspect, one[1]), drawn, self.threads)

    def crop(self, index: int, area: Sequence[float], aspect: Sequence[float], rng: Random) -> np.ndarray:
        """Return a :func:`random_box` of a whole image, resized: (S, S, 3) uint8.

        A JPEG is decoded at the smallest scale that leaves S pixels of each side of the box, which is then cut at the
        pixels of that scale.
        """
        source, reduction = self._whole[index] if self.cached else self.split.source(index), 1
        if isinstance(source, bytes):
            image = self.split.encoded(index, source)
            top, left, height, width = random_box(image.height, image.width, area, aspect, rng)
            reduction = image.reduction(min(height, width) // self.size)
            pixels = decode(image, reduction)
        else:
            pixels = source
            top, left, height, width = random_box(len(pixels), pixels.shape[1], area, aspect, rng)
        bottom, right = (top + height) // reduction, (left + width) // reduction
        return resized(pixels[top // reduction : bottom, left // reduction : right], self.size, self.size)

    def _estimated_bytes(self) -> int:
        if self.square:
            return len(self) * 3 * self.size**2
        some = range(0, len(self), max(len(self) // PROBED, 1))
        read = [self._read(index) for index in some]
        return sum(len(one) if isinstance(one, bytes) else one.nbytes for one in read) * len(self) // max(len(some), 1)

    def _read(self, index: int) -> np.ndarray | bytes:
        """Return a whole image as it is kept: decoded, unless a crop of it may be decoded at a smaller scale."""
        source = self.split.source(index)
        if not isinstance(source, bytes):
            return source
        image = self.split.encoded(index, source)
        return source if image.reduction(min(image.height, image.width) // self.size) > 1 else decode(image)

    def _batch(self, make: Callable[[T], np.ndarray], items: Sequence[T], threads: int) -> Tensor:
        """Return what ``make`` gives of each item, (S, S, 3) uint8, one after another: (B, 3, S, S), channels last."""
        batch = np.empty((len(items), self.size, self.size, 3), np.uint8)

        def fill(row: int) -> None:
            batch[row] = make(items[row])

        together(fill, range(len(items)), threads)
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def _square(self, index: int) -> np.ndarray:
        source = self.split.source(index)
        pixels = decode(self.split.encoded(index, source)) if isinstance(source, bytes) else source
        return center_square(pixels, self.size, self.crop_ratio)


def decode(image: EncodedImage, reduction: int = 1) -> np.ndarray:
    """Return what :meth:`EncodedImage.pixels` does, of most JPEGs in two thirds of the time.

    OpenCV gives the same bits, but passes over some damage inside a JPEG for which Pillow refuses it.
    """
    # one that is cut short is Pillow's to refuse
    if image.is_plain_jpeg and image.data.endswith(END_OF_IMAGE):
        pixels = cv2.imdecode(np.frombuffer(image.data, np.uint8), cv2.IMREAD_COLOR_RGB | SCALES[reduction])
        if pixels is not None:
            return pixels
    return image.pixels(reduction)


def center_square(image: np.ndarray, size: int, crop_ratio: float = 1.0) -> np.ndarray:
    """Return the central square (size, size, 3) of an image (H, W, 3) uint8, as at evaluation."""
    short, (height, width, _) = round(size / crop_ratio), image.shape
    sides = short * height // min(height, width), short * width // min(height, width)
    top, left = (round((side - size) / 2) for side in sides)
    return resized(image, *sides)[top : top + size, left : left + size]


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) by torch's bilinear filter, which averages where it shrinks."""
    if image.shape[:2] == (height, width):
        return image
    # copied by NumPy, as torch would do it by threads of its own; channels last is three times as fast
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def random_box(
    height: int, width: int, area: Sequence[float], aspect: Sequence[float], rng: Random
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a part of an image, distributed as by torchvision's RandomResizedCrop."""
    for _ in range(ATTEMPTS):
        pixels = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(*map(math.log, aspect)))
        rows, columns = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return int(rng.random() * (height - rows + 1)), int(rng.random() * (width - columns + 1)), rows, columns
    rows, columns = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


class Changes(NamedTuple):
    """What is left to do to the pixels of B decoded images; None is nothing."""

    # (B, 2, S) int32: the rows, and the columns, of the decoded image that are seen
    places: Tensor | None = None
    # (B, R) float32, see ``color_row``
    colors: Tensor | None = None

    def of(self, cut: slice) -> Changes:
        """Return those of some of the images."""
        return Changes(*(part if part is None else part[cut] for part in self))


def cut_out(
    store: ImageStore, indices: Tensor, seeds: Iterable[int], offsets: Tensor, mirrored: Tensor, augment: CfgNode
) -> tuple[Tensor, Changes]:
    """Return decoded images (B, 3, S, S) uint8, and what DATA.AUGMENT changes in them.

    Image i has its crop and its colors by the i-th of ``seeds``, and its move by ``offsets`` (2, B), ``mirrored`` (B,).
    """
    generators = [Random(seed) for seed in seeds] if augment.CROP_AREA or augment.COLOR_JITTER else []
    colors = places = None
    if augment.COLOR_JITTER:
        colors = torch.tensor([color_row(draw_colors(augment.COLOR_JITTER, rng)) for rng in generators])
    if augment.SHIFT or augment.HFLIP:
        places = seen_places(offsets, mirrored, store.size)
    if not augment.CROP_AREA:
        return store.squares(indices), Changes(places, colors)
    return store.crops(indices, generators, augment.CROP_AREA, augment.CROP_ASPECT), Changes(places, colors)


def changed(images: Tensor, changes: Changes) -> Tensor:
    """Return images (B, 3, S, S) uint8 changed, on their device; float32 where colors are."""
    if changes.places is not None:
        images = move(images, changes.places.to(images.device, non_blocking=True))
    if changes.colors is not None:
        images = jittered(images, changes.colors.to(images.device, non_blocking=True))
    return images


def draw_moves(count: int, augment: CfgNode, *seed: int | str) -> tuple[Tensor, Tensor]:
    """Return for each image the rows and columns (2, count) by which to move it, and whether to mirror it (count,)."""
    # a generator of its own: a worker may not touch that of a GPU
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    offsets = torch.randint(-augment.SHIFT, augment.SHIFT + 1, (2, count), generator=generator, dtype=torch.int16)
    return offsets, torch.rand(count, generator=generator) < augment.HFLIP


def seen_places(offsets: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Return the rows and the columns (B, 2, size) seen of squares that are mirrored, then moved by offsets (2, B).

    Borders are reflected.
    """
    places = offsets.T[:, :, None].int() + torch.arange(size, dtype=torch.int32)
    places[mirrored, 1] = offsets[1, mirrored, None].int() + torch.arange(size - 1, -1, -1, dtype=torch.int32)
    # positions outside 0 .. size - 1
    return size - 1 - (size - 1 - places.abs()).abs()


def move(images: Tensor, places: Tensor) -> Tensor:
    """Return the seen rows and columns (B, 2, S) of images (B, C, S, S), channels last.

    The whole batch is one gather of pixels: about a millisecond for 64 images of 64 x 64, where single transforms
    take several.
    """
    count, channels, size, _ = images.shape
    rows = places[:, 0] + size * torch.arange(count, device=images.device)[:, None]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    taken = pixels.index_select(0, (rows[:, :, None] * size + places[:, None, 1]).view(-1))
    return taken.view(count, size, size, channels).permute(0, 3, 1, 2)


class Views:
    """``count`` fixed augmented views of each image, numbered in rows: row ``view * images + image``.

    A view depends on (seed, view, image) alone, not on its batch, so that the teacher's outputs for it can be kept.
    """

    def __init__(self, store: ImageStore, augment: CfgNode, count: int, seed: int) -> None:
        self.store, self.augment, self.count, self.seed = store, augment, count, seed
        moves = [draw_moves(len(store), augment, seed, "moves", view) for view in range(count)]
        self._offsets = torch.cat([offsets for offsets, _ in moves], dim=1)
        self._mirrored = torch.cat([mirrored for _, mirrored in moves])

    def __len__(self) -> int:
        return self.count * len(self.store)

    def __getitem__(self, rows: Tensor | range) -> tuple[Tensor, Changes]:
        """Return what :func:`cut_out` does, of rows (B,); after the last row comes the first."""
        rows = torch.as_tensor(rows) % len(self)
        indices = rows % len(self.store)
        seeds = (derive_seed(self.seed, "view", *divmod(row, len(self.store))) for row in rows.tolist())
        return cut_out(self.store, indices, seeds, self._offsets[:, rows], self._mirrored[rows], self.augment)
