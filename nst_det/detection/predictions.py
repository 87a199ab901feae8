"""What a detector found on somebody's images, and how it is written: pictures, videos, JSON, VOC XML, CSV."""

from __future__ import annotations

import colorsys
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from nst_det.data.annotation import VocAnnotation, VocObject, voc_xml
from nst_det.detection.sources import Picture
from nst_det.detection.video import SUFFIX, video_file
from nst_det.engine.io import atomic_path, write_text
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections
from nst_det.evaluation.io import write_detections

FORMATS = ("images", "json", "voc", "csv")
CSV_COLUMNS = ("image_id", "file", "category", "score", "xmin", "ymin", "xmax", "ymax", "frame")
VOC_SPLIT = "predicted"
JPEG_QUALITY = 92


class Boxes(NamedTuple):
    """The N detections on one image, best first."""

    # (N, 4) float32 xyxy, 0-based continuous, in pixels of the image
    boxes: np.ndarray
    # (N,) int64 indices into the classes
    labels: np.ndarray
    # (N,) float32, 0..1
    scores: np.ndarray


# a detector: images, (H, W, 3) uint8 RGB of any size, to the detections on each of them, in their order
Find = Callable[[Iterable[np.ndarray]], Iterator[Boxes]]


@dataclass(frozen=True)
class Prediction:
    """The detections on one picture; values are those of :class:`Boxes`."""

    picture: Picture
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def above(self, least: np.ndarray) -> Prediction:
        """Return those whose score is at least that of their label, (K,)."""
        keep = self.scores >= least[self.labels]
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], scores=self.scores[keep])


@dataclass(frozen=True)
class PredictResult:
    """What :func:`nst_det.predict` did.

    Attributes:
        images: images and frames that were read.
        detections: their number by class, the most frequent first; classes without one are left out.
        unreadable: what is wrong with each file that could not be read.
        files: images and videos that were named.
        folder: where all is written.
        thresholds: least score of a detection by class, and ``chosen``, where they are from (``given``,
            ``validation`` or ``default``).
        best: the best score of all detections, also of those below the thresholds; None without any.
        tile: side of a tile in pixels of the image, and of what the network sees of it; None without tiles.
    """

    images: int
    detections: dict[str, int]
    unreadable: list[UserError]
    files: int
    folder: Path
    thresholds: dict[str, float]
    chosen: str
    best: float | None
    tile: tuple[int, int] | None


def draw(prediction: Prediction, classes: Sequence[str]) -> np.ndarray:
    """Return the image with boxes, class names and scores on it, (H, W, 3) uint8, RGB; the best scores on top."""
    canvas = np.ascontiguousarray(prediction.picture.pixels).copy()
    thickness = max(1, round(min(canvas.shape[:2]) / 240))
    size = max(0.35, min(canvas.shape[:2]) / 1000)
    rows = list(zip(prediction.boxes, prediction.labels.tolist(), prediction.scores.tolist()))
    for box, label, score in reversed(rows):
        # by the golden ratio, neighbors are far apart in hue
        color = [round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618033988749895 % 1.0, 0.75, 0.95)]
        left, top, right, bottom = (round(float(value)) for value in box)
        cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), color, thickness)
        text = f"{classes[label]} {score:.2f}"
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        left = max(0, min(left, canvas.shape[1] - width))
        above = max(top, height + base)
        cv2.rectangle(canvas, (left, above - height - base), (left + width, above), color, cv2.FILLED)
        at = (left, above - base // 2 - 1)
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def voc_annotation(prediction: Prediction, classes: Sequence[str]) -> str:
    """Return the detections as VOC XML: 1-based inclusive boxes with all digits, and ``<score>`` in each object."""
    boxes = np.add(prediction.boxes.astype(np.float64), (1, 1, 0, 0)).tolist()
    objects = tuple(VocObject(classes[label], box) for label, box in zip(prediction.labels.tolist(), boxes))
    height, width = prediction.picture.pixels.shape[:2]
    annotation = VocAnnotation(prediction.picture.id, width, height, objects)
    return voc_xml(annotation, prediction.picture.file.name, scores=prediction.scores.tolist(), digits="")


def to_csv(predictions: Iterable[Prediction], classes: Sequence[str]) -> str:
    """Return a line for each detection with :data:`CSV_COLUMNS`; boxes are 0-based continuous pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for p in predictions:
        for box, label, score in zip(p.boxes.tolist(), p.labels.tolist(), p.scores.tolist()):
            name, values = classes[label], map(repr, (score, *box))
            writer.writerow([p.picture.id, str(p.picture.file), name, *values, p.picture.frame])
    return text.getvalue()


class PredictionWriter:
    """Writes predictions into a folder, picture by picture; JSON, CSV and the VOC list appear whole, at the end.

    ``images`` gives ``images/ID.jpg``, and ``videos/NAME.mp4`` of a video; ``json`` ``detections.json``, ``csv``
    ``detections.csv``, and ``voc`` the folder ``voc`` with ``Annotations/ID.xml`` and the list
    ``ImageSets/Main/predicted.txt``.  Leaving the ``with`` block by an error leaves no part of a video.
    """

    def __init__(self, folder: str | Path, formats: Iterable[str], classes: Sequence[str]) -> None:
        self.folder, self.formats, self.classes = Path(folder), frozenset(formats), tuple(classes)
        self._kept: list[Prediction] = []
        # the video whose frames are coming, and what writes the next one
        self._film: Path | None = None
        self._write: Callable[[np.ndarray], None]
        self._open = ExitStack()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, prediction: Prediction) -> None:
        """Write the files of one picture, and remember its detections; the frames of a video follow each other."""
        picture = prediction.picture
        if "images" in self.formats:
            self._draw(picture, draw(prediction, self.classes))
        if "voc" in self.formats:
            path = self.folder / "voc" / "Annotations" / f"{picture.id}.xml"
            write_text(path, voc_annotation(prediction, self.classes))
        # without its pixels: there may be a million images
        self._kept.append(replace(prediction, picture=replace(picture, pixels=np.zeros((0, 0, 3), np.uint8))))

    def _draw(self, picture: Picture, drawn: np.ndarray) -> None:
        film = picture.file if picture.frame is not None else None
        if film != self._film:
            self._open.close()
            self._film = film
            if film:
                path = self.folder / "videos" / f"{film.stem}{SUFFIX}"
                self._write = self._open.enter_context(video_file(path, picture.rate))
        if film:
            self._write(drawn)
            return
        _, data = cv2.imencode(".jpg", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        with atomic_path(self.folder / "images" / f"{picture.id}.jpg") as temporary:
            temporary.write_bytes(data.tobytes())

    def finish(self) -> dict[str, int]:
        """Write the files on all images; return the number of detections by class, the most frequent first."""
        self._open.close()
        found = Detections.from_images(((p.picture.id, p.boxes, p.labels, p.scores) for p in self._kept), self.classes)
        if "json" in self.formats:
            frames = [p.picture.frame for p in self._kept for _ in p.scores]
            write_detections(self.folder / "detections.json", found, frames)
        if "csv" in self.formats:
            write_text(self.folder / "detections.csv", to_csv(self._kept, self.classes))
        if "voc" in self.formats:
            names = "".join(f"{p.picture.id}\n" for p in self._kept)
            write_text(self.folder / "voc" / "ImageSets" / "Main" / f"{VOC_SPLIT}.txt", names)
        counts = Counter(self.classes[label] for label in found.label.tolist())
        return dict(counts.most_common())
