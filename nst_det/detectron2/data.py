"""VOC folders in Detectron2's catalogs, and training batches that are a function of the seed and the step alone."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.data.transforms import (
    AugInput,
    AugmentationList,
    ColorTransform,
    CropTransform,
    HFlipTransform,
    ResizeTransform,
    Transform,
    VFlipTransform,
)
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import Dataset

from nst_det.data.images import MAX_IMAGE_BYTES, image_size
from nst_det.data.safe_io import read_bytes, shown_path
from nst_det.data.splits import JoinedVoc
from nst_det.data.voc import VocDataset
from nst_det.detection.augment import Augmentation, Drawn, augments, check_augmentation, distorted
from nst_det.detection.data import SampleIndex, StepBatchSampler, boxes_to_train
from nst_det.engine.distributed import share_of
from nst_det.engine.loader import end_workers_with_us, load
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError

log = logging.getLogger(__name__)


class SeededImages(Dataset[Any]):
    """Dataset dicts through a mapper whose random draws depend on (seed, step, place) alone."""

    def __init__(self, dicts: Any, mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self.dicts, self.mapper, self.seed = dicts, mapper, seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, place: SampleIndex) -> Any:
        with seeded(self.seed, "augment", place.step, place.slot):
            return self.mapper(self.dicts[place.image])


class ImageMapper(DatasetMapper):
    """Detectron2's mapper, with the same results; an image that is too large or damaged is refused by its name.

    Where INPUT has CROP, SCALE_JITTER or PHOTOMETRIC, training images are changed as by the torchvision engine, by
    Detectron2's transforms.  ``cached`` keeps decoded images in memory, in every process of a loader its own; then it
    maps boxes only.
    """

    def __init__(self, cfg: CfgNode, is_train: bool = True, cached: bool = False) -> None:
        super().__init__(cfg, is_train)
        self._images: dict[str, np.ndarray] | None = {} if cached else None
        # a config of Detectron2's own reading was not checked
        check_augmentation(cfg.INPUT, "detection config")
        self._drawing = Augmentation(cfg.INPUT) if is_train and augments(cfg.INPUT) else None

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        if self._drawing is not None:
            dataset_dict = self._draw(dataset_dict, self._drawing)
        name = dataset_dict["file_name"]
        if self._images is None:
            with named_image(name):
                return super().__call__(dataset_dict)
        item = copy.deepcopy(dataset_dict)
        if name not in self._images:
            with named_image(name):
                self._images[name] = detection_utils.read_image(name, format=self.image_format)
                detection_utils.check_image_size(item, self._images[name])
        drawn = AugInput(self._images[name])
        transforms = self.augmentations(drawn)
        item["image"] = torch.as_tensor(np.ascontiguousarray(drawn.image.transpose(2, 0, 1)))
        self._transform_annotations(item, transforms, drawn.image.shape[:2])
        return item

    def _draw(self, dataset_dict: dict[str, Any], drawing: Augmentation) -> dict[str, Any]:
        """Set what is to be done to an image; return its dict without the annotations that will be too small."""
        height, width = dataset_dict["height"], dataset_dict["width"]
        # crowds are no objects
        objects = [item for item in dataset_dict.get("annotations", []) if not item.get("iscrowd")]
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        # the generator that seeds and Detectron2's own augmentation use
        drawn = drawing.draw(height, width, corners, np.random)
        self.augmentations = AugmentationList(transforms_of(drawn, height, width, self.image_format == "BGR"))
        _, kept = drawing.moved(drawn, corners, height, width)
        left = {"annotations": [item for item, stays in zip(objects, kept) if stays]}
        return dataset_dict | (left if "annotations" in dataset_dict else {})


def transforms_of(drawn: Drawn, height: int, width: int, bgr: bool) -> list[Transform]:
    """Return Detectron2's transforms for an image of that size, and its boxes, masks and keypoints."""
    whole = (0, 0, width, height)
    left, top, columns, rows = drawn.cut or whole
    # to cut polygons it wants shapely
    steps: list[Transform] = [CropTransform(left, top, columns, rows)] if drawn.cut not in (None, whole) else []
    steps.append(ResizeTransform(rows, columns, *drawn.size, Image.Resampling.BILINEAR))
    if drawn.flip != "none":
        horizontal = drawn.flip == "horizontal"
        steps.append(HFlipTransform(drawn.size[1]) if horizontal else VFlipTransform(drawn.size[0]))
    return [*steps, ColorTransform(partial(distorted, colors=drawn.colors, bgr=bgr))]


