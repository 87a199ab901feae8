"""A finished detector as a file for other runtimes: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.export import ExportedProgram

from nst_det.detection.data import open_voc, resize, resized_shape
from nst_det.detection.predict import load_run
from nst_det.detection.sources import find_sources, read_sources
from nst_det.detection.torchvision import Detector
from nst_det.engine.io import atomic_path, write_text
from nst_det.errors import UserError
from nst_det.exporting import Exported
from nst_det.exporting.graph import DetectorGraph
from nst_det.exporting.modelcard import detector_card

INPUT_NAME = "image"
OUTPUT_NAMES = ("boxes", "scores", "labels")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
MOST_IMAGES = 20
# of the picture that is traced; the graph takes any size
TRACED_SIZE = (224, 288)
# RoiAlign with half a pixel taken off is in 16 and later, and every runtime of the last years has 18
OPSET = 18
# boxes in pixels, scores 0..1
BOX_LIMIT = 0.01
SCORE_LIMIT = 1e-4

# boxes (N, 4), scores (N,), labels (N,), best first
Detections = Sequence[np.ndarray]
# (3, H, W) uint8 RGB to detections
Detect = Callable[[np.ndarray], Detections]


def export_detector(
    run_folder: str | Path, output: str | Path, form: str, images: Sequence[str | Path] = ()
) -> Exported:
    """Write the detector of a run of the torchvision engine as one file, compare it with PyTorch, and write its card.

    The graph is :class:`DetectorGraph`, for images already resized as the run's INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST
    say.  It is compared on ``images``, or the run's test images; with other detections nothing is left behind.
    """
    output = Path(output)
    if output.suffix != SUFFIXES[form]:
        raise UserError(f"--output {output}: the file must end in {SUFFIXES[form]}")
    if form == "onnx":
        require_onnx()
    detector, config, classes = load_run(run_folder)
    # the graph is in float32
    detector.test_amp = None
    inputs = list(read_images(config, classes, images))
    about = {
        "classes": list(classes),
        "input": "uint8 RGB (3, height, width)",
        "min_size": config.INPUT.MIN_SIZE_TEST,
        "max_size": config.INPUT.MAX_SIZE_TEST,
        "score_threshold": config.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
    }
    limits = config.MODEL.ROI_HEADS.SCORE_THRESH_TEST, config.TEST.DETECTIONS_PER_IMAGE
    graph = _in_torch(DetectorGraph(detector))
    # which of anchors with equal scores is taken first is open in the detector and fixed in the graph
    clear = [image for image in inputs if not equal_scores(detector, image)]
    ties = len(inputs) - len(clear)
    compare_detections(_in_torch(lambda image: _detect(detector, image)), graph, clear, *limits).check(output)
    with atomic_path(output) as temporary, _quiet():
        program = trace(detector)
        if form == "onnx":
            _write_onnx(program, temporary, about)
            written = _load_onnx(temporary)
        else:
            extra = {"nst_det.json": json.dumps(about, ensure_ascii=False)}
            # by its own name torch.export would refuse a file that doesn't end in .pt2
            with open(temporary, "wb") as file:
                torch.export.save(program, file, extra_files=extra)
            written = _load_program(temporary)
        found = compare_detections(graph, written, inputs, *limits)
        found.check(output)
    card = output.with_suffix(".md")
    write_text(card, detector_card(run_folder, config, classes, output.name, form, str(found)))
    note = f"; on {ties} of them anchors have equal scores, whose order PyTorch leaves open" if ties else ""
    return Exported({"detector": output, "card": card}, f"{found}{note}")


def require_onnx() -> None:
    """Raise UserError where the libraries of the extra ``export`` are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        missing = f"--format onnx: {error.name} is not installed"
        raise UserError(f"{missing}; pip install onnx onnxruntime onnxscript") from error


