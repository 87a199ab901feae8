"""Images and boxes of VOC folders as a detector takes them: resized, flipped, in the configured channel order."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset

from nst_det.data.annotation import VocAnnotation, usable_boxes
from nst_det.data.safe_io import shown_path
from nst_det.data.splits import JoinedVoc, hold_out, shared_images
from nst_det.data.voc import VocDataset, class_names
from nst_det.detection.augment import Augmentation, Drawn, resize, resized_shape
from nst_det.detection.config import listed_classes, set_names, voc_roots
from nst_det.engine.distributed import is_main_process, share_of
from nst_det.engine.loader import load
from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)


class SampleIndex(NamedTuple):
    """Which image, at which step, in which place of the batch."""

    image: int
    step: int
    slot: int


@dataclass
class StepBatchSampler:
    """The endless batches of steps ``start``, ``start + 1``, ...; of each, the ``share`` of this process.

    Every epoch is a permutation of all images; a batch may span two epochs.
    """

    size: int
    batch: int
    seed: int
    start: int = 0
    # whether each image is wider than high: wide and tall ones are not mixed in a batch, each kind waits until it fills
    # one (Detectron2's aspect ratio grouping)
    wide: Sequence[bool] | None = None
    share: slice | None = None

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        step = 0
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            for index in torch.randperm(self.size, generator=generator).tolist():
                bucket = waiting[self.wide is None or self.wide[index]]
                bucket.append(index)
                if len(bucket) < self.batch:
                    continue
                # skipping the steps that are done takes a microsecond an image, none is read for it
                if step >= self.start:
                    yield [SampleIndex(image, step, slot) for slot, image in enumerate(bucket)][
                        self.share or slice(None)
                    ]
                bucket.clear()
                step += 1


def data_classes(config: CfgNode, *, known_only: bool = False) -> tuple[str, ...]:
    """Return DATASETS.CLASSES, or the classes in the annotations of DATASETS.TRAIN (of TEST where there is none).

    ``known_only`` skips data sets that DATASETS.VOC doesn't have: Detectron2 knows others.
    """
    if config.DATASETS.CLASSES:
        return listed_classes(config)
    for part in ("TRAIN", "TEST"):
        names = [name for name in config.DATASETS[part] if name in config.DATASETS.VOC or not known_only]
        if names:
            opened = [VocDataset(root, split) for root, split in voc_roots(config, names, f"DATASETS.{part}")]
            return class_names(name for data in opened for item in data.annotations() for name in item.names)
    return ()


def boxes_to_train(annotation: VocAnnotation, use_difficult: bool) -> np.ndarray:
    """Return which of N boxes a detector learns from, (N,) bool; one that can't be used is logged."""
    keep, dropped = usable_boxes(annotation)
    for line in dropped:
        log.warning("%s; left out", line)
    return keep if use_difficult else keep & ~annotation.difficult


def open_voc(config: CfgNode, key: str, classes: Sequence[str]) -> list[VocDataset]:
    """Open the data sets of ``key``, such as DATASETS.TRAIN, with labels in the order of ``classes``."""
    names = config.DATASETS[key.split(".")[1]]
    if not names:
        raise UserError(f"{key} is empty; name data sets of DATASETS.VOC")
    return [VocDataset(root, split, classes) for root, split in voc_roots(config, names, key)]


def open_sets(config: CfgNode) -> dict[str, VocDataset]:
    """Open those of DATASETS.VOC that TRAIN, VAL and TEST name; a class that isn't trained is refused."""
    names = [name for name in set_names(config) if name in config.DATASETS.VOC]
    # all of them get the same classes
    classes = data_classes(config, known_only=True) if names else ()
    roots = voc_roots(config, names, "DATASETS")
    opened = {name: VocDataset(root, split, classes) for name, (root, split) in zip(names, roots)}
    for part in ("VAL", "TEST"):
        for name in (name for name in config.DATASETS[part] if name in opened):
            check_tested_classes(opened[name], f"DATASETS.{part} {name}")
    return opened


def check_tested_classes(data: VocDataset, key: str) -> None:
    """Refuse a data set with objects of a class that isn't trained: the figures would leave them out."""
    try:
        for item in data.annotations():
            data.labels(item)
    except UserError as error:
        raise UserError(f"{key}: {error}, or name all classes in DATASETS.CLASSES") from error


