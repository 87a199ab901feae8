import numpy as np
import pytest

from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.metrics import summarize


def make_truth(boxes, difficult=None):
    count = len(boxes)
    return GroundTruth(
        ("a",), ("cat", "dog"), np.zeros(count, np.int64), np.zeros(count, np.int64),
        np.array(boxes, dtype=np.float64), np.array(difficult or [False] * count, dtype=bool),
    )  # fmt: skip


def make_found(boxes):
    count = len(boxes)
    box = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Detections(["a"] * count, ("cat", "dog"), np.zeros(count, np.int64), box, np.linspace(0.9, 0.8, count))


def test_figures_by_overlap_and_size():
    # a medium object of 50 x 50 found whole, a small one of 10 x 10 missed, a large one of 100 x 100 found to 77 %
    truth = make_truth([(1, 1, 50, 50), (301, 301, 310, 310), (101, 101, 200, 200)])
    _, figures = summarize(make_found([(1, 1, 50, 50), (101, 101, 200, 177)]), truth)
    # two of three objects: recalls up to .6 of the eleven points; one of three beyond overlap .77: those up to .3
    wanted = {"0.5": 7 / 11, "0.75": 7 / 11, "0.8": 4 / 11, "0.95": 4 / 11}
    assert {key: figures["map_by_iou"][key] for key in wanted} == pytest.approx(wanted)
    assert next(iter(figures["map_by_iou"])) == "0.5"
    assert len(figures["map_by_iou"]) == 10
    assert figures["map"] == figures["map_by_iou"]["0.5"]
    assert figures["objects"] == {"small": 1, "medium": 1, "large": 1}
    sizes = [figures["coco"][name] for name in ("APs", "APm", "APl")]
    assert sizes == pytest.approx([0, 1, 0.6])
    assert figures["per_class"]["dog"] is None


def test_what_counts_nowhere_is_none_and_coco_can_be_left_out():
    _, figures = summarize(make_found([]), make_truth([(1, 1, 20, 20)], [True]))
    assert figures["map"] is None
    assert set(figures["map_by_iou"].values()) == {None}
    assert figures["objects"] == {"small": 0, "medium": 0, "large": 0}
    assert summarize(make_found([]), make_truth([(1, 1, 20, 20)]), coco=False)[1]["coco"] == {}
