"""A finished detector, called with somebody's own images."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from nst_det.data.images import decode_image, read_image
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import config_of_run, defrosted, listed_classes
from nst_det.detection.data import network_input, resized_shape, runs_of_equals
from nst_det.detection.pipeline import place_detector
from nst_det.detection.predictions import Boxes, Find, Prediction
from nst_det.detection.sources import Picture
from nst_det.detection.tiles import Tiles
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.engine.device import set_cudnn_benchmark
from nst_det.engine.run_dir import WEIGHTS_FILE
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import DEFAULT, read_thresholds

# as at evaluation, so that the same images give the same bits
LARGEST_BATCH = 8


def load_run(
    folder: str | Path, device: str | torch.device = "cpu", threshold: float | None = None
) -> tuple[Detector, CfgNode, tuple[str, ...]]:
    """Return the detector of a finished run in evaluation mode, its config and its classes.

    A run of Detectron2 is read into the torchvision engine's detector, which computes the same.
    ``threshold`` is the least score of a detection; None takes the run's MODEL.ROI_HEADS.SCORE_THRESH_TEST.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a finished detector run")
    config = run_config(folder)
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; finish this run by train-det first")
    classes = tuple(saved_classes(weights)) or listed_classes(config)
    # Detectron2's runs keep the 0 that stands for as many as the data have
    if config.MODEL.ROI_HEADS.NUM_CLASSES not in (0, len(classes)):
        raise UserError(
            f"{weights}: names {len(classes)} classes, the run's config {config.MODEL.ROI_HEADS.NUM_CLASSES}; "
            "name a folder as train-det left it"
        )
    with defrosted(config):
        config.MODEL.WEIGHTS, config.MODEL.DEVICE, config.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
        config.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
        if threshold is not None:
            config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(threshold)
    detector = build_detector(config)
    load_weights(detector, config, classes, key="--run")
    place_detector(detector, config)
    # images have many sizes; a run before in this process may have trained with it
    set_cudnn_benchmark(False, detector.pixel_mean.device)
    return detector.eval(), config, classes


@dataclass(frozen=True)
class Found:
    """The N objects on one image, best first.

    Attributes:
        boxes: (N, 4) float32, xmin ymin xmax ymax in pixels of the image, continuous from its upper left corner.
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64, indices into the detector's ``classes``.
        names: their classes, N.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


class ImageDetector:
    """A finished detector, called with one image at a time; :func:`nst_det.load_detector` makes it.

    Attributes:
        classes: names of the classes by label.
        thresholds: least score of a detection by class, 0 to 1.
        chosen: where they are from: ``given``, ``validation`` (the best F1 there; a class of which nothing was found
            there has the default), or ``default``.
        tile: side of a tile in pixels of the image, and of what the network sees of it; None without tiles.
    """

    def __init__(
        self,
        find: Find,
        classes: Sequence[str],
        best: Mapping[str, float],
        sizes: tuple[int, int],
        threshold: float | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        """``find`` gives all detections of some images, and ``best`` are the thresholds of best F1, {} for none.

        ``sizes`` are the shortest side that images are resized to, and the longest that they have at most.
        """
        self._find, self.classes = tiles.around(find) if tiles else find, tuple(classes)
        self.tile = (tiles.side, resized_shape(tiles.side, tiles.side, *sizes)[0]) if tiles else None
        if threshold is None:
            self.thresholds = {name: best.get(name, DEFAULT) for name in classes}
        else:
            self.thresholds = dict.fromkeys(classes, threshold)
        self.chosen = "given" if threshold is not None else "validation" if best else "default"

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Found:
        """Return the objects on an image: a path, a PIL image, or an (H, W, 3) uint8 RGB array.

        Raises:
            UserError: an image that can't be read, or an array of another shape or type.
        """
        (all_found,) = self.predict([Picture("", Path(), _pixels(image))])
        found = all_found.above(self.least_scores())
        names = tuple(self.classes[label] for label in found.labels.tolist())
        return Found(found.boxes, found.scores, found.labels, names)

    def least_scores(self, wanted: Iterable[str] | None = None) -> np.ndarray:
        """Return the least score of each label, (K,) float64; infinite for a class that isn't ``wanted``."""
        wanted = self.classes if wanted is None else set(wanted)
        return np.array([self.thresholds[name] if name in wanted else np.inf for name in self.classes])

    def predict(self, pictures: Iterable[Picture]) -> Iterator[Prediction]:
        """Yield all detections on pictures, in their order, also those below the thresholds."""
        waiting: deque[Picture] = deque()

        def pixels() -> Iterator[np.ndarray]:
            for picture in pictures:
                waiting.append(picture)
                yield picture.pixels

        for found in self._find(pixels()):
            yield Prediction(waiting.popleft(), *found)


def load_detector(
    folder: str | Path, device: str | torch.device = "cpu", threshold: float | None = None, tiles: Tiles | None = None
) -> ImageDetector:
    """Return the detector of a finished run, with the thresholds that its validation split chose unless one is given.

    With ``tiles`` images that are larger than one are looked at tile by tile.
    """
    # lower scores are found too: they tell what a lower threshold would give
    lowest = run_config(Path(folder)).MODEL.ROI_HEADS.SCORE_THRESH_TEST
    detector, config, classes = load_run(folder, device, None if threshold is None else min(threshold, lowest))
    find = partial(find_by_run, detector, config)
    best = {name: one.score for name, one in read_thresholds(folder).items()}
    sizes = config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST
    return ImageDetector(find, classes, best, sizes, threshold, tiles)


def _pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        data = io.BytesIO()
        try:
            # so that depth, palette and EXIF orientation are read as those of a file
            image.save(data, "PNG", compress_level=0, exif=image.info.get("exif", b""))
        except OSError as error:
            raise UserError(f"image: of mode {image.mode}; convert it to 8-bit RGB") from error
        return decode_image(data.getvalue(), "image")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"image: {got}; give a path, a PIL image, or an (H, W, 3) uint8 array in RGB")
    return image


def run_config(folder: Path) -> CfgNode:
    """Return the torchvision engine's config of a run, by either engine."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml in it; name the folder of a finished detector run")
    return config_of_run(path)


@torch.no_grad()
def find_by_run(detector: Detector, config: CfgNode, images: Iterable[np.ndarray]) -> Iterator[Boxes]:
    """Yield the detections on images (H, W, 3) uint8 RGB; those that follow each other share a batch if they can."""
    items = ({"image": network_input(x, config), "height": x.shape[0], "width": x.shape[1]} for x in images)
    for batch in runs_of_equals(items, lambda item: item["image"].shape, LARGEST_BATCH):
        for found in detector(batch):
            yield Boxes(*(found[name].cpu().numpy() for name in ("boxes", "labels", "scores")))
