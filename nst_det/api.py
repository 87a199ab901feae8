"""What the commands do, from Python: for scripts and notebooks.

The functions are in the package itself (``nst_det.compare``) and take the files and keys that the commands take.
Where logging is not configured, they start it, so that progress is seen; in a notebook their results are tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from nst_det.comparison.result import ComparisonResult, RowResult
    from nst_det.detection.predict import ImageDetector
    from nst_det.detection.predictions import PredictResult
    from nst_det.errors import UserError
    from nst_det.evaluation.voc import VocResult
    from nst_det.exporting import Exported
    from nst_det.models import Card
    from nst_det.scaffold.init import Project

Settings = Mapping[str, Any] | Sequence[str]
# of nst-det export
BACKBONE_FORMATS = ["timm", "torchvision", "detectron2"]
DETECTOR_FORMATS = ["onnx", "openvino", "torch-export"]
# of what a comparison can't tell, below its table
SHOWN_LINES = 3


@dataclass(frozen=True)
class CompareResult(JupyterMixin):
    """What a comparison found; shows itself as its table, and what this can't tell.

    Attributes:
        results: as in ``report/results.json``.
        folder: of the comparison.
    """

    results: ComparisonResult = field(repr=False)
    folder: Path

    @property
    def rows(self) -> list[RowResult]:
        """One a method: ``method``, ``score`` (0..1), ``delta_vs_ce``, ``verdict``, ``vs_imagenet`` and more."""
        return self.results.rows

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder / "report" / "index.html"

    @property
    def conclusion(self) -> str:
        """The result in some sentences, as at the head of the report."""
        from nst_det.report.summary import conclusion

        return conclusion(self.results)

    @property
    def untold(self) -> list[str]:
        """What the numbers can't tell, in short sentences, the most important first."""
        from nst_det.report import untold

        return untold(self.results, self.folder)

    def __rich__(self) -> Group:
        from rich.text import Text

        from nst_det.comparison.pipeline import results_table
        from nst_det.report.summary import published_start
        from nst_det.report.tables import UNTOLD

        lines = self.untold
        more = [f"{len(lines) - SHOWN_LINES} more in the report"] if len(lines) > SHOWN_LINES else []
        box = [f"{UNTOLD}:", *(f"- {line}" for line in [*lines[:SHOWN_LINES], *more])] if lines else []
        start = published_start(self.results)
        return Group(results_table(self.results), *map(Text, [start] if start else []), *map(Text, box))


class DistillResult(JupyterMixin, dict[str, dict[str, Any]]):
    """``result.json`` by method, and of the teacher under ``teacher``; shows itself as a table.

    Attributes:
        folder: OUTPUT_DIR of the call.
    """

    folder: str

    def __rich__(self) -> Table:
        from nst_det.distillation.pipeline import results_table

        return results_table(self, self.folder)


def init(
    project: str | Path,
    voc: str | Path | None = None,
    *,
    coco: str | Path | Sequence[str | Path] = (),
    images: str | Path | Sequence[str | Path] = (),
    train: str = "",
    test: str = "",
    device: str = "",
    unlabelled: str | Path | None = None,
    student: str = "",
    teacher: str = "",
) -> Project:
    """Make a project for your own data: configs that fit it, and data for stage one; ``nst-det init`` does the same.

    Args:
        project: the folder to make; its last part names the backbone files.
        voc: your data as a VOC folder; either this, or
        coco: COCO annotations, one file, or two to train and to test on.
        images: with ``coco`` its folder, or one a file; with ``voc`` those of stage one, a folder a class (else cut).
        train: list of the VOC folder to train on; "" takes the one that is there, or cuts it.
        test: list to test on, likewise.
        device: ``cpu`` or ``cuda``, to fit sizes and schedules to; "" takes the GPU if there is one.
        unlabelled: images without labels for stage one, at any depth; a published network teaches.
        student: timm's name of a published network; "" takes a small one on a CPU, ``resnet18.tv_in1k`` on a GPU.
        teacher: likewise; "" takes a small one, or ``resnet50.tv_in1k``.

    Returns:
        What was found in the data and chosen for it: ``values``, ``report``, ``images`` and more.

    Raises:
        UserError: the data can't be used, or the folder is there; nothing is left behind.

    Example:
        >>> import nst_det
        >>> project = nst_det.init("another_project", "my_images")
        >>> project.values.classes == tuple(sorted(project.values.classes)), sum(project.images)
        (True, 12)
    """
    from nst_det.data.coco import CocoSource
    from nst_det.errors import UserError
    from nst_det.scaffold.init import init_project

    annotations, folders = _paths(coco), _paths(images)
    if bool(annotations) == (voc is not None):
        raise UserError("init: name your data by --voc or by --coco")
    if annotations and not folders:
        raise UserError("--coco: name the folder of its images by --images")
    if len(folders) > 1 and voc is not None:
        raise UserError("--images: one folder of classification data; with --coco there may be two")
    data = CocoSource(annotations, folders) if voc is None else voc
    own = folders[0] if folders and voc is not None else None
    return init_project(project, data, own, train, test, device, unlabelled, student, teacher)


