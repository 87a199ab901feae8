"""A finished detector as a file for other runtimes, compared with PyTorch before it is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.export import ExportedProgram

from nst_det.data.splits import shared_images
from nst_det.detection.data import open_voc, resize, resized_shape, runs_of_equals, split_training
from nst_det.detection.predict import load_run
from nst_det.detection.sources import find_sources, read_sources
from nst_det.detection.torchvision import Detector
from nst_det.engine.io import atomic_files, write_text
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import read_thresholds
from nst_det.exporting import Exported, formats
from nst_det.exporting.agreement import Detections, compare_detections, detect, equal_scores, found_again
from nst_det.exporting.graph import DetectorGraph
from nst_det.exporting.measure import measure
from nst_det.exporting.modelcard import detector_card, detector_script
from nst_det.exporting.runtime import RUNTIMES, SUFFIXES, Contract, ExportedDetector, load_exported, require
from nst_det.report.deployed import add_deployed, markdown

if TYPE_CHECKING:
    import onnx

MOST_IMAGES = 20
# of the training split, by which int8 sets its ranges
CALIBRATION_IMAGES = 64
PRECISIONS = ("fp32", "fp16", "int8")
# beside the runtime
WRITERS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript"), "torch-export": ()}
QUANTIZERS = {"onnx": (), "openvino": ("nncf",)}


class DetectorExport:
    """The detector of a run and what its files are made of, each made once; :meth:`write` writes a file."""

    def __init__(self, run: str | Path, batch: int = 1) -> None:
        if batch < 1:
            raise UserError(f"--batch: {batch}; give 1 or more")
        self.run, self.batch = Path(run), batch
        self.detector, self.config, self.classes = load_run(run)
        # by whether weights are in float16
        self._programs: dict[bool, ExportedProgram] = {}
        self._protos: dict[bool, onnx.ModelProto] = {}

    def write(
        self,
        output: str | Path,
        form: str,
        precision: str = "fp32",
        images: Sequence[str | Path] = (),
        calibration: Sequence[str | Path] = (),
        measured: bool = False,
    ) -> Exported:
        """Write a file with its card; a file that finds something else than PyTorch is refused, and nothing is left.

        Arguments are those of :func:`nst_det.export`.
        """
        output = Path(output)
        check_form(output, form, precision)
        inputs = list(read_images(self.config, self.classes, images))
        # looked at before anything is traced, which takes a while
        ranges = self._batches(calibration) if precision == "int8" else []
        with atomic_files(output, "name another --output") as folder:
            written = folder / output.name
            self._save(written, form, precision, ranges)
            try:
                agreement = self._compare(load_exported(written), output, inputs)
            except UserError as error:
                # it is there for now alone
                raise UserError(str(error).replace(str(written), str(output))) from error
            write_text(folder / f"{output.name}.py", detector_script(output.name, form))
            rows = measure([written], self.run) if measured else []
            about = self.contract(precision), output.name, form, agreement, markdown(rows) if rows else ""
            write_text(folder / f"{output.name}.md", detector_card(self.run, self.config, *about))
            names = [path.name for path in folder.iterdir()]
        kinds = {output.suffix: "detector", ".bin": "weights", ".md": "card", ".py": "script"}
        files = {kinds[Path(name).suffix]: output.with_name(name) for name in sorted(names, key=len)}
        return Exported(files, agreement, add_deployed(self.run, rows) if rows else [])

    def contract(self, precision: str) -> Contract:
        """Return what a file of this detector says of itself."""
        config = self.config
        least = config.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        sizes = config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST
        scores = {name: best.score for name, best in read_thresholds(self.run).items()}
        return Contract(tuple(self.classes), self.batch, precision, *sizes, least, scores)

    def _save(self, path: Path, form: str, precision: str, ranges: Sequence[np.ndarray]) -> None:
        contract = self.contract(precision)
        if form == "torch-export":
            formats.save_program(self._program(precision == "fp16"), contract, path)
            return
        proto = self._onnx(precision == "fp16")
        if form == "onnx":
            formats.save_onnx(formats.quantize_onnx(proto, ranges) if ranges else proto, contract, path)
            return
        model = formats.to_openvino(proto)
        formats.save_openvino(formats.quantize_openvino(model, ranges) if ranges else model, contract, path)

    def _compare(self, exported: ExportedDetector, output: Path, inputs: Sequence[np.ndarray]) -> str:
        precision, detector = exported.contract.precision, self.detector
        if precision == "fp16":
            detector = self._halved

        def theirs(image: np.ndarray) -> Detections:
            return exported.detect(image[None])[0]

        if precision == "int8":
            pairs = [(detect(detector, [image])[0], theirs(image)) for image in inputs]
            again, count = sum(found_again(*pair) for pair in pairs), sum(len(mine[1]) for mine, _ in pairs)
            return f"{len(inputs)} images: {again} of {count} detections found again (same class, IoU 0.5)"
        graph = DetectorGraph(detector)
        ties = 0

        def reference(image: np.ndarray) -> Detections:
            nonlocal ties
            if equal_scores(detector, image):
                # which of such anchors is taken first is open in the detector, and fixed in the graph
                ties += 1
                return [x.numpy() for x in graph(torch.from_numpy(image[None]))[:3]]
            return detect(detector, [image])[0]

        limits = exported.contract.score_threshold, self.config.TEST.DETECTIONS_PER_IMAGE
        with torch.no_grad():
            found = compare_detections(reference, theirs, inputs, *limits)
        found.check(output)
        note = f"; on {ties} of them anchors have equal scores, whose order PyTorch leaves open" if ties else ""
        return f"{found}{', with weights rounded to float16 in both' if precision == 'fp16' else ''}{note}"

    @cached_property
    def _halved(self) -> Detector:
        return formats.with_half_weights(self.detector)

    def _program(self, half: bool) -> ExportedProgram:
        if half not in self._programs:
            self._programs[half] = formats.trace(self._halved if half else self.detector, self.batch)
        return self._programs[half]

    def _onnx(self, half: bool) -> onnx.ModelProto:
        if half not in self._protos:
            self._protos[half] = formats.to_onnx(self._program(half))
        return self._protos[half]

    def _batches(self, named: Sequence[str | Path]) -> list[np.ndarray]:
        """Return calibration images, named or of the training split, as batches (B, 3, H, W)."""
        paths = find_sources(named) if named else self._training_images()
        pictures = itertools.islice(read_sources(paths), CALIBRATION_IMAGES)
        images = sorted((_resized(self.config, picture.pixels) for picture in pictures), key=lambda image: image.shape)
        batches = runs_of_equals(images, lambda image: image.shape, self.batch)
        # the last image again where there are too few
        return [np.stack([*batch, *[batch[-1]] * (self.batch - len(batch))]) for batch in batches]

    def _training_images(self) -> list[Path]:
        """Return images of the training split, spread over it, none of which is a test image too."""
        try:
            opened = open_voc(self.config, "DATASETS.TRAIN", self.classes)
            test = open_voc(self.config, "DATASETS.TEST", self.classes) if self.config.DATASETS.TEST else []
        except UserError as error:
            raise UserError(
                f"no training images to set int8's ranges by ({error}); name some by --calibration"
            ) from error
        tested = {learned for learned, _ in shared_images(opened, test)}
        sets, _ = split_training(self.config, opened)
        paths = [path for data in sets for path in map(data.image_path, data.ids) if path not in tested]
        return paths[:: -(-len(paths) // CALIBRATION_IMAGES)]


def check_form(output: Path, form: str, precision: str) -> None:
    """Refuse a file's name, a precision that its format doesn't have, and libraries that are missing."""
    if output.suffix != SUFFIXES[form]:
        raise UserError(f"--output {output}: the file must end in {SUFFIXES[form]}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision: '{precision}'; choose from {', '.join(PRECISIONS)}")
    if precision == "int8" and form not in QUANTIZERS:
        raise UserError(f"--precision int8: not for --format {form}; choose from {', '.join(QUANTIZERS)}")
    require(form, (*WRITERS[form], *RUNTIMES[form], *(QUANTIZERS[form] if precision == "int8" else ())))


def read_images(config: CfgNode, classes: Sequence[str], named: Sequence[str | Path]) -> Iterator[np.ndarray]:
    """Yield at most :data:`MOST_IMAGES` of the named images, or the run's test images, resized as at evaluation."""
    if named:
        paths = find_sources(named)
    else:
        try:
            data = open_voc(config, "DATASETS.TEST", classes)[0]
            paths = [data.image_path(id_) for id_ in data.ids[:MOST_IMAGES]]
        except UserError as error:
            raise UserError(f"no test images to compare the export on ({error}); name some by --images") from error
    for picture in itertools.islice(read_sources(paths), MOST_IMAGES):
        yield _resized(config, picture.pixels)


def _resized(config: CfgNode, pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = resized_shape(height, width, config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    return np.ascontiguousarray(resize(pixels, *size).transpose(2, 0, 1))