def trace(detector: Detector) -> ExportedProgram:
    """Return the graph of a detector on the CPU, for images of any size."""
    # torch.export itself wants sides longer than the largest stride (64 pixels with FPN); ONNX has no such limit
    image = torch.zeros(3, *TRACED_SIZE, dtype=torch.uint8)
    sizes = {INPUT_NAME: {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(DetectorGraph(detector).cpu(), (image,), dynamic_shapes=sizes, strict=False)
    for node in program.graph.nodes:
        # source lines with paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    import onnx
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with torch.no_grad():
        written = torch.onnx.export(
            program,
            (torch.zeros(3, *TRACED_SIZE, dtype=torch.uint8),),
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    ClearMetadataAndDocStringPass()(written.model)
    proto = written.model_proto
    # sizes are named by the tracer's symbols; those in between are inferred again by runtimes
    del proto.graph.value_info[:]
    for size, name in zip(proto.graph.input[0].type.tensor_type.shape.dim[1:], ("height", "width")):
        size.dim_param = name
    for output in proto.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "detections"
    onnx.helper.set_model_props(proto, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Return ``aten::sort.stable`` of (N,) values in ONNX, whose TopK takes the lower index first among equal ones."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values), axis=dim, largest=int(descending), sorted=1)


def _load_onnx(path: Path) -> Detect:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(list(OUTPUT_NAMES), {INPUT_NAME: image})


def _load_program(path: Path) -> Detect:
    with open(path, "rb") as file:
        detect = _in_torch(torch.export.load(file).module())

    def run(image: np.ndarray) -> Detections:
        try:
            return detect(image)
        except AssertionError as error:
            raise UserError(
                f"--format torch-export: its program takes no image of {image.shape[1]} x {image.shape[2]} pixels "
                "(both sides must be longer than the largest stride, 64 with FPN); take --format onnx, or larger "
                "images: --images, or INPUT.MIN_SIZE_TEST of the run"
            ) from error

    return run


def _in_torch(module: Callable[[Tensor], Iterable[Tensor]]) -> Detect:
    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [value.numpy() for value in module(torch.from_numpy(image))]

    return run


def _detect(detector: Detector, image: Tensor) -> list[Tensor]:
    found: dict[str, Tensor] = detector([{"image": _in_own_order(detector, image)}])[0]
    return [found[name] for name in OUTPUT_NAMES]


def _in_own_order(detector: Detector, image: Tensor) -> Tensor:
    return image.flip(0) if detector.input_format == "BGR" else image


def equal_scores(detector: Detector, image: np.ndarray) -> int:
    """Count the anchors, of those that become proposals of an image (3, H, W) RGB, that share their score."""
    rpn = detector.proposal_generator
    with torch.no_grad():
        images, _ = detector.preprocess([_in_own_order(detector, torch.from_numpy(image))])
        maps = detector.backbone(images)
        logits, _ = rpn.rpn_head([maps[name] for name in rpn.settings.IN_FEATURES])
    best = [row[0].topk(min(rpn.settings.PRE_NMS_TOPK_TEST, row.shape[1])).values for row in logits]
    return sum(len(row) - len(row.unique()) for row in best)


def read_images(config: CfgNode, classes: Sequence[str], named: Sequence[str | Path]) -> Iterator[np.ndarray]:
    """Yield at most :data:`MOST_IMAGES` of the named images, or the run's test images, resized as at evaluation."""
    if not named:
        try:
            data = open_voc(config, "DATASETS.TEST", classes)[0]
            named = [data.image_path(id_) for id_ in data.ids[:MOST_IMAGES]]
        except UserError as error:
            raise UserError(f"no test images to compare the export on ({error}); name some by --images") from error
    for picture in itertools.islice(read_sources(find_sources(named)), MOST_IMAGES):
        pixels = picture.pixels
        height, width = pixels.shape[:2]
        size = resized_shape(height, width, config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
        yield np.ascontiguousarray(resize(pixels, *size).transpose(2, 0, 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on each other's interfaces; an error is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass
class Difference:
    """How far two detectors' detections are apart on some images."""

    images: int = 0
    # with a partner at the other detector, and the largest differences among partners: in pixels, and in score
    detections: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    # without a partner within both limits
    alone: int = 0
    # without a partner too, but as near to the score threshold as the limit or, on an image with as many detections as
    # there may be, to the last one's score: either detector may be right
    borderline: int = 0

    def __str__(self) -> str:
        border = f", {self.borderline} on the edge of the score threshold" if self.borderline else ""
        return (
            f"{self.images} images, {self.detections} detections: boxes within {self.boxes:.1e} px (limit "
            f"{BOX_LIMIT:g}), scores within {self.scores:.1e} (limit {SCORE_LIMIT:g}){border}"
        )

    def check(self, output: Path) -> None:
        """Raise UserError if a detection has no partner within :data:`BOX_LIMIT` and :data:`SCORE_LIMIT`."""
        if self.alone:
            raise UserError(
                f"{output}: on {self.images} images {self.alone} detections differ from PyTorch's by more than "
                f"{BOX_LIMIT:g} px or {SCORE_LIMIT:g} in score, so nothing was exported"
            )


def compare_detections(
    first: Detect, second: Detect, images: Iterable[np.ndarray], threshold: float = 0.0, most: int = -1
) -> Difference:
    """Compare two detectors with the least score ``threshold`` and at most ``most`` detections an image (-1: any)."""
    total = Difference()
    for image in images:
        mine, theirs = first(image), second(image)
        pairs, rest = partners(mine, theirs)
        for row, other in pairs:
            total.boxes = max(total.boxes, float(np.abs(mine[0][row] - theirs[0][other]).max()))
            total.scores = max(total.scores, float(abs(mine[1][row] - theirs[1][other])))
        full = len(mine[1]) == len(theirs[1]) == most
        edges = [threshold, *(float(side[1].min()) for side in (mine, theirs) if full)]
        near = sum(min(abs(score - edge) for edge in edges) <= SCORE_LIMIT for score in rest)
        total.images += 1
        total.detections += len(pairs)
        total.alone += len(rest) - near
        total.borderline += near
    return total


def partners(mine: Detections, theirs: Detections) -> tuple[list[tuple[int, int]], list[float]]:
    """Pair detections of one label within the limits: (row of mine, of theirs), and the scores of all without one."""
    free = np.ones(len(theirs[1]), dtype=bool)
    pairs: list[tuple[int, int]] = []
    alone: list[float] = []
    for row, (box, score, label) in enumerate(zip(*mine)):
        far = np.abs(theirs[0] - box).max(axis=1, initial=0.0)
        fits = free & (theirs[2] == label) & (far <= BOX_LIMIT) & (np.abs(theirs[1] - score) <= SCORE_LIMIT)
        if fits.any():
            other = int(np.where(fits, far, np.inf).argmin())
            free[other] = False
            pairs.append((row, other))
        else:
            alone.append(float(score))
    return pairs, alone + theirs[1][free].tolist()
