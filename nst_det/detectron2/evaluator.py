"""VOC and COCO AP as a Detectron2 evaluator."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from nst_det.detectron2.config import VALIDATION
from nst_det.engine.io import write_json
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.io import write_detections
from nst_det.evaluation.metrics import THRESHOLDS, summarize

log = logging.getLogger(__name__)


class VocEvaluator(DatasetEvaluator):
    """AP on a data set of :func:`~nst_det.detectron2.data.register_voc`.

    Detections are gathered from all processes.  ``difficult`` objects count neither way, scores are not rounded.
    ``output_dir`` gets ``detections.json`` and ``result.json``; ``coco`` adds COCO's AP, by pycocotools, which takes
    longer than all the rest.
    """

    def __init__(self, dataset_name: str, output_dir: str | Path = "", coco: bool = True) -> None:
        data = MetadataCatalog.get(dataset_name).get("voc")
        if data is None:
            raise UserError(f"{dataset_name}: not registered by register_voc, so its annotations aren't known here")
        self.name, self.data, self.output_dir, self.coco = dataset_name, data, str(output_dir), coco
        self._found: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def reset(self) -> None:
        self._found = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        for given, output in zip(inputs, outputs):
            found = output["instances"].to("cpu")
            boxes, labels = found.pred_boxes.tensor.numpy(), found.pred_classes.numpy()
            self._found.append((str(given["image_id"]), boxes, labels, found.scores.numpy()))

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Return AP in percent; None in all processes but the first.

        ``voc``: ``AP50`` and ``AP75`` (11-point), ``AP`` (their mean over the overlaps 0.5, 0.55 .. 0.95),
        ``AP50-area``, and ``AP50-<class>`` (11-point).  ``bbox``: COCO's ``AP``, ``AP50`` and ``AP75``.
        """
        gathered = comm.gather(self._found)
        if not comm.is_main_process():
            return None
        # each image once: data-parallel samplers may give one to two processes
        found = list({item[0]: item for part in gathered for item in part}.values())
        detections = Detections.from_images(found, self.data.classes)
        truth = GroundTruth.from_annotations(self.data.annotations(), self.data.classes)
        result, figures = summarize(detections, truth, self.coco, validation=self.name == VALIDATION)
        if self.output_dir:
            write_json(Path(self.output_dir) / "result.json", figures)
            write_detections(Path(self.output_dir) / "detections.json", detections)
        scores: dict[str, float | None] = {
            "AP": float(result.map11.mean()),
            "AP50": float(result.map11[0]),
            "AP75": float(result.map11[THRESHOLDS.index(0.75)]),
            "AP50-area": float(result.map_area[0]),
            **{f"AP50-{name}": value for name, value in zip(result.classes, result.ap11[0].tolist())},
        }
        tables = {"voc": scores}
        if figures["coco"]:
            tables["bbox"] = {name: figures["coco"][name] for name in ("AP", "AP50", "AP75")}
        return OrderedDict((name, _percent(values)) for name, values in tables.items())


def _percent(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else 100 * value for name, value in values.items()}
