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

from rich.jupyter import JupyterMixin
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from nst_det.comparison.result import ComparisonResult, RowResult
    from nst_det.evaluation.boxes import Detections, GroundTruth
    from nst_det.evaluation.voc import VocResult
    from nst_det.models import Card

Settings = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class CompareResult(JupyterMixin):
    """What a comparison found; shows itself as its table.

    Attributes:
        results: as in ``report/results.json``.
        folder: of the comparison.
    """

    results: ComparisonResult = field(repr=False)
    folder: Path

    @property
    def rows(self) -> list[RowResult]:
        """One a method: ``method``, ``map`` (11-point, 0..1), ``delta_vs_ce``, ``verdict`` and more."""
        return self.results.rows

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder / "report" / "index.html"

    def __rich__(self) -> Table:
        from nst_det.comparison.pipeline import results_table

        return results_table(self.results)


class DistillResult(JupyterMixin, dict[str, dict[str, Any]]):
    """``result.json`` by method, and of the teacher under ``teacher``; shows itself as a table.

    Attributes:
        folder: OUTPUT_DIR of the call.
    """

    folder: str

    def __rich__(self) -> Table:
        from nst_det.distillation.pipeline import results_table

        return results_table(self, self.folder)


def compare(
    config_file: str | Path,
    settings: Settings = (),
    *,
    output: str | Path | None = None,
    jobs: int = 0,
    ray_address: str | None = None,
) -> CompareResult:
    """Run every method and seed through both stages, then write the report; resume what was stopped.

    ``nst-det compare`` does the same.  The runs are processes of their own.

    Args:
        config_file: YAML of the comparison.
        settings: keys with other values, ``{"SEEDS": [0, 1], "DETECT.SOLVER.MAX_ITER": 300}``, or KEY VALUE pairs as
            on the command line.
        output: the folder of the comparison, in place of OUTPUT_DIR.
        jobs: runs side by side; 0 takes as many as there are cores or GPUs.
        ray_address: of a Ray cluster that does the runs, "" for one on this machine; None does them here.

    Raises:
        UserError: the input of the comparison, or of one of its stages, can't be used.
        RunFailed: a run ended with an error; the same call resumes from what is done.
        Preempted: it was interrupted; the same call resumes from what is done.

    Example:
        >>> import nst_det
        >>> result = nst_det.compare("my_project/compare.yaml", {"METHODS": ["ce"], "SEEDS": [0]})
        >>> [row.method for row in result.rows]
        ['scratch', 'ce']
        >>> result.report.name
        'index.html'
    """
    from nst_det.comparison import pipeline
    from nst_det.comparison.config import load_comparison

    _show_progress()
    comparison = load_comparison(config_file, output, key_values(settings))
    return CompareResult(pipeline.compare(comparison, jobs, ray_address=ray_address), comparison.folder)


def distill(config_file: str | Path, settings: Settings = ()) -> DistillResult:
    """Stage one: train the teacher, and a backbone file for each method; ``nst-det distill`` does the same.

    It runs in this process.  What is done already in OUTPUT_DIR is not done again.

    Args:
        config_file: YAML of stage one.
        settings: keys with other values, ``{"METHODS": ["ce", "kd"]}``, or KEY VALUE pairs as on the command line.

    Returns:
        By method: ``top1`` and ``top5`` on the validation split (0..1), ``seconds``, ``steps``, ``params``, and
        ``backbone``, the file.

    Raises:
        UserError: something in config, data or weights can't be used, or the teacher is worse than expected.

    Example:
        >>> import nst_det
        >>> result = nst_det.distill("my_project/distill.yaml", {"METHODS": ["kd+nst-poly"]})
        >>> list(result)
        ['teacher', 'kd+nst-poly']
        >>> 0 <= result["kd+nst-poly"]["top1"] <= 1
        True
    """
    from nst_det.distillation import pipeline
    from nst_det.distillation.config import load_distill_config

    _show_progress()
    config = load_distill_config(config_file, key_values(settings))
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
        ('nst_resnet10_w32', 'ce')
        >>> tuple(model(torch.zeros(2, 3, 64, 64)).shape) == (2, card.num_classes)
        True
    """
    from nst_det.models import classifier_from_file

    return classifier_from_file(weights)


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

    return voc.evaluate_voc(*read_voc(detections, voc_root, split, classes, coco_names), overlap_thresholds(iou))


def read_voc(
    detections: str | Path,
    voc_root: str | Path,
    split: str,
    classes: Sequence[str] | None,
    coco_names: str | Path | None,
) -> tuple[Detections, GroundTruth]:
    """Return detections and the ground truth that they are measured against."""
    import numpy as np

    from nst_det.data.coco import form_problem
    from nst_det.data.splits import list_to_test
    from nst_det.data.voc import VocDataset, find_voc_root
    from nst_det.evaluation.boxes import GroundTruth, to_xywh
    from nst_det.evaluation.io import read_coco_names, read_detections

    root = find_voc_root(voc_root)
    data = VocDataset(root, split or list_to_test(root), classes)
    annotations = data.annotations()
    truth = GroundTruth.from_annotations(annotations, data.classes)
    names = None if coco_names is None else read_coco_names(coco_names)
    found = read_detections(detections, data.ids, data.classes, data.split, names, classes is not None)
    size_of = {annotation.id: (annotation.width, annotation.height) for annotation in annotations}
    problem = form_problem(to_xywh(found.box), np.reshape([size_of[id_] for id_ in found.image_id], (-1, 2)))
    if problem:
        logging.getLogger(__name__).warning("%s: %s", detections, problem)
    return found, truth


def overlap_thresholds(iou: float | Sequence[float]) -> list[float]:
    """Return ``iou`` as a list, checked: each is above 0 and at most 1."""
    from nst_det.errors import UserError

    values = [float(iou)] if isinstance(iou, int | float) else [float(value) for value in iou]
    if not values or not all(0 < value <= 1 for value in values):
        raise UserError(f"iou {' '.join(map(str, values))}: overlap thresholds lie above 0 and at most at 1")
    return values


def key_values(settings: Settings) -> list[str]:
    """Return settings as KEY VALUE pairs of the command line.

    Example:
        >>> key_values({"SEEDS": [0, 1], "NAME": "mine", "DETECT.SOLVER.BASE_LR": 1e-3})
        ['SEEDS', '[0, 1]', 'NAME', 'mine', 'DETECT.SOLVER.BASE_LR', '0.001']
    """
    if not isinstance(settings, Mapping):
        return list(settings)
    return [text for key, value in settings.items() for text in (key, _as_text(key, value))]


def _as_text(key: str, value: Any) -> str:
    from nst_det.engine.config import parse_value
    from nst_det.errors import UserError

    value = str(value) if isinstance(value, Path) else value
    for text in ([value] if isinstance(value, str) else []) + [repr(value)]:
        if parse_value(text) == value:
            return text
    raise UserError(f"settings: {key}: {value!r:.80} can't be written in a config; give numbers, text, lists or dicts")


def _show_progress() -> None:
    from nst_det.engine.progress import start_logging

    # unless the caller has configured logging
    if not logging.getLogger().handlers:
        start_logging()
