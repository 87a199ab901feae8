import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.data.voc import VocDataset
from nst_det.engine.io import read_json
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.coco import evaluate_coco
from nst_det.evaluation.io import read_detections
from nst_det.evaluation.voc import evaluate_voc
from tests.helpers.boxes import CLASSES, found, overlap, truth

# no overlap with one another
A, B, C = (1, 1, 10, 10), (21, 21, 30, 30), (41, 41, 60, 60)


def devkit(detections, gold, name, threshold):
    """AP of one class as the official devkit computes it, with loops: (11-point, area)."""
    label = gold.classes.index(name)
    rows = [i for i in range(len(detections)) if detections.classes[detections.label[i]] == name]
    rows.sort(key=lambda i: -detections.score[i])
    positives = sum(1 for m in range(len(gold.label)) if gold.label[m] == label and not gold.difficult[m])
    taken, tp, fp = set(), [], []
    for i in rows:
        best, at = 0.0, None
        for m in range(len(gold.label)):
            if gold.label[m] == label and gold.image_ids[gold.image[m]] == detections.image_id[i]:
                value = overlap(detections.box[i], gold.box[m])
                best, at = (value, m) if value > best else (best, at)
        hit = miss = 0
        if best >= threshold:
            if not gold.difficult[at]:
                hit, miss = (1, 0) if at not in taken else (0, 1)
                taken.add(at)
        else:
            miss = 1
        tp.append(hit)
        fp.append(miss)
    if not positives:
        return math.nan, math.nan
    recall, precision, hits, misses = [], [], 0, 0
    for hit, miss in zip(tp, fp):
        hits, misses = hits + hit, misses + miss
        recall.append(hits / positives)
        precision.append(hits / (hits + misses) if hits + misses else 0.0)
    eleven = 0.0
    for k in range(11):
        eleven += max([p for p, r in zip(precision, recall) if r >= k * 0.1], default=0.0) / 11
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    area = sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)))
    return eleven, area


def ap(detections, gold, name="cat", iou=0.5):
    result = evaluate_voc(detections, gold, iou)
    k = gold.classes.index(name)
    return result.ap11[0, k], result.ap_area[0, k]


def test_one_hit_one_miss_computed_by_hand():
    gold = truth([("a", "cat", A), ("b", "cat", B)])
    # best first: hit (precision 1, recall 1/2), miss, hit (precision 2/3, recall 1)
    rows = found([("a", "cat", A, 0.9), ("a", "cat", C, 0.8), ("b", "cat", B, 0.7)])
    # recalls 0 .. 0.5 see precision 1, recalls 0.6 .. 1 see 2/3
    assert ap(rows, gold) == pytest.approx(((6 + 5 * 2 / 3) / 11, 0.5 + 0.5 * 2 / 3), abs=1e-15)


def test_a_second_detection_of_the_same_object_is_a_false_positive():
    gold = truth([("a", "cat", A), ("b", "cat", B)])
    rows = found([("a", "cat", A, 0.9), ("a", "cat", A, 0.8), ("b", "cat", B, 0.7)])
    assert ap(rows, gold) == pytest.approx(((6 + 5 * 2 / 3) / 11, 0.5 + 0.5 * 2 / 3), abs=1e-15)
    # also where it would do for another object: both match A best, the second overlaps the other by 100/120
    gold = truth([("a", "cat", A), ("a", "cat", (1, 1, 10, 12))])
    assert ap(found([("a", "cat", A, 0.9), ("a", "cat", A, 0.8)]), gold) == pytest.approx((6 / 11, 0.5), abs=1e-15)


def test_of_equal_overlaps_the_first_object_is_taken():
    # mirror images around the detection, the first one difficult: the detection counts neither way
    left, right, middle = (1, 1, 10, 10), (5, 1, 14, 10), (3, 1, 12, 10)
    rows = found([("a", "cat", middle, 0.9)])
    assert ap(rows, truth([("a", "cat", left, True), ("a", "cat", right)])) == (0.0, 0.0)
    assert ap(rows, truth([("a", "cat", right), ("a", "cat", left, True)])) == (1.0, 1.0)