def warn_of_shared(train: Sequence[VocDataset], test: Sequence[VocDataset], key: str = "DATASETS.TEST") -> None:
    """Log that images are to be trained on and in ``key`` too."""
    shared = shared_images(train, test)
    if shared:
        learned, tested = map(shown_path, shared[0])
        where = f"{tested} is {learned}" if tested != learned else tested
        count = f"{len(shared)} of {sum(map(len, test))}"
        log.warning("%s: %s images are in DATASETS.TRAIN too (%s), which flatters the result", key, count, where)


def split_training(config: CfgNode, sets: Sequence[VocDataset]) -> tuple[list[VocDataset], JoinedVoc | None]:
    """Return what is left of each of DATASETS.TRAIN, and DATASETS.VAL, or what VAL_FRACTION keeps, to validate on.

    They are the same images whatever the engine, the method and the SEED.
    """
    if config.DATASETS.VAL:
        given = open_voc(config, "DATASETS.VAL", sets[0].classes)
        if is_main_process():
            warn_of_shared(sets, given, "DATASETS.VAL")
        return list(sets), JoinedVoc(tuple(given))
    fraction = config.DATASETS.VAL_FRACTION
    if not fraction:
        return list(sets), None
    left, kept = zip(*(hold_out(data, fraction, config.DATASETS.VAL_SEED) for data in sets))
    return list(left), JoinedVoc(kept)


@dataclass(frozen=True)
class Item:
    """One image and its boxes (N, 4) float64 xyxy, 0-based in its own pixels, with labels (N,) from 0."""

    data: VocDataset
    id: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray


def list_items(sets: Sequence[VocDataset], use_difficult: bool, filter_empty: bool) -> list[Item]:
    """Return all images of some data sets with the boxes to train on; ``filter_empty`` leaves out those without one."""
    items = []
    for data in sets:
        for item in data.annotations():
            keep = boxes_to_train(item, use_difficult)
            if keep.any() or not filter_empty:
                boxes, labels = item.boxes[keep].astype(np.float64), data.labels(item)[keep]
                items.append(Item(data, item.id, item.height, item.width, boxes, labels))
    if not items:
        raise UserError(
            f"{sets[0].root}: no image of {sets[0].split} has a box to train on; see nst-det check-data {sets[0].root}"
        )
    return items


class DetectionImages(Dataset[dict[str, Any]]):
    """Items by index, or in training by :class:`SampleIndex`, whose random draws depend on (seed, step, slot) alone."""

    def __init__(self, items: Sequence[Item], config: CfgNode, train: bool, seed: int = 0) -> None:
        self.items, self.train, self.seed = list(items), train, seed
        given = config.INPUT
        self.sizes = tuple(given.MIN_SIZE_TRAIN) if train else (given.MIN_SIZE_TEST,)
        self.largest = given.MAX_SIZE_TRAIN if train else given.MAX_SIZE_TEST
        self.augmentation = Augmentation(given)
        self.bgr = given.FORMAT == "BGR"
        self._cache: dict[int, np.ndarray] | None = None
        # with one size, what is kept is resized already
        self._fixed = len(set(self.sizes)) == 1 and not (train and self.augmentation.cuts)
        needed = 3 * sum(
            np.prod(self.shape(item, self.sizes[0])) if self._fixed else item.height * item.width for item in self.items
        )
        if train and needed <= config.DATALOADER.CACHE_IMAGES_MB * 2**20:
            self._cache = {}

    def __len__(self) -> int:
        return len(self.items)

    def shape(self, item: Item, size: int) -> tuple[int, int]:
        """Return (height, width) of an item whose shortest edge becomes ``size``, its longest at most MAX_SIZE."""
        return resized_shape(item.height, item.width, size, self.largest)

    def preload(self) -> None:
        """Decode all images that are to be kept, so that loader processes started from here share them."""
        if self._cache is not None:
            for index in range(len(self.items)):
                self._pixels(index)

    def __getitem__(self, place: SampleIndex | int) -> dict[str, Any]:
        if isinstance(place, int):
            return self._example(place, Drawn(self.shape(self.items[place], self.sizes[0])))
        # NumPy's old generator: what Detectron2's augmentation draws from this seed
        rng = np.random.RandomState(derive_seed(self.seed, "augment", place.step, place.slot) % 2**32)
        item = self.items[place.image]
        example = self._example(place.image, self.augmentation.draw(item.height, item.width, item.boxes, rng))
        # what the detector draws for it depends on its place in the whole batch, not on the process that has it
        return example | {"seed": derive_seed(self.seed, "boxes", place.step, place.slot)}

    def _example(self, index: int, drawn: Drawn) -> dict[str, Any]:
        item = self.items[index]
        image = drawn.pixels(self._pixels(index), self.bgr)
        example = {"image": _to_tensor(image), "height": item.height, "width": item.width, "image_id": item.id}
        if self.train:
            boxes, kept = self.augmentation.moved(drawn, item.boxes, item.height, item.width)
            example["boxes"] = torch.from_numpy(boxes[kept])
            example["labels"] = torch.from_numpy(item.labels[kept])
        return example

    def _pixels(self, index: int) -> np.ndarray:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        item = self.items[index]
        image = item.data.image(item.id)
        pixels = image[:, :, ::-1] if self.bgr else image
        if self._cache is not None:
            self._cache[index] = pixels = resize(pixels, *self.shape(item, self.sizes[0])) if self._fixed else pixels
        return pixels


