"""The data of stage one: an image folder, decoded when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset

from nst_det.data.folders import ImageFolder, read_image_folder
from nst_det.distillation.augment import ImageStore, Views, crop_and_jitter, shift_and_flip
from nst_det.engine.config import expand_path
from nst_det.engine.distributed import rank, share_of, world_size
from nst_det.engine.loader import load
from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError

GIB = 1 << 30


@dataclass
class Batch:
    """One batch before normalization.

    Attributes:
        images: (B, 3, S, S) uint8 RGB.
        labels: (B,) int64.
        rows: (B,) int64, which views of which images these are (see :class:`~nst_det.distillation.augment.Views`); None
            where each step draws its own.
        names: B paths below the data's root, for messages.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor | None = None
    names: tuple[str, ...] = ()

    def split(self, parts: int) -> list[Batch]:
        """Equal parts one after another; B is a multiple of their number."""
        size = len(self.labels) // parts
        cuts = [slice(start, start + size) for start in range(0, size * parts, size)]
        rows = self.rows
        return [
            Batch(self.images[cut], self.labels[cut], None if rows is None else rows[cut], self.names[cut])
            for cut in cuts
        ]


class TrainingBatches(Dataset[Batch]):
    """The training batches by step: item k is the batch of step k, or this process's share of it.

    An epoch is a permutation seeded by (seed, epoch); batches run on over the end of an epoch.

    Args:
        store: training images.
        batch_size: images a step.
        seed: of the run.
        augment: the DATA.AUGMENT node.
        views: takes its views in place of augmentations drawn at each step.
        share: which of a step's images to give; None gives all.  An image is augmented the same whoever gets it.
    """

    def __init__(
        self,
        store: ImageStore,
        batch_size: int,
        seed: int,
        augment: CfgNode,
        views: Views | None = None,
        share: slice | None = None,
    ) -> None:
        self.store, self.batch_size, self.seed, self.augment, self.views = store, batch_size, seed, augment, views
        self.share = share or slice(0, batch_size)
        self._permutations: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Which images make the batch of ``step``: (B,) int64."""
        return torch.cat([indices for _, indices in self._parts(step)])

    def _parts(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """The epochs that the batch of ``step`` is in, and its images of each."""
        count, first = len(self.store), step * self.batch_size
        last = first + self.batch_size
        for epoch in range(first // count, (last - 1) // count + 1):
            start, stop = max(first - epoch * count, 0), min(last - epoch * count, count)
            yield epoch, self._permutation(epoch)[start:stop]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # a batch at the end of an epoch needs the next one's as well
            self._permutations = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            self._permutations[epoch] = torch.randperm(len(self.store), generator=generator)
        return self._permutations[epoch]

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices(step)[self.share]
        labels = self.store.labels[indices]
        names = tuple(self.store.split.paths[index] for index in indices.tolist())
        if self.views is not None:
            rows = torch.cat([self.views.rows(epoch, part) for epoch, part in self._parts(step)])[self.share]
            return Batch(self.views.images(rows), labels, rows, names)
        if self.augment.CROP_AREA or self.augment.COLOR_JITTER:
            images = self._cropped(step, indices)
        else:
            images = self.store.squares(indices)
        # a generator of its own: a worker may not touch that of a GPU
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", step))
        shift, flip = self.augment.SHIFT, self.augment.HFLIP
        images = shift_and_flip(images, shift, flip, self.batch_size, self.share, generator)
        return Batch(images, labels, names=names)

    def _cropped(self, step: int, indices: Tensor) -> Tensor:
        images = []
        with torch.random.fork_rng(devices=[]):
            for slot, index in enumerate(indices.tolist(), start=self.share.start):
                # each by itself: how many numbers an image draws depends on its shape
                torch.default_generator.manual_seed(derive_seed(self.seed, "crop", step, slot))
                images.append(crop_and_jitter([self.store[index]], self.store.size, self.augment))
        return torch.cat(images)

    def steps(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last - 1``; the number of workers doesn't change them."""
        return load(self, range(first, last), workers)


