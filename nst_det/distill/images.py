"""Images in, batches out; the batch of a step and its augmentation depend on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from nst_det.data.folders import ImageSplit
from nst_det.data.images import read_image
from nst_det.distill.augment import crop_and_jitter, shift_and_flip
from nst_det.errors import UserError
from nst_det.runtime.seeds import derive_seed, seeded

PROBED = 16


@dataclass
class Batch:
    """One batch before normalization: images (B, 3, S, S) uint8 RGB, labels (B,) int64."""

    images: Tensor
    labels: Tensor


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


class TrainingBatches(Dataset[Batch]):
    """The training batches by step: item k is the whole batch of step k.

    An epoch is a permutation seeded by (seed, epoch); batches run on over the end of an epoch.

    Args:
        store: training images.
        batch_size: images a step.
        seed: of the run.
        augment: the DATA.AUGMENT node.
    """

    def __init__(self, store: ImageStore, batch_size: int, seed: int, augment: CfgNode) -> None:
        self.store, self.batch_size, self.seed, self.augment = store, batch_size, seed, augment
        self._permutations: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Which images make the batch of ``step``: (B,) int64."""
        count, first = len(self.store), step * self.batch_size
        last = first + self.batch_size
        parts = []
        for epoch in range(first // count, (last - 1) // count + 1):
            start, stop = max(first - epoch * count, 0), min(last - epoch * count, count)
            parts.append(self._permutation(epoch)[start:stop])
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # a batch at the end of an epoch needs the next one's as well
            self._permutations = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            self._permutations[epoch] = torch.randperm(len(self.store), generator=generator)
        return self._permutations[epoch]

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices(step)
        labels = self.store.labels[indices]
        with seeded(self.seed, "augment", step):
            if self.augment.CROP_AREA or self.augment.COLOR_JITTER:
                images = crop_and_jitter(
                    [self.store[index] for index in indices.tolist()], self.store.size, self.augment
                )
            else:
                images = self.store.squares(indices)
            images = shift_and_flip(images, self.augment.SHIFT, self.augment.HFLIP)
        return Batch(images, labels)

    def steps(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last - 1``; the number of workers doesn't change them."""
        if workers == 0:
            yield from (self[step] for step in range(first, last))
            return
        loader = DataLoader(
            _ErrorsAsItems(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4,
        )
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item


class _ErrorsAsItems(Dataset["Batch | UserError"]):
    """Hands a user's error out of a worker as it is; a loader would wrap the worker's traceback into it."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def evaluation_batches(store: ImageStore, batch_size: int) -> Iterator[Batch]:
    """All images once, in order."""
    for start in range(0, len(store), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(store)))
        yield Batch(store.squares(rows), store.labels[rows])


class Normalizer:
    """uint8 batches to what networks take: float32, channels last, (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._mean = 255 * torch.tensor(mean, device=device)
        self._scale = 1 / (255 * torch.tensor(std, device=device))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to the same size in float32."""
        width = images.shape[3]
        pixels = images.to(self.device, non_blocking=True).permute(0, 2, 3, 1).float().contiguous()
        # as wide as a row: one value a channel would break the vector loops into threes
        pixels = pixels.sub_(self._mean.repeat(width, 1)).mul_(self._scale.repeat(width, 1))
        return pixels.permute(0, 3, 1, 2)
