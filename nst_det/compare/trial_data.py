"""A part of a comparison's data for a trial: copies of some images, or generated ones where there are none yet."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nst_det.compare.config import Comparison
from nst_det.data.folders import ImageSplit, read_image_folder
from nst_det.data.voc import VocDataset
from nst_det.detect.config import voc_roots
from nst_det.runtime.amounts import bytes_below
from nst_det.runtime.config import expand_path

# of the image folder, and of a VOC folder
TRAIN_IMAGES, VAL_IMAGES = 512, 128
TRAIN_SCENES, TEST_SCENES = 64, 16


@dataclass
class Parts:
    """Where the parts are, and how large they are beside the whole.

    Attributes:
        images: the image folder.
        voc: name of DATASETS.VOC -> root.
        val_share: of the images that stage one validates on, those in the trial.
        test_share: of the images that stage two tests on, those in the trial.
        distill_cache: bytes of decoded images that stage one will keep beyond those of the trial.
        detect_cache: the same of stage two.
        generate_seconds: what generating the data set will take; 0 where it is there, or is the user's.
        generate_bytes: its size on disk.
    """

    images: Path
    voc: dict[str, Path] = field(default_factory=dict)
    val_share: float = 1.0
    test_share: float = 1.0
    distill_cache: int = 0
    detect_cache: int = 0
    generate_seconds: float = 0.0
    generate_bytes: int = 0


def copy_parts(comparison: Comparison, folder: Path) -> Parts:
    """Make the parts below ``folder``.

    Raises:
        UserError: the data can't be read.
    """
    if comparison.generate and comparison.data_root is not None and not comparison.data_root.exists():
        return _generated(comparison, folder)
    config = comparison.distill
    root = Path(expand_path(config.DATA.ROOT, "DISTILL.DATA.ROOT"))
    if comparison.generate and comparison.data_root is not None:
        from nst_det.data.generate import CLASSIFICATION

        root = comparison.data_root / CLASSIFICATION
    whole = read_image_folder(root, config.DATA.VAL_FRACTION, config.DATA.VAL_SEED)
    parts = Parts(folder / "images")
    copied = [
        _copy_images(whole.train, whole.classes, parts.images / "train", TRAIN_IMAGES),
        _copy_images(whole.val, whole.classes, parts.images / "val", VAL_IMAGES),
    ]
    parts.val_share = copied[1] / max(len(whole.val), 1)
    parts.distill_cache = _kept(comparison, len(whole.train) + len(whole.val) - sum(copied))
    _copy_voc(comparison, folder / "voc", parts)
    return parts


def _kept(comparison: Comparison, more: int) -> int:
    data = comparison.distill.DATA
    return min(more * 3 * data.IMAGE_SIZE**2, int(data.CACHE_GIB * 2**30))


def _copy_images(split: ImageSplit, classes: Sequence[str], folder: Path, most: int) -> int:
    """Every n-th image, at least one of each class; how many."""
    chosen = set(range(0, len(split), max(1, len(split) // most)))
    labels = [int(label) for label in split.labels]
    chosen |= {labels.index(label) for label in set(labels)}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in sorted(chosen):
        source = Path(split.root) / split.paths[index]
        shutil.copyfile(source, folder / classes[labels[index]] / f"{index:08d}{source.suffix}")
    return len(chosen)


def _copy_voc(comparison: Comparison, folder: Path, parts: Parts) -> None:
    config = comparison.detect
    roots = dict(config.DATASETS.VOC)
    if comparison.generate and comparison.data_root is not None:
        from nst_det.data.generate import DETECTION

        own = dict.fromkeys(roots, comparison.data_root / DETECTION)
    else:
        own = {name: root for name in roots for root, _ in voc_roots(config, [name], "DATASETS")}
    counts = {"whole": 0, "part": 0}
    for name in (*config.DATASETS.TRAIN, *config.DATASETS.TEST):
        if name not in roots:
            continue
        data = VocDataset(own[name], roots[name]["SPLIT"])
        tests = name in config.DATASETS.TEST
        ids = data.ids[:: max(1, len(data.ids) // (TEST_SCENES if tests else TRAIN_SCENES))]
        if tests:
            counts["whole"] += len(data.ids)
            counts["part"] += len(ids)
        else:
            parts.detect_cache += _decoded(data)
        place = folder / name
        for inner in ("ImageSets/Main", "JPEGImages", "Annotations"):
            (place / inner).mkdir(parents=True)
        for id_ in ids:
            for source in (data.image_path(id_), data.annotation_path(id_)):
                shutil.copyfile(source, place / source.parent.name / source.name)
        (place / "ImageSets" / "Main" / f"{roots[name]['SPLIT']}.txt").write_text("\n".join(ids) + "\n")
        parts.voc[name] = place
    parts.test_share = counts["part"] / counts["whole"] if counts["whole"] else 1.0
    if parts.detect_cache > config.DATALOADER.CACHE_IMAGES_MB * 2**20:
        parts.detect_cache = 0


def _decoded(data: VocDataset) -> int:
    return int(sum(3 * np.prod((item.height, item.width)) for item in data.annotations()))


def _generated(comparison: Comparison, folder: Path) -> Parts:
    """A small data set of the same look, and from it what the whole one takes."""
    from nst_det.data.generate import CLASSIFICATION, DETECTION, generate_data, settings_from

    whole = settings_from(comparison.generate)
    small = replace(
        whole,
        classification_images=min(whole.classification_images, TRAIN_IMAGES // 4),
        classification_val_images=min(whole.classification_val_images, VAL_IMAGES // 2),
        detection_images=min(whole.detection_images, TRAIN_SCENES),
        detection_test_images=min(whole.detection_test_images, TEST_SCENES),
    )
    began = time.monotonic()
    root = generate_data(folder / "generated", small)
    seconds = time.monotonic() - began
    fields = ("classification_images", "classification_val_images", "detection_images", "detection_test_images")
    ratio = sum(getattr(whole, name) for name in fields) / sum(getattr(small, name) for name in fields)
    more = whole.classification_images + whole.classification_val_images
    return Parts(
        root / CLASSIFICATION,
        dict.fromkeys(comparison.detect.DATASETS.VOC, root / DETECTION),
        val_share=small.classification_val_images / whole.classification_val_images,
        test_share=small.detection_test_images / whole.detection_test_images,
        distill_cache=_kept(comparison, more - small.classification_images - small.classification_val_images),
        generate_seconds=seconds * ratio,
        generate_bytes=int(bytes_below(root) * ratio),
    )
