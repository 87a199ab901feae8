"""The data of stage one: batches of an image folder, each a function of (seed, step)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.data.cifar import read_images
from nst_det.data.folders import ImageFolder, joined
from nst_det.distillation.augment import Changes, ImageStore, Views, changed, cut_out, draw_moves
from nst_det.distillation.config import image_roots
from nst_det.engine.config import expand_path
from nst_det.engine.device import default_device
from nst_det.engine.distributed import rank, share_of, world_size
from nst_det.engine.loader import load
from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError

GIB = 1 << 30
NO_CHANGES = Changes()


class Batch(NamedTuple):
    """One batch as it is decoded."""

    # (B, 3, S, S) uint8 RGB
    images: Tensor
    # (B,) int64
    labels: Tensor
    # (B,) int64, which view of which image each is; see Views
    rows: Tensor
    # paths below the data's root, for messages
    names: tuple[str, ...] = ()
    # what is left of the augmentation
    changes: Changes = NO_CHANGES

    def split(self, parts: int) -> list[Batch]:
        """Return equal parts one after another; B is a multiple of their number."""
        size = len(self.labels) // parts
        cuts = [slice(start, start + size) for start in range(0, size * parts, size)]
        return [
            Batch(self.images[cut], self.labels[cut], self.rows[cut], self.names[cut], self.changes.of(cut))
            for cut in cuts
        ]


class TrainingBatches:
    """Item k is the batch of step k, or this process's ``share`` of it; an image is augmented the same whoever gets it.

    An epoch is a permutation seeded by (seed, epoch); batches run on over the end of an epoch.  With ``views``, epoch e
    shows view e mod count of each image; without, each step draws its own augmentation.
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

    def rows(self, step: int) -> Tensor:
        """Return the rows of the batch of ``step``: (B,) int64."""
        count, first = len(self.store), step * self.batch_size
        epochs = torch.arange(first, first + self.batch_size) // count
        places = torch.arange(first, first + self.batch_size) % count
        indices = torch.cat(
            [_permutation(count, self.seed, epoch)[places[epochs == epoch]] for epoch in epochs.unique().tolist()]
        )
        return indices if self.views is None else epochs % self.views.count * count + indices

    def __getitem__(self, step: int) -> Batch:
        rows = self.rows(step)[self.share]
        indices = rows % len(self.store)
        if self.views is not None:
            images, changes = self.views[rows]
        else:
            slots = range(self.share.start, self.share.stop)
            seeds = (derive_seed(self.seed, "crop", step, slot) for slot in slots)
            offsets, mirrored = draw_moves(self.batch_size, self.augment, self.seed, "augment", step)
            offsets, mirrored = offsets[:, self.share], mirrored[self.share]
            images, changes = cut_out(self.store, indices, seeds, offsets, mirrored, self.augment)
        names = tuple(self.store.split.paths[index] for index in indices.tolist())
        return Batch(images, self.store.labels[indices], rows, names, changes)


# a batch at the end of an epoch needs the next one's as well
@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)


class EvaluationBatches:
    """All images in order: item k is the batch that begins with image k."""

    def __init__(self, store: ImageStore, batch_size: int) -> None:
        self.store, self.batch_size = store, batch_size

    def __getitem__(self, first: int) -> Batch:
        rows = torch.arange(first, min(first + self.batch_size, len(self.store)))
        return Batch(self.store.squares(rows), self.store.labels[rows], rows)


class Normalizer:
    """uint8 batches to what networks take: augmented, then float32, channels last, (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._mean = 255 * torch.tensor(mean, device=device)
        self._scale = 1 / (255 * torch.tensor(std, device=device))

    def __call__(self, images: Tensor, changes: Changes = NO_CHANGES) -> Tensor:
        """Return (B, 3, H, W) float32 for the same in uint8."""
        width = images.shape[3]
        images = changed(images.to(self.device, non_blocking=True), changes)
        pixels = images.permute(0, 2, 3, 1).float().contiguous()
        # as wide as a row: one value a channel would break the vector loops into threes
        pixels = pixels.sub_(self._mean.repeat(width, 1)).mul_(self._scale.repeat(width, 1))
        return pixels.permute(0, 3, 1, 2)


def load_images(source: Any, keys: Iterable[Any], config: CfgNode, device: torch.device) -> Iterator[Any]:
    """Give ``source[key]`` for each key in turn, made by DATALOADER.NUM_WORKERS: for a GPU by processes, ahead.

    On a CPU these would take the cores on which the networks compute; there the stores have as many threads.
    """
    return load(source, keys, 0 if device.type == "cpu" else config.DATALOADER.NUM_WORKERS)


def read_data(config: CfgNode, whole: bool = False) -> ImageFolder:
    """Return the images that a config of stage one names, with the students' labels, or with all (``whole``)."""
    found = _read_all(config)
    return found if whole else _labelled(found, config)


def _read_all(config: CfgNode) -> ImageFolder:
    data, cut = config.DATA, config.DATA.VAL_FROM == "train"
    roots = [expand_path(root, key) for key, root in image_roots(config)]
    _refuse_overlap(roots)
    return joined([read_images(root, data.VAL_FRACTION, data.VAL_SEED, cut, data.LABELS) for root in roots])


