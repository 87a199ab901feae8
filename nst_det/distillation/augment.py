"""Decoded images and their augmentation; every draw comes from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from nst_det.data.folders import ImageSplit
from nst_det.engine.seeds import derive_seed

# images decoded to estimate the memory of all
PROBED = 16


class ImageStore:
    """Decoded images (3, H, W) uint8 of one split by index, kept in memory where at most ``limit`` bytes are needed.

    They are the central squares that evaluation sees, or with ``square=False`` whole images for random crops.
    """

    def __init__(self, split: ImageSplit, size: int, crop_ratio: float, square: bool, limit: float) -> None:
        self.split, self.size, self.crop_ratio, self.square = split, size, crop_ratio, square
        self.labels = torch.from_numpy(split.labels)
        self._images: Tensor | list[Tensor] = []
        self.cached = 0 < self._estimated_bytes() <= limit
        if not self.cached:
            return
        with ThreadPoolExecutor(max_workers=min(torch.get_num_threads() + 1, 16)) as pool:
            decoded = pool.map(self._decode, range(len(self)))
            if square:
                shape = (len(self), 3, size, size)
                self._images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
                for row, image in enumerate(decoded):
                    self._images[row] = image
            else:
                self._images = list(decoded)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index] if self.cached else self._decode(index)

    def squares(self, indices: Tensor) -> Tensor:
        """Return the images of a square store at ``indices`` (B,): (B, 3, S, S) uint8."""
        if isinstance(self._images, Tensor):
            return self._images[indices]
        return torch.stack([self[index] for index in indices.tolist()])

    def _estimated_bytes(self) -> int:
        if self.square:
            return len(self) * 3 * self.size**2
        some = range(0, len(self), max(len(self) // PROBED, 1))
        return int(sum(self._decode(index).numel() for index in some) / len(some) * len(self))

    def _decode(self, index: int) -> Tensor:
        image = torch.from_numpy(self.split.image(index)).permute(2, 0, 1).contiguous()
        return center_square(image, self.size, self.crop_ratio) if self.square else image


def center_square(image: Tensor, size: int, crop_ratio: float = 1.0) -> Tensor:
    """Return the central square (3, size, size) of an image (3, H, W) uint8, as at evaluation."""
    if image.shape[-2:] == (size, size) and crop_ratio == 1:
        return image
    resized = F.resize(image, [round(size / crop_ratio)], antialias=True)
    return F.center_crop(resized, [size, size])


def augmented(
    store: ImageStore, indices: Tensor, crop_seeds: Iterable[int], offsets: Tensor, mirrored: Tensor, augment: CfgNode
) -> Tensor:
    """Return the images (B, 3, S, S) uint8 cropped, colored, mirrored and moved by DATA.AUGMENT."""
    if augment.CROP_AREA or augment.COLOR_JITTER:
        whole = (store[index] for index in indices.tolist())
        images = crop_and_jitter(whole, store.size, crop_seeds, augment)
    else:
        images = store.squares(indices)
    return move(images, offsets, mirrored) if augment.SHIFT or augment.HFLIP else images


def crop_and_jitter(images: Iterable[Tensor], size: int, seeds: Iterable[int], augment: CfgNode) -> Tensor:
    """Return random crops with random colors (B, 3, size, size) of images (3, H, W) uint8."""
    steps: list[v2.Transform] = []
    if augment.CROP_AREA:
        area, aspect = tuple(augment.CROP_AREA), tuple(augment.CROP_ASPECT)
        steps.append(v2.RandomResizedCrop(size, scale=area, ratio=aspect, antialias=True))
    if augment.COLOR_JITTER:
        steps.append(v2.ColorJitter(*augment.COLOR_JITTER))
    transform, changed = v2.Compose(steps), []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds):
            # how many numbers an image draws depends on its shape, so each has a seed
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed)


def draw_moves(count: int, augment: CfgNode, *seed: int | str) -> tuple[Tensor, Tensor]:
    """Return for each image the rows and columns (2, count) by which to move it, and whether to mirror it (count,)."""
    # a generator of its own: a worker may not touch that of a GPU
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    offsets = torch.randint(-augment.SHIFT, augment.SHIFT + 1, (2, count), generator=generator, dtype=torch.int16)
    return offsets, torch.rand(count, generator=generator) < augment.HFLIP


def move(images: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some images (B, C, H, W), then move each by its offsets (2, B), borders reflected; channels last.

    The whole batch is one gather of pixels: about a millisecond for 64 images of 64 x 64, where single transforms
    take several.
    """
    count, channels, height, width = images.shape
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = _reflected(offsets[0, :, None].long() + torch.arange(height), height)
    columns = _reflected(offsets[1, :, None].long() + columns, width)
    rows = rows + height * torch.arange(count)[:, None]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    taken = pixels.index_select(0, (rows[:, :, None] * width + columns[:, None, :]).view(-1))
    return taken.view(count, height, width, channels).permute(0, 3, 1, 2)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 .. size - 1 at the border pixels."""
    return size - 1 - (size - 1 - positions.abs()).abs()


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

    def __getitem__(self, rows: Tensor | range) -> Tensor:
        """Return the pixels (B, 3, S, S) uint8 of rows (B,); after the last row comes the first."""
        rows = torch.as_tensor(rows) % len(self)
        indices = rows % len(self.store)
        seeds = (derive_seed(self.seed, "view", *divmod(row, len(self.store))) for row in rows.tolist())
        return augmented(self.store, indices, seeds, self._offsets[:, rows], self._mirrored[rows], self.augment)
