import math

import numpy as np
import pytest

from nst_det.data.voc import VocDataset
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.coco import evaluate_coco
from nst_det.evaluation.io import read_detections


def truth(boxes, difficult=None):
    count = len(boxes)
    return GroundTruth(
        ("a", "b"), ("cat", "dog"), np.zeros(count, np.int64), np.zeros(count, np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(difficult or [False] * count, dtype=bool),
    )  # fmt: skip


def found(boxes, scores=None):
    count = len(boxes)
    return Detections(
        ["a"] * count, ("cat", "dog"), np.zeros(count, np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(scores or [0.9] * count, dtype=np.float64),
    )  # fmt: skip


BOX = (1, 1, 100, 100)


def test_a_perfect_detection(capsys):
    result = evaluate_coco(found([BOX]), truth([BOX]))
    assert result.summary["AP"] == pytest.approx(1)
    assert result.summary["APl"] == pytest.approx(1)
    assert math.isnan(result.summary["APs"])
    assert result.per_class["cat"] == pytest.approx(1)
    assert math.isnan(result.per_class["dog"])
    assert result.to_dict()["per_class"]["dog"] is None
    assert capsys.readouterr() == ("", "")


def test_overlap_is_continuous_and_counts_in_steps_of_five_hundredths():
    # 100 x 100 pixels against 100 x 77: overlap 0.77 passes 0.5, 0.55 .. 0.75, six of ten thresholds
    result = evaluate_coco(found([(1, 1, 100, 77)]), truth([BOX]))
    assert result.summary["AP"] == pytest.approx(0.6)
    assert result.summary["AP50"] == pytest.approx(1)
    assert result.summary["AP75"] == pytest.approx(1)


def test_difficult_objects_count_neither_way():
    other = (201, 201, 300, 300)
    both = [BOX, other]
    rows = found([other, other, BOX], [0.9, 0.8, 0.7])
    assert evaluate_coco(rows, truth(both, [False, True])).summary["AP"] == pytest.approx(1)
    assert evaluate_coco(rows, truth([BOX])).summary["AP"] == pytest.approx(1 / 3)


def test_no_detections_and_no_objects():
    assert evaluate_coco(found([]), truth([BOX])).summary["AP"] == 0
    assert math.isnan(evaluate_coco(found([BOX]), truth([])).summary["AP"])


def test_an_image_without_ground_truth_is_refused():
    rows = Detections(["z"], ("cat",), np.array([0]), np.array([[1.0, 1, 5, 5]]), np.array([0.5]))
    with pytest.raises(ValueError, match="of class 'z', which is not in the ground truth"):
        evaluate_coco(rows, truth([BOX]))


@pytest.mark.real_data
def test_real_detections_score_close_to_their_voc_ap(real_data):
    root = real_data / "voc2007_golden_small"
    data = VocDataset(root, "test")
    gold = GroundTruth.from_annotations(data.annotations(), data.classes)
    result = evaluate_coco(read_detections(root / "dets", data.ids, data.classes, "test"), gold)
    # the devkit says 0.804 for the area below the curve at the same overlap
    assert result.summary["AP50"] == pytest.approx(0.804, abs=0.005)
    assert result.summary["AP"] < result.summary["AP75"] < result.summary["AP50"]
