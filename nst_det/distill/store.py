"""Decoded images of one split, in memory where they fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nst_det.data.folders import ImageSplit
from nst_det.data.images import read_image

PROBED = 16


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
