"""A finished detector as a file for other runtimes: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchvision.ops import nms

from nst_det.detection.data import open_voc, resize, resized_shape
from nst_det.detection.predict import find_sources, load_run, read_sources
from nst_det.detection.torchvision import Detector
from nst_det.detection.torchvision.box_coder import larger_than
from nst_det.engine.io import atomic_path, write_text
from nst_det.errors import UserError
from nst_det.export.modelcard import detector_card
from nst_det.export.parity import Difference, difference

INPUT_NAME = "image"
OUTPUT_NAMES = ("boxes", "scores", "labels")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
MOST_IMAGES = 20
# of the picture that is traced; the graph takes any size
TRACED_SIZE = (224, 288)
# RoiAlign with half a pixel taken off is in 16 and later, and every runtime of the last years has 18
OPSET = 18
# (3, H, W) uint8 to boxes, scores, labels
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class DetectorGraph(nn.Module):
    """Inference on one image of any size.

    Args:
        detector: put into evaluation mode and shared, not copied.

    Example:
        >>> from nst_det.detection.config import get_defaults
        >>> from nst_det.detection.torchvision import build_detector
        >>> config = get_defaults()
        >>> config.MODEL.BACKBONE.NAME, config.MODEL.TIMM.ARCH = "build_timm_backbone", "nst_resnet10_w32"
        >>> config.MODEL.ROI_HEADS.NUM_CLASSES, config.MODEL.ROI_BOX_HEAD.NUM_FC = 3, 1
        >>> boxes, scores, labels = DetectorGraph(build_detector(config))(torch.zeros(3, 64, 80, dtype=torch.uint8))
        >>> boxes.shape[1]
        4
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.multiple = max(detector.backbone.size_divisibility, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: (3, H, W) uint8, RGB, resized as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST say.

        Returns:
            boxes (N, 4) float32 xyxy in pixels of ``image``, scores (N,) float32 0..1, labels (N,) int64 from 0, the
            best first.
        """
        size = image.shape[1], image.shape[2]
        maps = self.detector.backbone(self._normalized(image))
        proposals, valid = self._propose(maps, size)
        return self._detect(maps, proposals, valid, size)

    def _normalized(self, image: Tensor) -> Tensor:
        detector = self.detector
        pixels = image.flip(0) if detector.input_format == "BGR" else image
        pixels = (pixels - detector.pixel_mean) / detector.pixel_std
        below, right = (-image.shape[1]) % self.multiple, (-image.shape[2]) % self.multiple
        return F.pad(pixels, (0, right, 0, below))[None]

    def _propose(self, maps: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(P, 4) proposals, best first, and (P,) whether there is one in this row."""
        rpn = self.detector.proposal_generator
        settings = rpn.settings
        levels = [maps[name] for name in settings.in_features]
        boxes, scores = [], []
        for anchors, logits, deltas in zip(rpn.anchors(levels), *rpn.rpn_head(levels)):
            count = settings.pre_nms[1]
            best, index = first(F.pad(logits[0], (0, count), value=-torch.inf), count)
            rows, places = (F.pad(x, (0, 0, 0, count))[index] for x in (deltas[0], anchors))
            found = clip(rpn.coder.decode_rows(rows, places), size)
            usable = torch.isfinite(found).all(1) & larger_than(found, settings.min_size)
            best = torch.where(usable, best, -torch.inf)
            kept = torch.zeros_like(usable).index_fill(0, suppressed(found, best, settings.nms_threshold), True)
            boxes.append(found)
            scores.append(torch.where(kept, best, -torch.inf))
        all_scores, all_boxes = torch.cat(scores), torch.cat(boxes)
        best, index = first(all_scores, min(settings.post_nms[1], len(levels) * settings.pre_nms[1]))
        valid = torch.isfinite(best)
        return torch.where(valid[:, None], all_boxes[index], 0.0), valid

    def _detect(
        self, maps: dict[str, Tensor], proposals: Tensor, valid: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.detector.roi_heads
        settings = heads.settings
        features = heads.box_pooler([maps[name] for name in settings.in_features], [proposals])
        logits, deltas = heads.box_predictor(heads.box_head(features))
        boxes = heads.coder.decode_rows(deltas, proposals).unflatten(1, (-1, 4))
        probabilities = F.softmax(logits, dim=1)
        usable = valid & torch.isfinite(boxes).all(2).all(1) & torch.isfinite(probabilities).all(1)
        candidates = (probabilities[:, :-1] > settings.score_threshold) & usable[:, None]
        rows, labels = torch.nonzero(candidates).unbind(1)
        found = clip(boxes[rows, labels if boxes.shape[1] > 1 else 0], size)
        scores = probabilities[rows, labels]
        best = suppressed(apart(found, labels, size), scores, settings.nms_threshold)
        if settings.detections >= 0:
            best = best[: settings.detections]
        found, scores, labels = found[best], scores[best], labels[best]
        some = larger_than(found, 0)
        return found[some], scores[some], labels[some]


def first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of (N,) scores in falling order, and their indices; equal ones by index."""
    best, index = scores.sort(descending=True, stable=True)
    return best[:count], index[:count]


def suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices (M,) of the boxes (N, 4) that non-maximum suppression keeps, best score (N,) first.

    One of two boxes goes where their overlap (IoU, 0..1) is above ``threshold``.

    Two boxes of score -inf, which touch nothing, go through it as well: torchvision tells ``torch.export`` that at
    least two boxes are kept, and the exported program would refuse an image with fewer.
    """
    more = boxes.new_tensor([[-4.0, -4.0, -3.0, -3.0], [-2.0, -2.0, -1.0, -1.0]])
    kept = nms(torch.cat((boxes, more)), F.pad(scores, (0, 2), value=-torch.inf), threshold)
    return kept[kept < boxes.shape[0]]


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) xyxy boxes cut off at an image of (height, width), which may be symbols."""
    x, y = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)


def apart(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes inside an image of (height, width) moved so that those of different labels never overlap."""
    return boxes + (labels * (max(size) + 1))[:, None]


@dataclass(frozen=True)
class ExportedDetector:
    """What was written, and how far its detections are from PyTorch's.

    Attributes:
        file: the detector.
        card: its model card.
        difference: of its detections from those of the same graph in PyTorch; the detector itself gives the same
            within the same limits, except where there are ``ties``.
        ties: images on which anchors have exactly equal scores.  Which of them is taken first is open in the detector
            and fixed in the graph, so that the two may differ there.
    """

    file: Path
    card: Path
    difference: Difference
    ties: int


def export_detector(
    run_folder: str | Path, output: str | Path, form: str, images: Sequence[str | Path] = ()
) -> ExportedDetector:
    """Write the detector of a finished run as one file, compare it with PyTorch, and write its model card beside it.

    The graph takes ``image``, (3, H, W) uint8 RGB of any H and W, already resized as the run's INPUT.MIN_SIZE_TEST and
    MAX_SIZE_TEST say, and gives ``boxes`` (N, 4) xyxy in pixels of it, ``scores`` (N,) and ``labels`` (N,) from 0.
    Normalization, padding and non-maximum suppression are inside.

    Args:
        run_folder: of the torchvision engine.
        output: ends in ``.onnx`` or ``.pt2``; the card goes beside it, with ``.md``.
        form: ``onnx`` or ``torch-export`` (see :func:`trace` for the smallest image of the latter).
        images: to compare on, at most :data:`MOST_IMAGES` of them are used; empty takes the run's test images.

    Raises:
        UserError: no such run, a library is missing, no images to compare on, or other detections than the
            detector's (nothing is left behind then).
    """
    output = Path(output)
    if output.suffix != SUFFIXES[form]:
        raise UserError(f"--output {output}: the file must end in {SUFFIXES[form]}")
    if form == "onnx":
        require_onnx()
    detector, config, classes = load_run(run_folder)
    inputs = list(check_images(config, classes, images))
    about = {
        "classes": list(classes),
        "input": "uint8 RGB (3, height, width)",
        "min_size": config.INPUT.MIN_SIZE_TEST,
        "max_size": config.INPUT.MAX_SIZE_TEST,
        "score_threshold": config.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
    }
    own = _difference(_detector_run(detector), _graph_run(detector), inputs, config)
    ties = sum(bool(equal_scores(detector, image)) for image in inputs)
    if not ties:
        own.check(str(output))
    with atomic_path(output) as temporary, _quiet():
        program = trace(detector)
        if form == "onnx":
            _write_onnx(program, temporary, about)
            run = _onnx_run(temporary)
        else:
            extra = {"nst_det.json": json.dumps(about, ensure_ascii=False)}
            # by its own name torch.export would refuse a file that doesn't end in .pt2
            with open(temporary, "wb") as file:
                torch.export.save(program, file, extra_files=extra)
            run = _program_run(temporary)
        found = _difference(_graph_run(detector), run, inputs, config)
        found.check(str(output))
    card = output.with_suffix(".md")
    write_text(card, detector_card(run_folder, config, classes, output.name, form, found))
    return ExportedDetector(output, card, found, ties)


def require_onnx() -> None:
    """Refuse where the libraries of the extra ``export`` are missing.

    Raises:
        UserError: it names the extra.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: {error.name} is not installed; pip install 'nst_det[export]'") from error


def trace(detector: Detector) -> ExportedProgram:
    """The graph of a detector on the CPU, for images of any size.

    ``torch.export`` itself holds it to images whose sides are longer than the largest stride (64 pixels with FPN): it
    takes a map of one row for another program.  ONNX has no such limit.
    """
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
            custom_translation_table={torch.ops.aten.sort.stable: _falling_order},
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


def _falling_order(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """``aten::sort.stable`` of (N,) values in ONNX, whose TopK takes the lower index first among equal ones."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values), axis=dim, largest=int(descending), sorted=1)


def _onnx_run(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(list(OUTPUT_NAMES), {INPUT_NAME: image})


def _program_run(path: Path) -> Run:
    with open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [value.numpy() for value in module(torch.from_numpy(image))]

    return run


def equal_scores(detector: Detector, image: np.ndarray) -> int:
    """How many anchors, of those that become proposals of an image (3, H, W) RGB, have the score of another one."""
    pixels = torch.from_numpy(image[::-1].copy() if detector.input_format == "BGR" else image)
    rpn = detector.proposal_generator
    with torch.no_grad():
        images, _ = detector.preprocess([pixels])
        maps = detector.backbone(images)
        logits, _ = rpn.rpn_head([maps[name] for name in rpn.settings.in_features])
    best = [row[0].topk(min(rpn.settings.pre_nms[1], row.shape[1])).values for row in logits]
    return sum(len(row) - len(row.unique()) for row in best)


def _difference(first: Run, second: Run, images: Sequence[np.ndarray], config: CfgNode) -> Difference:
    return difference(first, second, images, config.MODEL.ROI_HEADS.SCORE_THRESH_TEST, config.TEST.DETECTIONS_PER_IMAGE)


def _graph_run(detector: Detector) -> Run:
    graph = DetectorGraph(detector)

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [value.numpy() for value in graph(torch.from_numpy(image))]

    return run


def _detector_run(detector: Detector) -> Run:
    def run(image: np.ndarray) -> list[np.ndarray]:
        pixels = torch.from_numpy(image)
        if detector.input_format == "BGR":
            pixels = pixels.flip(0)
        with torch.no_grad():
            found: dict[str, Tensor] = detector([{"image": pixels}])[0]
        return [found[name].numpy() for name in OUTPUT_NAMES]

    return run


def check_images(config: CfgNode, classes: Sequence[str], named: Sequence[str | Path]) -> Iterator[np.ndarray]:
    """At most :data:`MOST_IMAGES` images (3, H, W) uint8 RGB, resized as at evaluation.

    Args:
        config: of the run.
        classes: of the run.
        named: files and folders; empty takes the first of the run's DATASETS.TEST.

    Raises:
        UserError: none can be read.
    """
    if not named:
        try:
            data = open_voc(config, "DATASETS.TEST", classes)[0]
            named = [data.image_path(id_) for id_ in data.ids[:MOST_IMAGES]]
        except UserError as error:
            raise UserError(f"no test images to compare the export on ({error}); name some by --images") from error
    for _, _, pixels in itertools.islice(read_sources(find_sources(named)), MOST_IMAGES):
        height, width = pixels.shape[:2]
        size = resized_shape(height, width, config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
        yield np.ascontiguousarray(resize(pixels, *size).transpose(2, 0, 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on each other's interfaces; an error is raised all the same."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
