"""Exported detectors: what their files say of themselves, and each run by its own runtime as a run's detector is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nst_det.detection import predict
from nst_det.detection.data import resize, resized_shape, runs_of_equals
from nst_det.detection.predict import ImageDetector
from nst_det.detection.predictions import Boxes
from nst_det.detection.tiles import OVERLAP, Tiles
from nst_det.detection.torchvision.batch import limits_of
from nst_det.detection.torchvision.box_coder import clip, larger_than
from nst_det.engine.device import named_device
from nst_det.errors import UserError
from nst_det.exporting.agreement import Detections

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
# of the entry in ONNX's metadata_props, OpenVINO's rt_info, and (with .json) torch.export's extra files
KEY = "nst_det"
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels", "batch_index")
# what is the same in every file, for readers without this package
CALL = {
    "input": {"name": INPUT, "layout": "NCHW", "type": "uint8", "channels": "RGB", "range": [0, 255]},
    "outputs": {
        "boxes": "(N, 4) float32: xmin, ymin, xmax, ymax in pixels of the resized image",
        "scores": "(N,) float32, 0 to 1, the best of each image first",
        "labels": "(N,) int64, indices into classes",
        "batch_index": "(N,) int64, which image of the batch",
    },
    "resize": "Pillow's bilinear filter: the shortest side to min_size, the longest to max_size at most; 0: as it is",
}
# on a CPU with bfloat16 OpenVINO would compute float32 networks in it
OPENVINO_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}

# (B, 3, H, W) uint8 to boxes, scores, labels and batch indices
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Contract:
    """What differs between files."""

    classes: tuple[str, ...]  # by label
    batch: int  # images that are given at once, of one size
    precision: str  # fp32, fp16 or int8
    min_size: int  # pixels of the shortest side after resizing; 0 leaves images as they are
    max_size: int  # pixels that the longest side has at most
    score_threshold: float  # detections with a lower score are not given
    thresholds: Mapping[str, float] = field(default_factory=dict)  # by class, the least score that is recommended

    def to_json(self) -> str:
        """Return it as the text that a file holds."""
        return json.dumps({**asdict(self), **CALL}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, path: str | Path) -> Contract:
        """Read it from the text in the file ``path``; None where the file has none."""
        remedy = "name a file that nst-det export wrote"
        if text is None:
            raise UserError(f"{path}: says nothing of how to call it, so another project made it; {remedy}")
        try:
            told: dict[str, Any] = json.loads(text)
            named = {part.name: told[part.name] for part in fields(cls)}
            given = cls(**{**named, "classes": tuple(map(str, named["classes"])), "batch": int(named["batch"])})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: its entry {KEY} can't be read ({error!r}); {remedy}") from error
        if any(told.get(key) != value for key, value in CALL.items()):
            raise UserError(f"{path}: is called in another way ({KEY} in it), by another version; export it again")
        return given


class ExportedDetector:
    """A detector's file as it is, of :func:`load_exported`; :func:`load_detector` makes an ImageDetector of it."""

    def __init__(self, path: Path, contract: Contract, run: Run) -> None:
        self.path, self.contract, self.run = path, contract, run

    def find(self, images: Iterable[np.ndarray]) -> Iterator[Boxes]:
        """Yield the detections on each (H, W, 3) uint8 RGB image, in its pixels.

        Images that follow each other share a batch where they are of one size after resizing.
        """
        items = ((self.resized(image), image.shape[:2]) for image in images)
        for batch in runs_of_equals(items, lambda item: item[0].shape, self.contract.batch):
            for (seen, size), found in zip(batch, self.detect(np.stack([item[0] for item in batch]))):
                boxes, scores, labels = map(torch.from_numpy, found)
                before, limits = limits_of([seen.shape[1:], size])
                boxes = clip(boxes * (limits / before).float(), limits.float())
                kept = larger_than(boxes, 0)
                yield Boxes(boxes[kept].numpy(), labels[kept].numpy(), scores[kept].numpy())

    def resized(self, pixels: np.ndarray) -> np.ndarray:
        """Return an image (H, W, 3) uint8 RGB as the file takes it, (3, h, w)."""
        height, width = pixels.shape[:2]
        size = resized_shape(height, width, self.contract.min_size, self.contract.max_size)
        return np.ascontiguousarray(resize(pixels, *size).transpose(2, 0, 1))

    def detect(self, images: np.ndarray) -> list[Detections]:
        """Return boxes in pixels of the resized images, scores and labels of each of (n, 3, h, w) uint8 RGB.

        There may be at most ``contract.batch`` images; a batch is filled up with black ones.
        """
        count, batch = len(images), self.contract.batch
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not 1 <= count <= batch:
            shape = f"{images.dtype} {images.shape}"
            raise UserError(f"{self.path}: takes 1 to {batch} images as uint8 (n, 3, height, width), not {shape}")
        whole = np.concatenate((images, np.zeros((batch - count, *images.shape[1:]), np.uint8)))
        try:
            *found, index = self.run(whole)
        except Exception as error:  # each runtime has errors of its own
            size = f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(f"{self.path}: can't be run on images of {size} pixels ({_first_line(error)})") from error
        return [[np.asarray(x)[np.asarray(index) == image] for x in found] for image in range(count)]


