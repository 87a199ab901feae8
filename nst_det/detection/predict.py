"""A finished detector on somebody's own images and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode

from nst_det.data.folders import EXTENSIONS
from nst_det.data.images import read_image
from nst_det.data.safe_io import shown_path
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import check_config, get_defaults, load_detect_config
from nst_det.detection.data import resize, resized_shape
from nst_det.detection.pipeline import WEIGHTS_FILE, place_detector
from nst_det.detection.predictions import Prediction
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.engine.config import merge_tree, read_yaml
from nst_det.engine.io import read_json
from nst_det.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
# as at evaluation, so that the same images give the same bits
LARGEST_BATCH = 8


@dataclass(frozen=True)
class Source:
    """One image or video; ``id`` names what is written for it."""

    id: str
    path: Path

    @property
    def is_video(self) -> bool:
        """Whether it holds many frames."""
        return self.path.suffix.lower() in VIDEO_EXTENSIONS


def load_run(
    folder: str | Path, device: str | torch.device = "cpu", threshold: float | None = None
) -> tuple[Detector, CfgNode, tuple[str, ...]]:
    """The detector of a finished run of the torchvision engine, ready to detect.

    Args:
        folder: with ``model.safetensors`` and the run's ``config.yaml`` (or ``config.json``).
        device: where it computes.
        threshold: the least score of a detection, 0..1; None takes the run's MODEL.ROI_HEADS.SCORE_THRESH_TEST.

    Returns:
        The detector in evaluation mode, its config, and the names of its classes.

    Raises:
        UserError: no such run, not finished, by another engine, or weights that don't fit its config.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a finished detector run")
    config = run_config(folder)
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; finish this run by train-det first")
    classes = tuple(saved_classes(weights)) or tuple(config.DATASETS.CLASSES)
    if len(classes) != config.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(
            f"{weights}: names {len(classes)} classes, the run's config says {config.MODEL.ROI_HEADS.NUM_CLASSES}; "
            "name a folder as train-det left it"
        )
    config.defrost()
    config.MODEL.WEIGHTS, config.MODEL.DEVICE, config.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
    if threshold is not None:
        config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(threshold)
    config.freeze()
    detector = build_detector(config)
    load_weights(detector, config, classes, key="--run")
    place_detector(detector, config)
    return detector.eval(), config, classes


def run_config(folder: Path) -> CfgNode:
    """The config that a run of the torchvision engine left in its folder.

    Raises:
        UserError: there is none, or the run is another engine's.
    """
    path = folder / "config.yaml"
    if path.is_file():
        tree = read_yaml(path)
    elif (folder / "config.json").is_file():
        path = folder / "config.json"
        tree = _nested(read_json(path), path)
    else:
        raise UserError(f"{folder}: no config.yaml or config.json in it; name the folder of a finished detector run")
    if not isinstance(tree.get("MODEL"), dict):
        raise UserError(f"{path}: not the config of a detector; name the folder of a train-det run")
    if tree.get("ENGINE") != "torchvision":
        raise UserError(
            f"{path}: ENGINE is {tree.get('ENGINE')}; only runs of the torchvision engine are read, train by it or use "
            "Detectron2's own tools"
        )
    if path.suffix == ".yaml":
        return load_detect_config(path)
    config = get_defaults()
    merge_tree(config, tree, str(path))
    check_config(config, str(path))
    config.freeze()
    return config


def _nested(flat: Any, path: Path) -> dict[str, Any]:
    if not isinstance(flat, dict):
        raise UserError(f"{path}: not a config; name the folder of a finished detector run")
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Images and videos behind what a user names: files as they are, folders by their files, sorted by name.

    Folders inside folders are not searched.

    Raises:
        UserError: nothing there, a file of another kind, or two files that would be written under one name.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _is_taken(file) and not file.name.startswith(".")]
            if not inside:
                kinds = ", ".join((*EXTENSIONS, *VIDEO_EXTENSIONS))
                raise UserError(f"{shown_path(path)}: no image or video in this folder ({kinds}); name another one")
            found += inside
        elif not path.exists():
            raise UserError(f"{shown_path(path)}: no such file or folder; name images, folders or a video")
        elif not _is_taken(path):
            kinds = ", ".join((*EXTENSIONS, *VIDEO_EXTENSIONS))
            raise UserError(f"{shown_path(path)}: neither an image nor a video ({kinds}); convert it")
        else:
            found.append(path)
    sources: dict[str, Source] = {}
    for path in dict.fromkeys(found):
        twin = sources.setdefault(path.stem, Source(path.stem, path))
        if twin.path != path:
            raise UserError(
                f"{shown_path(path)}: has the same name as {shown_path(twin.path)}, and both would be written as "
                f"{path.stem}; rename one, or predict them one after the other"
            )
    return list(sources.values())


def _is_taken(path: Path) -> bool:
    return path.suffix.lower() in (*EXTENSIONS, *VIDEO_EXTENSIONS)


def read_frames(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """(number from 1, (H, W, 3) uint8 RGB) of each ``every``-th frame of a video, beginning with the first.

    Raises:
        UserError: it can't be opened, or has no frame.
    """
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
    sources: Iterable[Source], every: int = 1, unusable: Callable[[UserError], None] | None = None
) -> Iterator[tuple[str, Path, np.ndarray]]:
    """(id, file, pixels) of all images and frames.

    Args:
        sources: from :func:`find_sources`.
        every: takes each ``every``-th frame of a video.
        unusable: is told of a file that can't be read, and the others go on; None raises.

    Raises:
        UserError: a file can't be read, and ``unusable`` is None.
    """
    for source in sources:
        try:
            if source.is_video:
                for number, frame in read_frames(source.path, every):
                    yield f"{source.id}_{number:06}", source.path, frame
            else:
                yield source.id, source.path, read_image(source.path)
        except UserError as error:
            if unusable is None:
                raise
            unusable(error)


@torch.no_grad()
def predict(
    detector: Detector, config: CfgNode, images: Iterable[tuple[str, Path, np.ndarray]]
) -> Iterator[Prediction]:
    """Detections on images, in their order.

    Images are resized as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST say; those of equal size that follow each other share
    a batch.

    Args:
        detector: in evaluation mode.
        config: its own.
        images: (id, file, (H, W, 3) uint8 RGB).
    """
    batch: list[dict[str, Any]] = []
    for id_, file, pixels in images:
        example = _example(id_, file, pixels, config)
        if batch and (batch[0]["image"].shape != example["image"].shape or len(batch) == LARGEST_BATCH):
            yield from _detect(detector, batch)
            batch = []
        batch.append(example)
    if batch:
        yield from _detect(detector, batch)


def _example(id_: str, file: Path, pixels: np.ndarray, config: CfgNode) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    size = resized_shape(height, width, config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    # channels are turned before resizing, as in training
    image = resize(pixels[:, :, ::-1] if config.INPUT.FORMAT == "BGR" else pixels, *size)
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width, "id": id_, "file": str(file), "pixels": pixels}


def _detect(detector: Detector, batch: Sequence[dict[str, Any]]) -> Iterator[Prediction]:
    for item, found in zip(batch, detector(batch)):
        boxes, labels, scores = (found[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
        where = item["id"], item["file"], item["width"], item["height"]
        yield Prediction(*where, boxes, labels, scores, item["pixels"])