@contextmanager
def named_image(name: str) -> Iterator[None]:
    """Check the size of an image file before the block decodes it, and name the file in what goes wrong there."""
    # a path of Detectron2's own path manager may be elsewhere
    if Path(name).is_file():
        image_size(read_bytes(Path(name), MAX_IMAGE_BYTES, "image"), shown_path(name))
    try:
        yield
    except (OSError, SyntaxError, detection_utils.SizeMismatchError) as error:
        raise UserError(
            f"{shown_path(name)}: can't be used as an image ({error}); replace it or take it out of the list"
        ) from error


@dataclass
class TrainLoader:
    """The training loader: each iterator begins at the step ``batch_sampler.start``."""

    images: SeededImages
    batch_sampler: StepBatchSampler
    workers: int
    device: str

    def __iter__(self) -> Iterator[list[Any]]:
        return load(self.images, self.batch_sampler, self.workers, self.device)


def build_train_loader(cfg: CfgNode) -> Any:
    """Return a training loader by Detectron2's keys; its ``batch_sampler.start`` is the step at which it begins.

    The batch of a step is known without those before it: a resumed run sees what the undisturbed one saw, all methods
    of one seed see the same images with the same augmentation, and several processes share the batch of one process.
    """
    if cfg.SEED < 0 or cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        log.warning(
            "SEED %d, DATALOADER.SAMPLER_TRAIN %s: batches come from Detectron2's own loader, so a run that resumes "
            "sees other images than an undisturbed one",
            cfg.SEED,
            cfg.DATALOADER.SAMPLER_TRAIN,
        )
        with _none_to_train_on(cfg):
            loader = build_detection_train_loader(cfg, mapper=ImageMapper(cfg))
        end_workers_with_us(loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader)
        return loader
    with _none_to_train_on(cfg):
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    decoded = sum(3 * item["height"] * item["width"] for item in dicts)
    boxes_only = not (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS)
    mapper = ImageMapper(cfg, cached=boxes_only and decoded <= cfg.DATALOADER.CACHE_IMAGES_MB * 2**20)
    wide = [item["width"] > item["height"] for item in dicts] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    batch = cfg.SOLVER.IMS_PER_BATCH
    sampler = StepBatchSampler(len(dicts), batch, cfg.SEED, wide=wide, share=share_of(batch, "SOLVER.IMS_PER_BATCH"))
    # serialized once, so that loader processes share the memory
    images = SeededImages(DatasetFromList(dicts, copy=False), mapper, cfg.SEED)
    return TrainLoader(images, sampler, cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.DEVICE)


@contextmanager
def _none_to_train_on(cfg: CfgNode) -> Iterator[None]:
    """Refuse DATASETS.TRAIN in one line where Detectron2, in the block, asserts that there is an image to train on."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; name data sets of DATASETS.VOC")
    try:
        yield
    except AssertionError as error:
        raise UserError(f"DATASETS.TRAIN: {error} See nst-det check-data for the boxes that can be used") from error


def register_voc(
    name: str, root: str, split: str, classes: Sequence[str] | None = None, use_difficult: bool = True
) -> VocDataset:
    """Register one split of a VOC folder for ``DATASETS.TRAIN`` and ``TEST``; a taken name now means this folder.

    ``root`` holds ``Annotations``, ``split`` is a list in ``ImageSets/Main``, ``classes`` are in the order of their
    labels (None reads them from the annotations); ``use_difficult`` trains on objects marked so, as Detectron2 does,
    and evaluation never counts them.  The data set is also ``MetadataCatalog.get(name).voc``, where ``VocEvaluator``
    finds it.  A UserError names no such folder or list, or a bad annotation.
    """
    data = VocDataset(root, split, classes)
    register_images(name, data, use_difficult)
    return data


def register_images(name: str, data: VocDataset | JoinedVoc, use_difficult: bool = True) -> None:
    """Register data that is open already under a name, as :func:`register_voc` does."""
    sets = data.sets if isinstance(data, JoinedVoc) else (data,)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    # metadata can't be changed once set
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, lambda: [item for part in sets for item in voc_dicts(part, use_difficult)])
    MetadataCatalog.get(name).set(
        thing_classes=list(data.classes),
        dirname=str(sets[0].root),
        split=sets[0].split,
        evaluator_type="nst_voc",
        voc=data,
    )


def voc_dicts(data: VocDataset, use_difficult: bool = True) -> list[dict[str, Any]]:
    """Return a split as Detectron2's dataset dicts; boxes (xmin, ymin, xmax, ymax) are 0-based and continuous."""
    dicts = []
    for id_ in data.ids:
        item = data.annotation(id_)
        keep = boxes_to_train(item, use_difficult)
        annotations = [
            {"category_id": label, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
            for box, label in zip(item.boxes[keep].tolist(), data.labels(item)[keep].tolist())
        ]
        image = {"file_name": str(data.image_path(id_)), "image_id": id_, "height": item.height, "width": item.width}
        dicts.append({**image, "annotations": annotations})
    return dicts
