import json
import math

import pytest

from nst_det.data.voc import VocDataset
from nst_det.evaluation.boxes import GroundTruth
from nst_det.evaluation.coco import evaluate_coco
from nst_det.evaluation.io import read_detections
from nst_det.evaluation.metrics import summarize
from nst_det.evaluation.voc import evaluate_voc
from tests.helpers.boxes import found, truth
from tests.helpers.voc import make, obj, xml

BOX = (1, 1, 100, 100)
GOLD = truth([("a", "cat", BOX)])


def test_a_perfect_detection(capsys):
    result = evaluate_coco(found([("a", "cat", BOX, 0.9)]), GOLD)
    assert result.summary["AP"] == pytest.approx(1)
    assert result.summary["APl"] == pytest.approx(1)
    assert math.isnan(result.summary["APs"])
    assert result.per_class["cat"] == pytest.approx(1)
    assert result.to_dict()["per_class"]["dog"] is None
    assert capsys.readouterr() == ("", "")


def test_overlap_is_continuous_and_counts_in_steps_of_five_hundredths():
    # 100 x 100 pixels against 100 x 77: overlap 0.77 passes 0.5, 0.55 .. 0.75, six of ten thresholds
    result = evaluate_coco(found([("a", "cat", (1, 1, 100, 77), 0.9)]), GOLD)
    assert [result.summary[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([0.6, 1, 1])


def test_what_makes_coco_and_voc_differ_is_one_line(caplog):
    boxes = [(x, y, x + 8, y + 8) for x in range(1, 200, 10) for y in range(1, 100, 10)]
    # 200 objects of one class on an image, all found: COCO takes 100, recall .5, which is 51 of its 101 points
    score = 0.99
    rows = [("a", "cat", box, score := score - 0.001) for box in boxes]
    assert evaluate_coco(found(rows), truth([("a", "cat", box) for box in boxes])).summary["AP"] == pytest.approx(
        51 / 101
    )
    (line,) = caplog.messages
    assert "100 of 200" in line
    caplog.clear()
    # the limit is that of a class: 100 of each of two are taken
    two = [(image, ("cat", "dog")[number % 2], *rest) for number, (image, _, *rest) in enumerate(rows)]
    assert evaluate_coco(found(two), truth([row[:3] for row in two])).summary["AP"] == pytest.approx(1)
    # equal scores in the order of the images are taken alike
    tied = [("a", "cat", (201, 201, 210, 210), 0.5), ("b", "cat", BOX, 0.5)]
    gold = truth([("b", "cat", BOX)])
    assert evaluate_coco(found(tied), gold).summary["AP"] == pytest.approx(0.5)
    assert not caplog.messages
    # in the file the other way round: VOC's precision is 1 at once, COCO's is not
    assert evaluate_coco(found(tied[::-1]), gold).summary["AP"] == pytest.approx(0.5)
    assert float(evaluate_voc(found(tied[::-1]), gold).map11[0]) == pytest.approx(1)
    (line,) = caplog.messages
    assert "2 of 2 detections" in line


@pytest.mark.parametrize(("score", "said"), [(None, True), (0.5, True), (0.1, True), (0.09, False)])
def test_a_file_without_low_scores_is_said(score, said, tmp_path, cli, caplog):
    voc = make(tmp_path / "voc", {"a": xml(obj())}, "test")
    entries = [{"image_id": "a", "category": "cat", "bbox": [0, 0, 10, 10], "score": score}] if score else []
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(entries))
    assert cli("evaluate", "--detections", file, "--voc", voc, "--coco") == 0
    assert [(str(file) in line, "--threshold" in line) for line in caplog.messages] == [(True, True)] * said


def test_difficult_objects_count_neither_way():
    other = (201, 201, 300, 300)
    rows = found([("a", "cat", other, 0.9), ("a", "cat", other, 0.8), ("a", "cat", BOX, 0.7)])
    gold = truth([("a", "cat", BOX), ("a", "cat", other, True)])
    assert evaluate_coco(rows, gold).summary["AP"] == pytest.approx(1)
    assert evaluate_coco(rows, GOLD).summary["AP"] == pytest.approx(1 / 3)


def test_no_detections_and_no_objects():
    assert evaluate_coco(found([]), GOLD).summary["AP"] == 0
    assert math.isnan(evaluate_coco(found([("a", "cat", BOX, 0.9)]), truth([])).summary["AP"])


def test_figures_by_overlap_and_size():
    # a medium object of 50 x 50 found whole, a small one of 10 x 10 missed, a large one of 100 x 100 found to 77 %
    boxes = [(1, 1, 50, 50), (301, 301, 310, 310), (101, 101, 200, 200)]
    rows = found([("a", "cat", boxes[0], 0.9), ("a", "cat", (101, 101, 200, 177), 0.8)])
    _, figures = summarize(rows, truth([("a", "cat", box) for box in boxes]))
    # two of three objects: recalls up to .6 of the eleven points; one of three beyond overlap .77: those up to .3
    wanted = {"0.5": 7 / 11, "0.75": 7 / 11, "0.8": 4 / 11, "0.95": 4 / 11}
    assert {key: figures["map_by_iou"][key] for key in wanted} == pytest.approx(wanted)
    assert next(iter(figures["map_by_iou"])) == "0.5"
    assert len(figures["map_by_iou"]) == 10
    assert figures["map"] == figures["map_by_iou"]["0.5"]
    assert figures["objects"] == {"small": 1, "medium": 1, "large": 1}
    assert [figures["coco"][name] for name in ("APs", "APm", "APl")] == pytest.approx([0, 1, 0.6])
    assert figures["per_class"]["dog"] is None


def test_what_counts_nowhere_is_none_and_coco_can_be_left_out():
    _, figures = summarize(found([]), truth([("a", "cat", (1, 1, 20, 20), True)]))
    assert figures["map"] is None
    assert set(figures["map_by_iou"].values()) == {None}
    assert figures["objects"] == {"small": 0, "medium": 0, "large": 0}
    assert summarize(found([]), GOLD, coco=False)[1]["coco"] == {}


@pytest.mark.real_data
def test_real_detections_score_close_to_their_voc_ap(real_data):
    root = real_data / "voc2007_golden_small"
    data = VocDataset(root, "test")
    gold = GroundTruth.from_annotations(data.annotations(), data.classes)
    result = evaluate_coco(read_detections(root / "dets", data.ids, data.classes, "test"), gold)
    # the devkit gives 0.804 for the area below the curve at the same overlap
    assert result.summary["AP50"] == pytest.approx(0.804, abs=0.005)
    assert result.summary["AP"] < result.summary["AP75"] < result.summary["AP50"]