def test_difficult_objects_count_neither_way():
    gold = truth([("a", "cat", A), ("a", "cat", B, True)])
    rows = [("a", "cat", B, 0.9), ("a", "cat", B, 0.8), ("a", "cat", A, 0.7)]
    assert ap(found(rows), gold) == (1.0, 1.0)
    result = evaluate_voc(found(rows), gold)
    assert result.positives.tolist() == [1, 0]
    assert result.difficult.tolist() == [1, 0]
    assert result.detections.tolist() == [3, 0]
    np.testing.assert_array_equal(result.curves[0][0].score, [0.7])
    # away from the difficult object they do count
    rows[0] = ("a", "cat", C, 0.9)
    assert ap(found(rows), gold) == pytest.approx((0.5, 0.5))


def test_a_class_without_positives_has_no_ap_and_is_left_out_of_the_mean():
    gold = truth([("a", "cat", A), ("a", "dog", B, True)])
    result = evaluate_voc(found([("a", "cat", A, 0.9), ("a", "dog", C, 0.9)]), gold)
    assert math.isnan(result.ap11[0, 1])
    assert math.isnan(result.ap_area[0, 1])
    assert result.map11[0] == 1.0
    assert result.to_dict()["per_class"]["dog"]["ap11"] is None
    nothing = evaluate_voc(found([]), truth([]))
    assert math.isnan(nothing.map11[0])
    assert nothing.to_dict()["map"] is None


def test_no_detections_give_zero():
    result = evaluate_voc(found([]), truth([("a", "cat", A)]))
    assert (result.ap11[0, 0], result.ap_area[0, 0], result.map11[0]) == (0, 0, 0)


def test_ties_keep_the_given_order():
    gold = truth([("a", "cat", A)])
    hit, miss = ("a", "cat", A, 0.5), ("b", "cat", A, 0.5)
    assert ap(found([hit, miss]), gold) == (1.0, 1.0)
    assert ap(found([miss, hit]), gold) == (0.5, 0.5)


@pytest.mark.parametrize(("bottom", "matched"), [(5, True), (4, False)])
def test_overlap_counts_pixels_and_the_threshold_itself_is_enough(bottom, matched):
    # 10 x 5 of 10 x 10 pixels is exactly 0.5; without the + 1 it would be 9 * 4 / 81
    rows = found([("a", "cat", (1, 1, 10, bottom), 0.9)])
    assert ap(rows, truth([("a", "cat", A)])) == ((1.0, 1.0) if matched else (0.0, 0.0))


def test_recall_of_exactly_three_tenths_does_not_reach_the_fourth_point():
    # as in the official devkit, whose 0:0.1:1 holds 0.30000000000000004; 3 of 10 objects found
    boxes = [(1 + 20 * i, 1, 10 + 20 * i, 10) for i in range(10)]
    gold = truth([("a", "cat", box) for box in boxes])
    rows = found([("a", "cat", box, 0.9) for box in boxes[:3]])
    assert ap(rows, gold) == pytest.approx((3 / 11, 0.3))


@pytest.mark.parametrize("evaluate", [evaluate_voc, evaluate_coco])
def test_a_detection_in_the_wrong_image_or_of_the_wrong_class_is_refused(evaluate):
    gold = truth([("a", "cat", A)])
    for row, classes, key in ((("z", "cat", A, 0.9), CLASSES, "image 'z'"), (("a", "cow", A, 0.9), ["cow"], "'cow'")):
        with pytest.raises(ValueError, match=key):
            evaluate(found([row], classes), gold)