def load_exported(path: str | Path, threads: int = 0) -> ExportedDetector:
    """Open a detector that ``nst-det export`` wrote; 0 ``threads`` leaves them to the runtime.

    A UserError names no such file, one of another project, or a runtime that is missing or can't run it.
    """
    path = Path(path)
    form = next((form for form, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    if form is None:
        known = ", ".join(f"{suffix} ({form})" for form, suffix in SUFFIXES.items())
        raise UserError(f"{path}: ends in none of {known}; name a file that nst-det export wrote")
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one that nst-det export wrote")
    require(form, RUNTIMES[form])
    try:
        text, run = _OPEN[form](path, threads)
    except Exception as error:  # each runtime has errors of its own
        raise UserError(f"{path}: {form} can't load it ({_first_line(error)}); export it again") from error
    return ExportedDetector(path, Contract.from_json(text, path), run)


RUNTIMES = {"onnx": ("onnxruntime",), "openvino": ("openvino",), "torch-export": ()}


def require(form: str, modules: Iterable[str]) -> None:
    """Raise UserError where one of a format's libraries is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = f"--format {form}: {error.name} is not installed"
            raise UserError(f"{missing}; pip install {name}, or nst_det with its extra: nst_det[export]") from error


def _open_onnx(path: Path, threads: int) -> tuple[str | None, Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    return text, lambda images: session.run(list(OUTPUTS), {INPUT: images})


def _open_openvino(path: Path, threads: int) -> tuple[str | None, Run]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    options = {**OPENVINO_OPTIONS, **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        request.infer({INPUT: images})
        # the request's own memory, which the next image changes
        return [request.get_tensor(name).data.copy() for name in OUTPUTS]

    return text, run


def _open_program(path: Path, threads: int) -> tuple[str | None, Run]:
    extra = {f"{KEY}.json": ""}
    if threads:
        torch.set_num_threads(threads)
    with open(path, "rb") as file:
        module = torch.export.load(file, extra_files=extra).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            with torch.no_grad():
                return [value.numpy() for value in module(torch.from_numpy(images))]
        except AssertionError as error:
            larger = "both sides must be longer than the largest stride, 64 with FPN"
            raise ValueError(f"{larger}; take --format onnx, or larger images") from error

    return extra[f"{KEY}.json"] or None, run


_OPEN = {"onnx": _open_onnx, "openvino": _open_openvino, "torch-export": _open_program}


def load_detector(
    source: str | Path, threshold: float | None, device: str, tile: int, overlap: float | None
) -> ImageDetector:
    """Return the detector of a run's folder, or of an exported file; arguments as in :func:`nst_det.load_detector`."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold} is not a score; give a number from 0 to 1")
    if not tile and overlap is not None:
        raise UserError("--overlap: is that of tiles; give --tile PIXELS too")
    tiles = Tiles(tile, OVERLAP if overlap is None else overlap) if tile else None
    if not Path(source).is_file():
        return predict.load_detector(source, named_device(device), threshold, tiles)
    if device not in ("", "cpu"):
        raise UserError(f"--device {device}: an exported file is run on the CPU; leave it out")
    exported = load_exported(source)
    told = exported.contract
    lowest = told.score_threshold
    if threshold is not None and threshold < lowest:
        raise UserError(f"--threshold: {threshold:g}, but {source} gives nothing below {lowest:g}; give that or more")
    sizes = told.min_size, told.max_size
    return ImageDetector(exported.find, told.classes, told.thresholds, sizes, threshold, tiles)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