def network_input(pixels: np.ndarray, config: CfgNode) -> torch.Tensor:
    """Return (H, W, 3) uint8 RGB as a detector takes it at test time: (3, h, w), resized, in INPUT.FORMAT."""
    height, width = pixels.shape[:2]
    size = resized_shape(height, width, config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    # channels are turned before resizing, as in training
    return _to_tensor(resize(pixels[:, :, ::-1] if config.INPUT.FORMAT == "BGR" else pixels, *size))


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def training_batches(
    config: CfgNode, sets: Sequence[VocDataset], seed: int, start: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the training batches of steps ``start``, ``start + 1``, ...; of several processes each gets its share."""
    share = share_of(config.SOLVER.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH", config.SOLVER.ACCUMULATE)
    items = list_items(sets, config.DATASETS.USE_DIFFICULT, config.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    images = DetectionImages(items, config, train=True, seed=seed)
    wide = [item.width > item.height for item in items] if config.DATALOADER.ASPECT_RATIO_GROUPING else None
    places = StepBatchSampler(len(items), config.SOLVER.IMS_PER_BATCH, seed, start, wide, share)
    if config.DATALOADER.NUM_WORKERS:
        images.preload()
    count, preset = sum(len(item.labels) for item in items), config.INPUT.AUGMENTATION
    log.info("%d images to train on, %d objects, INPUT.AUGMENTATION %s", len(items), count, preset)
    yield from load(images, places, config.DATALOADER.NUM_WORKERS, config.MODEL.DEVICE)


def runs_of_equals(items: Iterable[T], key: Callable[[T], Any], largest: int) -> Iterator[list[T]]:
    """Yield lists of at most ``largest`` items that follow each other and have the same key."""
    for _, run in itertools.groupby(items, key):
        while part := list(itertools.islice(run, largest)):
            yield part


def evaluation_batches(
    config: CfgNode, data: VocDataset | JoinedVoc, largest: int = 8, share: slice = slice(None)
) -> Iterator[list[dict[str, Any]]]:
    """Yield the ``share`` of the batches of a split, in which all images of equal size are taken together.

    Equal sizes need no padding to each other, so that an image's detections don't depend on its neighbors.
    """
    items = [
        Item(part, item.id, item.height, item.width, np.zeros((0, 4)), np.zeros(0, np.int64))
        for part in (data.sets if isinstance(data, JoinedVoc) else [data])
        for item in part.annotations()
    ]
    images = DetectionImages(items, config, train=False)
    shapes = [images.shape(item, images.sizes[0]) for item in items]
    batches = list(runs_of_equals(sorted(range(len(items)), key=shapes.__getitem__), shapes.__getitem__, largest))
    yield from load(images, batches[share], config.DATALOADER.NUM_WORKERS, config.MODEL.DEVICE)
