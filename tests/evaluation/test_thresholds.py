"""Score thresholds of best F1, against plain loops over all thresholds."""

import numpy as np
import pytest

from nst_det.engine.io import write_json
from nst_det.errors import UserError
from nst_det.evaluation.metrics import summarize
from nst_det.evaluation.thresholds import SCORES, best_thresholds, read_thresholds
from nst_det.evaluation.voc import evaluate_voc
from tests.helpers.boxes import CLASSES, found, overlap, truth

BOXES = [(x, y, x + 11, y + 13) for x in (1, 31, 61) for y in (1, 41)]


def counted_at(objects, rows, name, least):
    """(hits, false) of a class when lower scores are left out: matching by VOC's rules, one box after another."""
    mine = [o for o in objects if o[1] == name]
    hits = false = 0
    taken = []
    for image, _, box, _ in sorted((r for r in rows if r[1] == name and r[3] >= least), key=lambda r: -r[3]):
        there = [o for o in mine if o[0] == image]
        best = max(there, key=lambda o: overlap(box, o[2]), default=None)
        if best is None or overlap(box, best[2]) < 0.5:
            false += 1
        elif not best[3]:
            hits, false = (hits, false + 1) if best in taken else (hits + 1, false)
            taken.append(best)
    return hits, false


def f1_at(objects, rows, name, least):
    hits, false = counted_at(objects, rows, name, least)
    return 2 * hits / (hits + false + sum(o[1] == name and not o[3] for o in objects)) if hits else 0.0


def random_case(seed):
    rng = np.random.default_rng(seed)
    places = [(image, box) for image in "abc" for box in BOXES]
    chosen = rng.permutation(len(places))[:12]
    objects = [(places[i][0], CLASSES[rng.integers(2)], places[i][1], bool(rng.random() < 0.2)) for i in chosen]
    rows = []
    for _ in range(40):
        image, box = places[rng.integers(len(places))]
        box = tuple(np.add(box, rng.integers(-3, 4, 4)).tolist())
        # few different scores, so that many are equal
        rows.append((image, CLASSES[rng.integers(2)], box, float(rng.integers(1, 16) / 16)))
    return objects, rows


@pytest.mark.parametrize("seed", range(8))
def test_threshold_and_curve_equal_those_of_a_loop(seed):
    objects, rows = random_case(seed)
    thresholds = best_thresholds(evaluate_voc(found(rows), truth(objects)))
    for name in CLASSES:
        every = [*sorted({r[3] for r in rows if r[1] == name}), 1.0]
        counted = [counted_at(objects, rows, name, score) for score in every]
        # where something that counts is taken or left out
        changes = [score for score, now, after in zip(every, counted, counted[1:]) if now != after]
        by_score = {score: f1_at(objects, rows, name, score) for score in changes}
        best = max(by_score.values(), default=0.0)
        assert (name in thresholds) == (best > 0)
        if name not in thresholds:
            continue
        one = thresholds[name]
        taken = max(score for score in changes if by_score[score] == best)
        below = max((score for score in changes if score < taken), default=0.0)
        assert one.score == pytest.approx((taken + below) / 2, abs=1e-15)
        assert one.f1 == pytest.approx(best, abs=1e-15)
        assert f1_at(objects, rows, name, one.score) == pytest.approx(best, abs=1e-15)
        np.testing.assert_allclose(one.curve, [f1_at(objects, rows, name, s) for s in SCORES], atol=5.1e-5)


def test_by_hand():
    A, B, C = BOXES[:3]
    gold = truth([("a", "cat", A), ("b", "cat", B), ("b", "dog", A, True)])
    # .9 hit: 2/(1+2); .8 false: 2/(2+2); .6 hit: 4/(3+2); a dog is found only where it is difficult
    rows = found([("a", "cat", A, 0.9), ("a", "cat", C, 0.8), ("b", "cat", B, 0.6), ("b", "dog", A, 0.7)])
    (name, one), *others = best_thresholds(evaluate_voc(rows, gold)).items()
    assert (name, others) == ("cat", [])
    assert (one.score, one.f1) == (pytest.approx(0.3), pytest.approx(0.8))
    # at .58 all three are taken, at .62 two, at .82 one, at .92 none
    assert [one.curve[round(s * 50)] for s in (0.58, 0.62, 0.82, 0.92)] == [0.8, 0.5, 0.6667, 0.0]


def test_only_a_validation_split_gives_thresholds_and_a_run_keeps_them(tmp_path):
    objects, rows = random_case(0)
    gold, detections = truth(objects), found(rows)
    assert "thresholds" not in summarize(detections, gold)[1]
    assert read_thresholds(tmp_path) == {}
    write_json(tmp_path / "result.json", summarize(detections, gold, validation=True)[1])
    assert read_thresholds(tmp_path) == best_thresholds(evaluate_voc(detections, gold))
    write_json(tmp_path / "result.json", {"map": 0.5})
    assert read_thresholds(tmp_path) == {}


@pytest.mark.parametrize("damaged", [[], {"cat": 0.5}, {"cat": {"score": "high", "f1": 1.0, "curve": []}}])
def test_damaged_thresholds_are_named(damaged, tmp_path):
    write_json(tmp_path / "result.json", {"thresholds": damaged})
    with pytest.raises(UserError, match=r"result\.json: thresholds"):
        read_thresholds(tmp_path)
