"""Augmentation of training batches.  Draws come from torch's generator of the CPU: seed it around these calls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from nst_det.data.folders import ImageSplit
from nst_det.data.images import read_image
from nst_det.engine.seeds import derive_seed

PROBED = 16


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


def center_square(image: Tensor, size: int, crop_ratio: float = 1.0) -> Tensor:
    """(3, H, W) uint8 to its central square (3, size, size), as at evaluation."""
    if image.shape[-2:] == (size, size) and crop_ratio == 1:
        return image
    resized = F.resize(image, [round(size / crop_ratio)], antialias=True)
    return F.center_crop(resized, [size, size])


class ImageStore:
    """Decoded images of one split by index, kept in memory where they fit.

    Args:
        split: the files.
        size: side of the square that evaluation sees.
        crop_ratio: see ``DATA.CROP_RATIO``.
        square: keep only that square; False keeps whole images, for random crops.
        limit: bytes that may be kept in memory.

    Raises:
        UserError: an image that can't be decoded.
    """

    def __init__(self, split: ImageSplit, size: int, crop_ratio: float, square: bool, limit: float) -> None:
        self.split, self.size, self.crop_ratio, self.square = split, size, crop_ratio, square
        self.labels = torch.from_numpy(split.labels)
        self.cached = 0 < self.estimated_bytes() <= limit
        self._squares = torch.empty(0, dtype=torch.uint8)
        self._images: list[Tensor] = []
        if self.cached:
            self._fill()

    def __len__(self) -> int:
        return len(self.split)

    def estimated_bytes(self) -> int:
        """Bytes of all images decoded; whole images are estimated from some of them."""
        if self.square:
            return len(self) * 3 * self.size**2
        some = range(0, len(self), max(len(self) // PROBED, 1))
        return int(sum(self._decode(index).numel() for index in some) / len(some) * len(self))

    def _fill(self) -> None:
        with ThreadPoolExecutor(max_workers=min(torch.get_num_threads() + 1, 16)) as pool:
            images = pool.map(self._decode, range(len(self)))
            if self.square:
                shape = (len(self), 3, self.size, self.size)
                self._squares = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
                for row, image in enumerate(images):
                    self._squares[row] = image
            else:
                self._images = list(images)

    def _decode(self, index: int) -> Tensor:
        image = torch.from_numpy(read_image(self.split.path(index))).permute(2, 0, 1).contiguous()
        return center_square(image, self.size, self.crop_ratio) if self.square else image

    def __getitem__(self, index: int) -> Tensor:
        """(3, H, W) uint8."""
        if not self.cached:
            return self._decode(index)
        return self._squares[index] if self.square else self._images[index]

    def squares(self, indices: Tensor) -> Tensor:
        """The images of evaluation by their indices (B,): (B, 3, S, S) uint8."""
        if self.cached and self.square:
            return self._squares[indices]
        images = [self[index] for index in indices.tolist()]
        return torch.stack(images if self.square else [center_square(i, self.size, self.crop_ratio) for i in images])


class Views:
    """The views of all images, numbered in rows: row ``view * images + image``.

    A view's draws depend on (seed, view, image) alone, not on the batch that the image is in, so that what a teacher
    said about it can be kept.

    Args:
        store: training images.
        augment: the DATA.AUGMENT node.
        count: views of each image.
        seed: of the draws.
    """

    def __init__(self, store: ImageStore, augment: CfgNode, count: int, seed: int) -> None:
        self.store, self.augment, self.count, self.seed = store, augment, count, seed
        self._single = bool(augment.CROP_AREA or augment.COLOR_JITTER)
        self._moves: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Rows in all."""
        return self.count * len(self.store)

    def rows(self, epoch: int, indices: Tensor) -> Tensor:
        """The rows (B,) of images (B,) in an epoch: its view is ``epoch mod count``."""
        return epoch % self.count * len(self.store) + indices

    def images(self, rows: Tensor) -> Tensor:
        """The pixels of rows (B,): (B, 3, S, S) uint8."""
        indices = rows % len(self.store)
        images = self._cropped(rows) if self._single else self.store.squares(indices)
        if not self.augment.SHIFT and not self.augment.HFLIP:
            return images
        # a batch has images of two views where one epoch ends in it
        offsets = torch.empty((2, len(rows)), dtype=torch.long)
        mirrored = torch.empty(len(rows), dtype=torch.bool)
        views = rows // len(self.store)
        for view in views.unique().tolist():
            here = views == view
            all_offsets, all_mirrored = self._moves_of(view)
            offsets[:, here] = all_offsets[:, indices[here]].long()
            mirrored[here] = all_mirrored[indices[here]]
        return moved(images, offsets, mirrored)

    def _cropped(self, rows: Tensor) -> Tensor:
        transform = crops_and_colors(self.store.size, self.augment)
        images = []
        with torch.random.fork_rng(devices=[]):
            for row in rows.tolist():
                view, index = divmod(row, len(self.store))
                torch.default_generator.manual_seed(derive_seed(self.seed, "view", view, index))
                images.append(transform(self.store[index]))
        return torch.stack(images)

    def _moves_of(self, view: int) -> tuple[Tensor, Tensor]:
        """Offsets (2, N) and mirror flags (N,) of all images in a view."""
        if view not in self._moves:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "moves", view))
            count, shift = len(self.store), self.augment.SHIFT
            offsets = torch.randint(-shift, shift + 1, (2, count), generator=generator, dtype=torch.int16)
            self._moves[view] = offsets, torch.rand(count, generator=generator) < self.augment.HFLIP
        return self._moves[view]
