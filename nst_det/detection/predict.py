"""A finished detector on somebody's own images and videos."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from nst_det.data.images import EXTENSIONS, decode_image, read_image
from nst_det.data.safe_io import shown_path
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import config_of_run, defrosted, listed_classes
from nst_det.detection.data import network_input, runs_of_equals
from nst_det.detection.pipeline import place_detector
from nst_det.detection.predictions import Prediction
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.engine.run_dir import WEIGHTS_FILE
from nst_det.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
KINDS = (*EXTENSIONS, *VIDEO_EXTENSIONS)
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
    if len(classes) != config.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(
            f"{weights}: names {len(classes)} classes, the run's config {config.MODEL.ROI_HEADS.NUM_CLASSES}; "
            "name a folder as train-det left it"
        )
    with defrosted(config):
        config.MODEL.WEIGHTS, config.MODEL.DEVICE, config.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
        if threshold is not None:
            config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(threshold)
    detector = build_detector(config)
    load_weights(detector, config, classes, key="--run")
    place_detector(detector, config)
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
        detector: the network, in evaluation mode.
        config: of its run.
    """

    def __init__(self, detector: Detector, config: CfgNode, classes: tuple[str, ...]) -> None:
        self.detector, self.config, self.classes = detector, config, classes

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Found:
        """Return the objects on an image: a path, a PIL image, or an (H, W, 3) uint8 RGB array.

        Raises:
            UserError: an image that can't be read, or an array of another shape or type.
        """
        (found,) = predict(self.detector, self.config, [("", Path(), _pixels(image))])
        names = tuple(self.classes[label] for label in found.labels.tolist())
        return Found(found.boxes, found.scores, found.labels, names)


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


def find_sources(paths: Sequence[str | Path]) -> list[Path]:
    """Return the images and videos that a user names: files, and those directly in folders, sorted by name.

    The stem of a file names what is written for it, so no two may share one.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _is_source(file) and not file.name.startswith(".")]
            if not inside:
                raise UserError(
                    f"{shown_path(path)}: no image or video in this folder ({', '.join(KINDS)}); name another one"
                )
            found += inside
        elif not path.exists():
            raise UserError(f"{shown_path(path)}: no such file or folder; name images, folders or a video")
        elif not _is_source(path):
            raise UserError(f"{shown_path(path)}: neither an image nor a video ({', '.join(KINDS)}); convert it")
        else:
            found.append(path)
    of_stem: dict[str, Path] = {}
    for path in found:
        twin = of_stem.setdefault(path.stem, path)
        if twin != path:
            raise UserError(
                f"{shown_path(path)}: has the same name as {shown_path(twin)}, and both would be written as "
                f"{path.stem}; rename one, or predict them one after the other"
            )
    return list(of_stem.values())


def _is_source(path: Path) -> bool:
    return path.suffix.lower() in KINDS


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS


def read_frames(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number from 1, (H, W, 3) uint8 RGB) of each ``every``-th frame of a video, beginning with the first."""
    video = cv2.VideoCapture(str(path))
    try:
        number = 0
        while video.grab():
            number += 1
            if (number - 1) % every == 0:
                done, frame = video.retrieve()
                if not done:
                    raise UserError(f"{shown_path(path)}: frame {number} can't be decoded; convert the video again")
                yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number:
            raise UserError(f"{shown_path(path)}: can't be read as a video; convert it to MP4 (H.264)")
    finally:
        video.release()


def read_sources(
    sources: Iterable[Path], every: int = 1, unusable: Callable[[UserError], None] | None = None
) -> Iterator[tuple[str, Path, np.ndarray]]:
    """Yield (id, file, pixels) of all images, and of each ``every``-th frame of the videos.

    A file that can't be read is given to ``unusable``, and the others follow; without it the error is raised.
    """
    for path in sources:
        try:
            if is_video(path):
                for number, frame in read_frames(path, every):
                    yield f"{path.stem}_{number:06}", path, frame
            else:
                yield path.stem, path, read_image(path)
        except UserError as error:
            if unusable is None:
                raise
            unusable(error)


@torch.no_grad()
def predict(
    detector: Detector, config: CfgNode, images: Iterable[tuple[str, Path, np.ndarray]]
) -> Iterator[Prediction]:
    """Yield the detections on images (id, file, (H, W, 3) uint8 RGB), in their order."""
    items = (
        {"image": network_input(x, config), "height": x.shape[0], "width": x.shape[1], "source": (id_, file, x)}
        for id_, file, x in images
    )
    for batch in runs_of_equals(items, lambda item: item["image"].shape, LARGEST_BATCH):
        for item, found in zip(batch, detector(batch)):
            boxes, labels, scores = (found[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
            id_, file, pixels = item["source"]
            yield Prediction(id_, str(file), item["width"], item["height"], boxes, labels, scores, pixels)