def _paths(given: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    return tuple(map(Path, [given] if isinstance(given, str | Path) else given))


def compare(
    project: str | Path,
    settings: Settings = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
    jobs: int = 0,
    ray_address: str | None = None,
) -> CompareResult:
    """Run every method and seed through both stages, then write the report; resume what was stopped.

    Without DETECT.CONFIG it compares the students of stage one.  Runs are processes; ``nst-det compare`` does the same.

    Args:
        project: the folder that ``init`` made, or the YAML of a comparison.
        settings: keys with other values, ``{"ROWS": ["teacher"], "DETECT.SOLVER.MAX_ITER": 300}``, or KEY VALUE pairs
            as on the command line; ``nst-det keys`` lists them.
        methods: transfer methods, such as ``["ce", "nst-poly"]``; None takes the config's.
        seeds: seeds, such as ``[0, 1, 2]``; None takes the config's.
        output: the folder of the comparison, in place of OUTPUT_DIR.
        jobs: runs side by side; 0 takes as many as there are cores or GPUs.
        ray_address: of a Ray cluster that does the runs, "" for one on this machine; None does them here.

    Raises:
        UserError: the input of the comparison, or of one of its stages, can't be used.
        RunFailed: a run ended with an error; the same call resumes from what is done.
        Preempted: it was interrupted; the same call resumes from what is done.

    Example:
        >>> import nst_det
        >>> result = nst_det.compare("my_project", methods=["ce"], seeds=[0])
        >>> [row.method for row in result.rows]
        ['scratch', 'ce']
        >>> result.report.name
        'index.html'
    """
    from nst_det.comparison.config import load_comparison

    _show_progress()
    # before torch is imported, which takes seconds
    named = {key: list(value) for key, value in (("METHODS", methods), ("SEEDS", seeds)) if value is not None}
    comparison = load_comparison(project, output, [*key_values(settings), *key_values(named)])
    from nst_det.comparison import pipeline

    return CompareResult(pipeline.compare(comparison, jobs, ray_address=ray_address), comparison.folder)


def distill(project: str | Path, settings: Settings = ()) -> DistillResult:
    """Stage one: train the teacher, and a backbone file for each method; ``nst-det distill`` does the same.

    It runs in this process.  What is done already in OUTPUT_DIR is not done again.

    Args:
        project: the folder that ``init`` made, or the YAML of stage one.
        settings: keys with other values, ``{"METHODS": ["ce", "kd"]}``, or KEY VALUE pairs as on the command line.

    Returns:
        By method: ``top1`` and ``top5`` on the validation split (0..1; without labels ``measure`` names what else),
        ``seconds``, ``steps``, ``params``, and ``backbone``, the file.

    Raises:
        UserError: something in config, data or weights can't be used, or the teacher is worse than expected.

    Example:
        >>> import nst_det
        >>> result = nst_det.distill("my_project", {"METHODS": ["kd+nst-poly"]})
        >>> list(result)
        ['teacher', 'kd+nst-poly']
        >>> 0 <= result["kd+nst-poly"]["top1"] <= 1
        True
    """
    from nst_det.distillation.config import load_distill_config

    _show_progress()
    config = load_distill_config(project, key_values(settings))
    from nst_det.distillation import pipeline

    result = DistillResult(pipeline.distill(config))
    result.folder = config.OUTPUT_DIR
    return result


def load_backbone(weights: str | Path) -> tuple[nn.Module, Card]:
    """Load a distilled network, whole, in evaluation mode on the CPU, and its card.

    It is a timm model: ``model(images)`` gives logits (B, classes), ``model.forward_intermediates(images)`` maps.
    Images are (B, 3, H, W), normalized as ``card.input`` says.  :func:`nst_det.models.bottomup_from_file` gives
    the part that a detector is built on.

    Args:
        weights: a ``.safetensors`` path or ``backbone://NAME``.

    Raises:
        UserError: no such file, damaged, not what its card says, or weights that don't fit the architecture.

    Example:
        >>> import nst_det, torch
        >>> model, card = nst_det.load_backbone("my_project/output/backbones/my_project-ce-s0.safetensors")
        >>> card.arch, card.method
        ('resnet10t', 'ce')
        >>> tuple(model(torch.zeros(2, 3, 64, 64)).shape) == (2, card.num_classes)
        True
    """
    from nst_det.models import classifier_from_file

    return classifier_from_file(weights)


def load_detector(
    run: str | Path, *, threshold: float | None = None, device: str = "", tile: int = 0, overlap: float | None = None
) -> ImageDetector:
    """Load the detector of a finished run, or an exported one, to be called with images.

    ``detector(image)`` takes a path, a PIL image or an (H, W, 3) uint8 RGB array, and gives ``boxes`` (N, 4) float32
    ``xmin ymin xmax ymax`` in pixels of that image from its upper left corner, ``scores`` (N,) float32 from 0 to 1,
    best first, ``labels`` (N,) int64 and their ``names``.  They are equal to those of ``nst-det predict``.

    Args:
        run: folder of a train-det run, such as ``my_project/output/detect/seed0/nst-poly``, or the file of a detector
            that ``export`` wrote.
        threshold: minimum score, 0 to 1; None takes each class's of best F1 on the validation split, 0.5 without one.
        device: ``cpu`` or ``cuda``; "" takes the GPU if there is one. An exported file is run on the CPU.
        tile: look at larger images in square tiles of so many pixels a side; 0 looks at each image as a whole.
        overlap: part of a tile that its neighbors share, at least 0 and below 1 (with ``tile``; None: 0.2).

    Raises:
        UserError: no finished run and no exported detector, or an image that can't be read.

    Example:
        >>> import nst_det
        >>> detector = nst_det.load_detector("my_project/output/detect/seed0/ce", threshold=0.0)
        >>> found = detector("my_images/JPEGImages/000001.jpg")
        >>> found.boxes.shape == (len(found.scores), 4), set(found.names) <= set(detector.classes)
        (True, True)
    """
    from nst_det.exporting.runtime import load_detector

    return load_detector(run, threshold, device, tile, overlap)


def predict(
    images: str | Path | Sequence[str | Path],
    run: str | Path,
    output: str | Path = "predictions",
    *,
    formats: Sequence[str] = ("images", "json"),
    threshold: float | None = None,
    classes: Sequence[str] = (),
    device: str = "",
    every: int = 1,
    tile: int = 0,
    overlap: float | None = None,
) -> PredictResult:
    """Detect objects with a finished run or an exported file, and write them; ``nst-det predict`` does the same.

    Args:
        images: images, folders of images, or videos.
        run: folder of a train-det run, or the file of a detector that ``export`` wrote.
        output: the folder to write into.
        formats: of ``images`` (pictures and videos with boxes drawn), ``json``, ``voc`` and ``csv``.
        threshold: minimum score, 0 to 1; None takes each class's of best F1 on the validation split, 0.5 without one.
        classes: only these; () takes all.
        device: ``cpu`` or ``cuda``; "" takes the GPU if there is one. An exported file is run on the CPU.
        every: use every N-th frame of a video.
        tile: look at larger images in square tiles of so many pixels a side; 0 looks at each image as a whole.
        overlap: part of a tile that its neighbors share, at least 0 and below 1 (with ``tile``; None: 0.2).

    Raises:
        UserError: no such image or run, or an option that can't be used.  A file that can't be read is passed over and
            told in the result.

    Example:
        >>> import nst_det
        >>> result = nst_det.predict("my_images/JPEGImages", "my_project/output/detect/seed0/ce", formats=["json"])
        >>> result.images, result.unreadable
        (12, [])
    """
    from nst_det.detection.predictions import FORMATS, PredictionWriter, PredictResult
    from nst_det.detection.sources import find_sources, read_sources
    from nst_det.engine.device import gpu_errors_in_one_line
    from nst_det.errors import UserError

    if not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"--format: '{','.join(formats)}': choose from {', '.join(FORMATS)}, joined by commas")
    if every < 1:
        raise UserError(f"--every: {every}; give 1 or more")
    sources = find_sources([images] if isinstance(images, str | Path) else images)
    unreadable: list[UserError] = []
    count, best = 0, None
    with gpu_errors_in_one_line("take --device cpu"):
        detector = load_detector(run, threshold=threshold, device=device, tile=tile, overlap=overlap)
        for name in classes:
            if name not in detector.classes:
                known = ", ".join(detector.classes)
                raise UserError(f"--classes: this detector doesn't know '{name}'; it knows {known}")
        least = detector.least_scores(classes or None)
        with PredictionWriter(output, formats, detector.classes) as writer:
            for found in detector.predict(read_sources(sources, every, unreadable.append)):
                wanted = found.scores[least[found.labels] <= 1]
                best = max([*([] if best is None else [best]), *wanted[:1].tolist()], default=None)
                writer.add(found.above(least))
                count += 1
            detections = writer.finish()
    known_scores = detector.thresholds, detector.chosen
    return PredictResult(count, detections, unreadable, len(sources), Path(output), *known_scores, best, detector.tile)