class ViewBatches(Dataset[Batch]):
    """The views in order: item k is the ``batch_size`` rows from row k on, the first row again after the last."""

    def __init__(self, views: Views, batch_size: int) -> None:
        self.views, self.batch_size = views, batch_size

    def __getitem__(self, first: int) -> Batch:
        rows = torch.arange(first, first + self.batch_size) % len(self.views)
        return Batch(self.views.images(rows), self.views.store.labels[rows % len(self.views.store)], rows)


class EvaluationBatches(Dataset[Batch]):
    """All images in order: item k is the ``batch_size`` images from image k on."""

    def __init__(self, store: ImageStore, batch_size: int) -> None:
        self.store, self.batch_size = store, batch_size

    def __getitem__(self, first: int) -> Batch:
        rows = torch.arange(first, min(first + self.batch_size, len(self.store)))
        return Batch(self.store.squares(rows), self.store.labels[rows])


def evaluation_batches(
    store: ImageStore, batch_size: int, share: slice | None = None, workers: int = 0
) -> Iterator[Batch]:
    """All images once, in order; or of these batches those in ``share``.  The number of workers doesn't change them."""
    firsts = range(0, len(store), batch_size)[share or slice(None)]
    # what is decoded already needs none
    return load(EvaluationBatches(store, batch_size), firsts, 0 if store.cached else workers)


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


class StageOneData:
    """Training batches by step, and the validation split.

    Args:
        config: the whole config of stage one.

    Raises:
        UserError: no image folder at DATA.ROOT, or nothing to validate on.
    """

    def __init__(self, config: CfgNode) -> None:
        self.config = config
        root = Path(expand_path(config.DATA.ROOT, "DATA.ROOT"))
        data = config.DATA
        self.folder: ImageFolder = read_image_folder(
            root, data.VAL_FRACTION, data.VAL_SEED, always_cut=data.VAL_FROM == "train"
        )
        if not len(self.folder.val):
            raise UserError(f"{root}: no images to validate on; add a val folder or set DATA.VAL_FRACTION")
        self.name = root.resolve().name
        self.classes = list(self.folder.classes)
        self.fingerprint = self.folder.fingerprint()
        self._stores: dict[str, ImageStore] = {}

    def train_steps(
        self, augment: CfgNode, batch_size: int, views: Views | None = None, accumulate: int = 1
    ) -> Callable[[int, int], Iterator[Batch]]:
        """``steps(first, last)``: this process's share of the training batches.

        Args:
            augment: a DATA.AUGMENT node.
            batch_size: images of a step, of all processes.
            views: takes its views in place of augmentations drawn at each step.
            accumulate: parts into which each share will be cut.

        Raises:
            UserError: the batch can't be shared out evenly.
        """
        share = share_of(batch_size, "SOLVER.IMS_PER_BATCH", accumulate)
        batches = TrainingBatches(self._train_store(augment), batch_size, self.config.SEED, augment, views, share)
        workers = self.config.DATALOADER.NUM_WORKERS
        return lambda first, last: batches.steps(first, last, workers)

    def views(self) -> Views | None:
        """The fixed views of the students' images; None where CACHE.VIEWS is 0."""
        node, augment = self.config.CACHE, self.config.DATA.AUGMENT
        return Views(self._train_store(augment), augment, node.VIEWS, node.VIEW_SEED) if node.VIEWS else None

    def validation(self) -> Iterator[Batch]:
        """This process's share of the validation split, once."""
        share = slice(rank(), None, world_size())
        batch_size, workers = self.config.TEST.IMS_PER_BATCH, self.config.DATALOADER.NUM_WORKERS
        return evaluation_batches(self._store("val", square=True), batch_size, share, workers)

    def description(self) -> dict[str, object]:
        """The data's part of a card."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self.folder.train),
            "validation_images": len(self.folder.val),
            "classes": len(self.classes),
        }

    def _train_store(self, augment: CfgNode) -> ImageStore:
        whole = bool(augment.CROP_AREA)
        return self._store("train, whole" if whole else "train", square=not whole)

    def _store(self, key: str, square: bool) -> ImageStore:
        if key not in self._stores:
            data = self.config.DATA
            split = self.folder.val if key == "val" else self.folder.train
            self._stores[key] = ImageStore(split, data.IMAGE_SIZE, data.CROP_RATIO, square, data.CACHE_GIB * GIB)
        return self._stores[key]