def test_detections_are_finite_and_of_known_labels():
    with pytest.raises(ValueError, match="finite"):
        found([("a", "cat", A, math.nan)])
    with pytest.raises(ValueError, match="label"):
        Detections(["a"], CLASSES, np.array([2]), np.ones((1, 4)), np.ones(1))
    with pytest.raises(ValueError, match="twice"):
        GroundTruth.from_annotations([VocAnnotation("a", 9, 9, ())] * 2, CLASSES)
    joined = Detections.from_images([("a", [[0, 0, 10, 20]], [1], [0.5]), ("b", [], [], [])], CLASSES)
    assert (joined.image_id, joined.box.tolist(), joined.label.tolist()) == (["a"], [[1, 1, 10, 20]], [1])


def test_classes_in_another_order_are_matched_by_name():
    gold = truth([("a", "cat", A), ("a", "dog", B)])
    rows = found([("a", "dog", B, 0.9), ("a", "cat", A, 0.8)], classes=("dog", "cow", "cat"))
    assert evaluate_voc(rows, gold).ap11.tolist() == [[1.0, 1.0]]


def test_several_thresholds_equal_one_at_a_time():
    gold, rows = random_case(np.random.default_rng(3), 30, 120)
    thresholds = [0.3, 0.5, 0.75, 0.95]
    together = evaluate_voc(rows, gold, thresholds)
    assert together.thresholds == tuple(thresholds)
    for t, threshold in enumerate(thresholds):
        alone = evaluate_voc(rows, gold, threshold)
        np.testing.assert_array_equal(together.ap11[t], alone.ap11[0])
        np.testing.assert_array_equal(together.ap_area[t], alone.ap_area[0])
        assert together.to_dict(threshold) == alone.to_dict()


def random_case(rng, objects, detections, images="abc"):
    """Boxes on a coarse grid, so that equal overlaps and equal scores are common."""

    def box():
        x, y = rng.integers(1, 12, 2)
        w, h = rng.integers(0, 8, 2)
        return (x, y, x + w, y + h)

    gold = [(rng.choice(list(images)), rng.choice(CLASSES), box(), rng.random() < 0.3) for _ in range(objects)]
    rows = [(rng.choice(list(images)), rng.choice(CLASSES), box(), rng.integers(1, 9) / 8) for _ in range(detections)]
    return truth(gold, images=tuple(images)), found(rows)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_equal_to_the_devkit_written_with_loops(seed, threshold):
    rng = np.random.default_rng(seed)
    gold, rows = random_case(rng, int(rng.integers(0, 25)), int(rng.integers(0, 60)))
    result = evaluate_voc(rows, gold, threshold)
    for k, name in enumerate(CLASSES):
        expected = devkit(rows, gold, name, threshold)
        np.testing.assert_allclose((result.ap11[0, k], result.ap_area[0, k]), expected, atol=1e-12)


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, 20), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_ap_lies_between_0_and_1_and_distinct_scores_make_order_irrelevant(seed, objects, detections):
    rng = np.random.default_rng(seed)
    gold, rows = random_case(rng, objects, detections)
    score = rng.permutation(detections) / max(detections, 1)
    order = rng.permutation(detections)
    one = Detections(rows.image_id, CLASSES, rows.label, rows.box, score)
    two = Detections(
        [rows.image_id[i] for i in order], CLASSES, rows.label[order], rows.box[order], score[order]
    )  # fmt: skip
    a, b = evaluate_voc(one, gold), evaluate_voc(two, gold)
    np.testing.assert_array_equal(a.ap11, b.ap11)
    np.testing.assert_array_equal(a.ap_area, b.ap_area)
    for values in (a.ap11, a.ap_area):
        counted = values[~np.isnan(values)]
        assert ((counted >= 0) & (counted <= 1 + 1e-12)).all()
    for curve in a.curves[0]:
        assert (np.diff(curve.score) <= 0).all()
        assert (np.diff(curve.recall) >= 0).all() or np.isnan(curve.recall).all()


