"""The data of stage one: an image folder, decoded when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from nst_det.data.folders import ImageFolder, read_image_folder
from nst_det.distill.images import Batch, ImageStore, TrainingBatches, evaluation_batches
from nst_det.errors import UserError
from nst_det.runtime.config import expand_path

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
        self.folder: ImageFolder = read_image_folder(root, config.DATA.VAL_FRACTION)
        if not len(self.folder.val):
            raise UserError(f"{root}: no images to validate on; add a val folder or set DATA.VAL_FRACTION")
        self.name = root.resolve().name
        self.classes = list(self.folder.classes)
        self.fingerprint = self.folder.fingerprint()
        self._stores: dict[str, ImageStore] = {}

    def train_steps(self, augment: CfgNode, batch_size: int) -> Callable[[int, int], Iterator[Batch]]:
        """``steps(first, last)``: the training batches under an augmentation (a DATA.AUGMENT node)."""
        whole = bool(augment.CROP_AREA)
        store = self._store("train, whole" if whole else "train", square=not whole)
        batches = TrainingBatches(store, batch_size, self.config.SEED, augment)
        workers = self.config.DATALOADER.NUM_WORKERS
        return lambda first, last: batches.steps(first, last, workers)

    def validation(self) -> Iterator[Batch]:
        """The validation split, once."""
        return evaluation_batches(self._store("val", square=True), self.config.TEST.IMS_PER_BATCH)

    def description(self) -> dict[str, object]:
        """The data's part of a card."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self.folder.train),
            "validation_images": len(self.folder.val),
            "classes": len(self.classes),
        }

    def _store(self, key: str, square: bool) -> ImageStore:
        if key not in self._stores:
            data = self.config.DATA
            split = self.folder.val if key == "val" else self.folder.train
            self._stores[key] = ImageStore(split, data.IMAGE_SIZE, data.CROP_RATIO, square, data.CACHE_GIB * GIB)
        return self._stores[key]