def export(
    output: str | Path,
    format: str,
    *,
    run: str | Path = "",
    weights: str | Path = "",
    arch: str = "",
    images: Sequence[str | Path] = (),
    precision: str = "fp32",
    batch: int = 1,
    calibration: Sequence[str | Path] = (),
    measure: bool = False,
) -> Exported:
    """Write a backbone for timm, torchvision or Detectron2, or a detector for ONNX, OpenVINO or torch.export.

    ``nst-det export`` does the same.  What is written is compared with the original, and a model card is written next
    to it.

    Args:
        output: ``FILE.onnx``, ``FILE.xml`` (openvino, with ``FILE.bin``), ``FILE.pt2`` (torch-export), a folder to make
            (timm), ``FILE.pth``, or ``FILE.pkl``.
        format: ``timm``, ``torchvision``, ``detectron2``, ``onnx``, ``openvino`` or ``torch-export``.
        run: for a detector: the folder of a train-det run, of either engine.
        weights: for a backbone: its file, or ``backbone://NAME``; for detectron2 also plain ResNet weights.
        arch: timm name of plain weights, for example resnet50.
        images: compare a detector on these; () takes its test images.
        precision: of a detector: ``fp32``; ``fp16``, whose weights are rounded to 16 bits; or ``int8``, whose
            convolutions and products are quantized.
        batch: images that a detector takes at once, all of one size.
        calibration: images that int8 sets its ranges by; () takes those of the training split.
        measure: also measure a detector's mAP on its test images, latency, size and memory, beside PyTorch;
            ``deployed`` of the result, and ``deployed.json`` in the run's folder, have all that were measured.

    Returns:
        ``files`` by what they are, and ``agreement``, what was compared and how far it differs.

    Raises:
        UserError: no such run or file, a format that it can't have, or what was written differs from the original.

    Example:
        >>> import nst_det
        >>> backbone = "my_project/output/backbones/my_project-ce-s0.safetensors"
        >>> sorted(nst_det.export("for_timm", "timm", weights=backbone).files)
        ['card', 'weights']
    """
    from nst_det.errors import UserError

    if format not in BACKBONE_FORMATS + DETECTOR_FORMATS:
        raise UserError(f"--format: '{format}'; choose from {', '.join(BACKBONE_FORMATS + DETECTOR_FORMATS)}")
    of_detector = format in DETECTOR_FORMATS
    source, wanted = (run, "--run DIR") if of_detector else (weights, "--weights FILE")
    if not source or (run and weights):
        raise UserError(f"--format {format} is for a {'detector' if of_detector else 'backbone'}: give {wanted} alone")
    if arch and format != "detectron2":
        raise UserError("--arch: a backbone file says its architecture itself; leave --arch out")
    given = {"--images": images, "--precision": precision != "fp32", "--batch": batch != 1}
    given |= {"--measure": measure, "--calibration": calibration}
    for option, value in given.items() if not of_detector else ():
        if value:
            raise UserError(f"{option}: only for detectors; leave it out")
    if calibration and precision != "int8":
        raise UserError("--calibration: only int8 is calibrated; add --precision int8")
    if of_detector:
        from nst_det.exporting.detector import DetectorExport, check_form

        check_form(Path(output), format, precision)
        return DetectorExport(run, batch).write(output, format, precision, images, calibration, measure)
    from nst_det.exporting import backbone

    if format == "detectron2":
        return backbone.export_detectron2(str(weights), output, arch)
    write = backbone.export_timm if format == "timm" else backbone.export_torchvision
    return write(str(weights), output)


