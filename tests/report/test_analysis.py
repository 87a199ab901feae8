"""What the report tells of detections, against the files alone."""

import json
import shutil
from statistics import fmean

import numpy as np
import pytest

from nst_det.evaluation import voc
from nst_det.evaluation.boxes import ObjectCounts
from nst_det.evaluation.errors import KINDS, analyze_errors
from nst_det.report.analysis import RECALLS, count_data, interpolated, precision_by_class, read_analyses
from tests.helpers.boxes import found, truth
from tests.helpers.finished import CLASSES, NUMBERS, typed


def overlap(entry, item):
    """IoU of an entry of detections.json and an object as on disk."""
    x, y, width, height = entry["bbox"]
    xmin, ymin, xmax, ymax = item[1]
    inner = max(0, min(x + width, xmax) - max(x, xmin - 1)) * max(0, min(y + height, ymax) - max(y, ymin - 1))
    return inner / (width * height + (xmax - xmin + 1) * (ymax - ymin + 1) - inner)


def precision_by_hand(folder, name, truth):
    """Precision at each recall from the files alone: detections from the best down, each object found once."""
    objects = {id_: [item for item in found if item[0] == name] for id_, found in truth.items()}
    total = sum(not item[2] for found in objects.values() for item in found)
    taken, points, hits, counted = [], [], 0, 0
    entries = json.loads((folder / "detections.json").read_text())
    for entry in sorted((e for e in entries if e["category"] == name), key=lambda e: -e["score"]):
        best = max(objects[entry["image_id"]], key=lambda item: overlap(entry, item), default=None)
        matched = best is not None and overlap(entry, best) >= 0.5
        if matched and best[2]:
            continue
        counted += 1
        if matched and not any(best is item for item in taken):
            taken.append(best)
            hits += 1
        points.append((hits / total, hits / counted))
    return [max((p for r, p in points if r >= recall - 1e-12), default=0.0) for recall in RECALLS]


def test_precision_is_that_of_the_files(finished):
    folder, tree, truth = finished
    found = precision_by_class(read_analyses(typed(tree), folder))
    assert {tuple(curves) for curves in found.values()} == {tuple(NUMBERS)}
    for method in ("ce", "fitnet"):
        for name in ("ring", "star"):
            by_seed = [precision_by_hand(folder / f"detect/seed{seed}/{method}", name, truth) for seed in range(3)]
            assert found[name][method].tolist() == pytest.approx(np.mean(by_seed, axis=0).tolist())
    nothing = np.zeros(0)
    assert not interpolated(voc.Curve(nothing, nothing, nothing)).any()


def test_a_row_without_detections_is_left_out(finished, tmp_path):
    folder, tree, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder / "detect", copy / "detect")
    (copy / "detect/seed1/kd/detections.json").unlink()
    (copy / "detect/seed2/at/detections.json").write_text("[{}]")
    assert read_analyses(typed(tree), copy).keys() == NUMBERS.keys() - {"kd", "at"}
    assert read_analyses(typed(tree), tmp_path / "nowhere") == {}


def errors_by_hand(folder, objects, least=0.5):
    """The analysis of one run, of its files; tests/evaluation compares it with loops."""
    entries = json.loads((folder / "detections.json").read_text())
    corners = [(e, e["bbox"]) for e in entries]
    rows = [(e["image_id"], e["category"], (x + 1, y + 1, x + w, y + h), e["score"]) for e, (x, y, w, h) in corners]
    there = [(id_, *item) for id_, items in objects.items() for item in items]
    return analyze_errors(found(rows, CLASSES), truth(there, CLASSES, list(objects)), [least] * len(CLASSES))


def test_errors_are_means_over_seeds(finished):
    folder, tree, objects = finished
    rows = read_analyses(typed(tree), folder)
    for method in ("scratch", "fitnet"):
        seeds = [errors_by_hand(folder / f"detect/seed{seed}/{method}", objects) for seed in range(3)]
        assert rows[method].kinds.tolist() == [fmean(values) for values in zip(*(one.kinds.tolist() for one in seeds))]
        np.testing.assert_allclose(rows[method].confusion, sum(one.confusion for one in seeds) / 3)
        assert rows[method].found == fmean(int(np.trace(one.confusion)) for one in seeds)
    # objects that are there are found, taken for others or not found
    there = sum(not item[2] for items in objects.values() for item in items)
    assert all(row.confusion[:-1].sum() == pytest.approx(there) for row in rows.values())
    assert dict(zip(KINDS, rows["scratch"].kinds))["missed"] > dict(zip(KINDS, rows["fitnet"].kinds))["missed"]


def test_thresholds_decide_and_their_curves_are_averaged(finished, tmp_path):
    folder, tree, objects = finished
    rows = read_analyses(typed(tree), folder)
    assert rows["kd"].f1.max() == pytest.approx(fmean(NUMBERS["kd"][0]))
    assert int(rows["kd"].f1.argmax()) == 25
    copy = shutil.copytree(folder / "detect", tmp_path / "copy" / "detect").parent
    for seed in range(3):
        path = copy / f"detect/seed{seed}/kd/result.json"
        result = json.loads(path.read_text())
        result["thresholds"] = {name: one | {"score": 0.8} for name, one in result["thresholds"].items()}
        path.write_text(json.dumps(result))
        (copy / f"detect/seed{seed}/at/result.json").unlink()
    higher = read_analyses(typed(tree), copy)
    by_hand = [errors_by_hand(folder / f"detect/seed{seed}/kd", objects, 0.8) for seed in range(3)]
    assert higher["kd"].kinds.tolist() == [fmean(values) for values in zip(*(one.kinds.tolist() for one in by_hand))]
    assert higher["kd"].found < rows["kd"].found
    # without a validation split 0.5 is taken, and there is no curve
    assert higher["at"].f1 is None
    assert higher["at"].kinds.tolist() == rows["at"].kinds.tolist()


def test_objects_are_counted(finished, tmp_path):
    folder, tree, objects = finished
    counts = count_data(typed(tree), folder)
    for name in CLASSES:
        boxes = [item[1] for items in objects.values() for item in items if item[0] == name and not item[2]]
        areas = [(right - left + 1) * (bottom - top + 1) for left, top, right, bottom in boxes]
        small, hard = (
            sum(area <= 32 * 32 for area in areas),
            sum(item[0] == name and item[2] for items in objects.values() for item in items),
        )
        side = float(np.median(np.sqrt(areas)))
        assert counts["TRAIN"][name] == counts["TEST"][name] == ObjectCounts(small, len(areas) - small, 0, hard, side)
        # the same images, to train and to test
        assert counts["all"][name] == ObjectCounts(2 * small, 2 * (len(areas) - small), 0, 2 * hard, side)
    assert count_data(typed(tree), tmp_path) == {}
