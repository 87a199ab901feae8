"""VOC roots by name in Detectron2's catalogs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from nst_det.data.holdout import JoinedVoc
from nst_det.data.voc import VocDataset
from nst_det.detect.dataset import boxes_to_train

log = logging.getLogger(__name__)


def register_voc(
    name: str, root: str, split: str, classes: Sequence[str] | None = None, use_difficult: bool = True
) -> VocDataset:
    """Register one split of a VOC folder; a name that is taken already now means this folder.

    Args:
        name: for ``DATASETS.TRAIN`` and ``TEST``.
        root: the folder that holds ``Annotations``.
        split: a list in ``ImageSets/Main``.
        classes: class names in the order of their labels; None reads them from the annotations.
        use_difficult: train on objects marked ``difficult`` too, as Detectron2 does.  Evaluation never counts them.

    Returns:
        The data set; it is also ``MetadataCatalog.get(name).voc``, where ``VocEvaluator`` finds it.

    Raises:
        UserError: no such folder or list, or a bad annotation.
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
    """A split as Detectron2's dataset dicts.

    Boxes are 0-based continuous (xmin - 1, ymin - 1, xmax, ymax); those without area are left out, with a warning.
    """
    dicts = []
    for id_ in data.ids:
        item = data.annotation(id_)
        keep = boxes_to_train(item, use_difficult)
        annotations = [
            {"category_id": label, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
            for box, label in zip(item.boxes[keep].tolist(), data.labels(item)[keep].tolist())
        ]
        dicts.append(
            {
                "file_name": str(data.image_path(id_)),
                "image_id": id_,
                "height": item.height,
                "width": item.width,
                "annotations": annotations,
            }
        )
    return dicts
