"""The data of stage one: an image folder, decoded when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from nst_det.data.folders import ImageFolder, read_image_folder
from nst_det.distill.images import Batch, TrainingBatches, evaluation_batches
from nst_det.distill.store import ImageStore
from nst_det.distill.views import Views
from nst_det.errors import UserError
from nst_det.runtime.config import expand_path
from nst_det.runtime.processes import rank, share_of, world_size

GIB = 1 << 30


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