def _refuse_overlap(roots: Sequence[str]) -> None:
    """Refuse a folder that is or holds another one: its images would count twice, and be on both sides of the cut."""
    places = [Path(root).resolve() for root in roots]
    for second, first in itertools.permutations(range(len(roots)), 2):
        if places[first] in places[second].parents or (first < second and places[first] == places[second]):
            raise UserError(
                f"DATA.MORE_ROOTS: the images of {roots[second]} are in {roots[first]} already; name one of them"
            )


def read_probe(config: CfgNode) -> ImageFolder | None:
    """Return the labelled images by which features are judged; None where TEST.PROBE.ROOT names none."""
    root = expand_path(config.TEST.PROBE.ROOT, "TEST.PROBE.ROOT")
    found = read_images(root, config.DATA.VAL_FRACTION, config.DATA.VAL_SEED) if root else None
    if found is not None and not len(found.val):
        raise UserError(
            f"TEST.PROBE.ROOT {root}: no images to judge by; add a val folder, or a second image to a class"
        )
    return found


def _labelled(found: ImageFolder, config: CfgNode) -> ImageFolder:
    data = config.DATA
    if not data.PER_CLASS:
        return found
    try:
        train = found.train.with_labels(data.PER_CLASS, data.REST == "unlabelled", data.VAL_SEED)
    except UserError as error:
        uncut = config.clone()
        uncut.defrost()
        uncut.DATA.VAL_FRACTION = 0.0
        cut = len(_read_all(uncut).train) > len(found.train)
        raise UserError(f"{error}{f', or DATA.VAL_FRACTION {data.VAL_FRACTION:g}' if cut else ''}") from error
    return replace(found, train=train)


class StageOneData:
    """The images at DATA.ROOT: training batches by step, and the validation split.

    ``folder`` is what the students learn from; a teacher that is trained learns from ``whole``, which has all labels.
    """

    def __init__(self, config: CfgNode) -> None:
        self.config, data = config, config.DATA
        self.whole = _read_all(config)
        self.folder = _labelled(self.whole, config)
        if not len(self.folder.val):
            raise UserError(f"{self.folder.root}: no images to validate on; add a val folder or set DATA.VAL_FRACTION")
        self.name, self.classes = self.folder.name, list(self.folder.classes)
        self.fingerprint = self.folder.fingerprint()
        self.whole_fingerprint = self.whole.fingerprint() if self.whole is not self.folder else self.fingerprint
        self.normalize = Normalizer(data.MEAN, data.STD, default_device())
        self.probe = read_probe(config)
        self.probe_fingerprint = self.probe.fingerprint() if self.probe else ""
        self._stores: dict[tuple[str, bool], ImageStore] = {}

    def training(
        self, augment: CfgNode, solver: CfgNode, views: Views | None = None, whole: bool = False
    ) -> TrainingBatches:
        """Return this process's share of the students' training batches by step, or of the teacher's (``whole``)."""
        share = share_of(solver.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH", solver.ACCUMULATE)
        store, seed = self._training_store(augment, whole), self.config.SEED
        return TrainingBatches(store, solver.IMS_PER_BATCH, seed, augment, views, share)

    def views(self) -> Views | None:
        """Return the fixed views of the students' images; None where CACHE.VIEWS is 0."""
        node, augment = self.config.CACHE, self.config.DATA.AUGMENT
        return Views(self._training_store(augment), augment, node.VIEWS, node.VIEW_SEED) if node.VIEWS else None

    def evaluation(self, split: str) -> Iterator[Batch]:
        """Return this process's share of the batches of ``val``, or of the probe's ``neighbors`` or ``queries``."""
        store, batch_size = self._store(split, square=True), self.config.TEST.IMS_PER_BATCH
        firsts = range(0, len(store), batch_size)[rank() :: world_size()]
        batches = EvaluationBatches(store, batch_size)
        # images that are decoded already need no workers
        if store.cached:
            return map(batches.__getitem__, firsts)
        return load_images(batches, firsts, self.config, self.normalize.device)

    def description(self, whole: bool = False) -> dict[str, object]:
        """Return the data's part of a student's card, or of the teacher's (``whole``)."""
        return {
            "name": self.name,
            "fingerprint": self.whole_fingerprint if whole else self.fingerprint,
            "images": len((self.whole if whole else self.folder).train),
            "validation_images": len(self.folder.val),
            "classes": len(self.classes),
            "labels": self.config.DATA.LABELS,
            **({"probe": self.probe.root.resolve().name} if self.probe else {}),
        }

    def _training_store(self, augment: CfgNode, whole: bool = False) -> ImageStore:
        name = "whole" if whole and self.whole is not self.folder else "train"
        return self._store(name, square=not augment.CROP_AREA)

    def _store(self, name: str, square: bool) -> ImageStore:
        if (name, square) not in self._stores:
            data = self.config.DATA
            splits = {"val": self.folder.val, "train": self.folder.train, "whole": self.whole.train}
            if self.probe is not None:
                splits |= {"neighbors": self.probe.train, "queries": self.probe.val}
            threads = self.config.DATALOADER.NUM_WORKERS if self.normalize.device.type == "cpu" else 1
            self._stores[name, square] = ImageStore(
                splits[name], data.IMAGE_SIZE, data.CROP_RATIO, square, data.CACHE_GIB * GIB, threads
            )
        return self._stores[name, square]