@given(seeds, st.integers(1, 20), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_only_the_order_of_scores_matters_and_a_higher_threshold_never_helps_a_single_object(seed, objects, detections):
    rng = np.random.default_rng(seed)
    gold, rows = random_case(rng, objects, detections)
    squeezed = Detections(rows.image_id, CLASSES, rows.label, rows.box, rows.score**3 / 7)
    np.testing.assert_array_equal(evaluate_voc(rows, gold).ap11, evaluate_voc(squeezed, gold).ap11)
    lonely, rows = random_case(rng, 1, detections)
    lonely = GroundTruth(lonely.image_ids, CLASSES, lonely.image, lonely.label, lonely.box, np.zeros(1, bool))
    by_threshold = evaluate_voc(rows, lonely, [0.1, 0.3, 0.5, 0.7, 0.9]).map_area
    assert (np.diff(by_threshold) <= 1e-12).all()


@given(seeds, st.integers(0, 20), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_a_worse_scored_false_positive_changes_nothing_and_the_truth_itself_scores_one(seed, objects, detections):
    rng = np.random.default_rng(seed)
    gold, rows = random_case(rng, objects, detections)
    far = Detections(
        [*rows.image_id, "a"], CLASSES, np.append(rows.label, 0),
        np.append(rows.box, [[900, 900, 910, 910]], axis=0), np.append(rows.score, 0.001),
    )  # fmt: skip
    np.testing.assert_array_equal(evaluate_voc(far, gold).ap_area, evaluate_voc(rows, gold).ap_area)
    keep = np.unique(np.c_[gold.image, gold.label, gold.box], axis=0, return_index=True)[1]
    gold = GroundTruth(
        gold.image_ids, CLASSES, gold.image[keep], gold.label[keep], gold.box[keep], np.zeros(len(keep), bool)
    )
    ids = [gold.image_ids[i] for i in gold.image]
    itself = Detections(ids, CLASSES, gold.label, gold.box, rng.random(len(ids)))
    result = evaluate_voc(itself, gold)
    assert result.ap11[0][gold_classes(gold)].tolist() == pytest.approx([1.0] * len(gold_classes(gold)))
    assert result.ap_area[0][gold_classes(gold)].tolist() == pytest.approx([1.0] * len(gold_classes(gold)))


def gold_classes(gold):
    return sorted(set(gold.label.tolist()))


@pytest.mark.real_data
@pytest.mark.parametrize(("root", "folder"), [("voc2007_golden_small", "dets"), ("voc2007_test_golden", "detections")])
def test_every_class_equals_the_official_devkit(real_data, root, folder):
    data = VocDataset(real_data / root, "test")
    gold = GroundTruth.from_annotations(data.annotations(), data.classes)
    rows = read_detections(real_data / root / folder, data.ids, data.classes, "test")
    expected = read_json(real_data / root / "expected.json")
    result = evaluate_voc(rows, gold)
    assert len(expected["per_class"]) == 20
    for k, name in enumerate(data.classes):
        official = expected["per_class"][name]
        assert abs(result.ap11[0, k] - official["ap11"]) < 1e-9
        assert abs(result.ap_area[0, k] - official["ap_area"]) < 1e-9
        assert result.detections[k] == official["n_det"]
        assert result.positives[k] == official.get("npos", result.positives[k])
        assert result.curves[0][k].recall[-1] == pytest.approx(official["max_recall"], abs=1e-11)
    assert abs(result.map11[0] - expected["mAP11"]) < 1e-9
    assert abs(result.map_area[0] - expected["mAP_area"]) < 1e-9


def test_a_box_that_nothing_can_match_is_logged(caplog):
    objects = (VocObject("cat", (1, 1, 9, 9)), VocObject("cat", (9, 1, 5, 9)), VocObject("cat", (5, 5, 5, 9)))
    gold = GroundTruth.from_annotations([VocAnnotation("img7", 40, 30, objects)], CLASSES)
    # the devkit counts it as missed
    assert len(gold.box) == 3
    assert [record.message.split(":")[0] for record in caplog.records] == ["img7", "img7"]