def evaluate_voc(
    detections: str | Path,
    voc_root: str | Path,
    split: str = "",
    classes: Sequence[str] | None = None,
    iou: float | Sequence[float] = 0.5,
    coco_names: str | Path | None = None,
) -> VocResult:
    """Compute VOC AP of anyone's detections, equal to the devkit's; ``nst-det evaluate`` does the same.

    Args:
        detections: a folder with ``comp4_det_SPLIT_CLASS.txt``, a ``detections.json``, or COCO results.
        voc_root: the VOC folder with the annotations.
        split: a list in ``ImageSets/Main``; "" takes the one to test on, or the only one.
        classes: names, in the order of the numbers where COCO results have numbers without ``coco_names``; None takes
            those of the split's annotations.
        iou: overlap thresholds, above 0 and at most 1.
        coco_names: a COCO annotation file that says which image and class the numbers in COCO results mean.

    Raises:
        UserError: files, a line or entry in them, or a threshold that can't be used.

    Example:
        >>> import nst_det
        >>> found = "my_project/output/detect/seed0/ce/detections.json"
        >>> result = nst_det.evaluate_voc(found, "my_images", "nst_det_test", iou=[0.5, 0.75])
        >>> result.classes == tuple(sorted(result.classes)), result.map11.shape
        (True, (2,))
    """
    from nst_det.evaluation import voc
    from nst_det.evaluation.io import overlap_thresholds, read_voc

    return voc.evaluate_voc(*read_voc(detections, voc_root, split, classes, coco_names), overlap_thresholds(iou))


def key_values(settings: Settings) -> list[str]:
    """Return settings as KEY VALUE pairs of the command line.

    Example:
        >>> key_values({"SEEDS": [0, 1], "NAME": "mine", "DETECT.SOLVER.BASE_LR": 1e-3})
        ['SEEDS', '[0, 1]', 'NAME', 'mine', 'DETECT.SOLVER.BASE_LR', '0.001']
    """
    if not isinstance(settings, Mapping):
        return list(settings)
    from nst_det.engine.config import value_text

    return [text for key, value in settings.items() for text in (key, value_text(key, value))]


def _show_progress() -> None:
    from nst_det.engine.progress import start_logging

    # unless the caller has configured logging
    if not logging.getLogger().handlers:
        start_logging()
