"""The figures of one detector that ``result.json`` holds, the same for both engines."""

from typing import Any

from nst_det.evaluation.boxes import Detections, GroundTruth, count_objects
from nst_det.evaluation.coco import SUMMARY, evaluate_coco
from nst_det.evaluation.thresholds import THRESHOLDS as BY_CLASS
from nst_det.evaluation.thresholds import best_thresholds, to_json
from nst_det.evaluation.voc import VocResult, evaluate_voc

# COCO's; the first is the one that VOC is quoted at
THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


def summarize(
    found: Detections, truth: GroundTruth, coco: bool = True, validation: bool = False
) -> tuple[VocResult, dict[str, Any]]:
    """Return VOC AP at overlaps 0.5, 0.55 .. 0.95, and what ``result.json`` holds of it.

    That is ``map`` (mean of the 11-point AP at overlap 0.5), ``map_area``, ``per_class`` and ``per_class_area`` (name
    to AP), ``map_by_iou`` (overlap to mean 11-point AP), ``coco`` (AP, AP50, AP75, APs, APm, APl; {} where ``coco`` is
    False, since pycocotools takes longer than all the rest), and ``objects`` and ``objects_per_class`` (their number by
    size and by class, without the difficult ones).  AP are 0..1, None where no object counts.  A
    ``validation`` split has ``thresholds`` too, see :mod:`nst_det.evaluation.thresholds`: none is chosen on the test
    split.
    """
    voc = evaluate_voc(found, truth, THRESHOLDS)
    at_half = voc.to_dict()
    counts = count_objects(truth).values()
    summary = evaluate_coco(found, truth).to_dict() if coco else {}
    return voc, {
        "map": at_half["map"],
        "map_area": at_half["map_area"],
        "per_class": {name: numbers["ap11"] for name, numbers in at_half["per_class"].items()},
        "per_class_area": {name: numbers["ap_area"] for name, numbers in at_half["per_class"].items()},
        "map_by_iou": {str(threshold): voc.to_dict(threshold)["map"] for threshold in THRESHOLDS},
        "coco": {name: summary[name] for name in SUMMARY if coco},
        "objects": {size: sum(getattr(one, size) for one in counts) for size in ("small", "medium", "large")},
        "objects_per_class": {name: numbers["positives"] for name, numbers in at_half["per_class"].items()},
        **({BY_CLASS: to_json(best_thresholds(voc))} if validation else {}),
    }
