import json
import shutil

import numpy as np
import pytest

from nst_det.evaluation.voc import Curve
from nst_det.report.curves import RECALLS, Training, interpolated, merge_seeds, read_precision, read_training
from nst_det.report.curves import Curve as LossCurve
from nst_det.report.summary import term_shares


def precision_by_hand(folder, name, truth):
    """Precision at each recall from the files alone: detections from the best down, each object found once."""
    objects = {id_: [o for o in found if o[0] == name and not o[2]] for id_, found in truth.items()}
    ignored = {id_: [o for o in found if o[0] == name and o[2]] for id_, found in truth.items()}
    total = sum(map(len, objects.values()))
    left = {id_: list(found) for id_, found in objects.items()}
    points, hits, counted = [], 0, 0
    entries = json.loads((folder / "detections.json").read_text())
    for entry in sorted((e for e in entries if e["category"] == name), key=lambda e: -e["score"]):
        x, y, width, height = entry["bbox"]

        def overlap(item, x=x, y=y, width=width, height=height):
            xmin, ymin, xmax, ymax = item[1]
            inner = max(0, min(x + width, xmax) - max(x, xmin - 1)) * max(0, min(y + height, ymax) - max(y, ymin - 1))
            return inner / (width * height + (xmax - xmin + 1) * (ymax - ymin + 1) - inner)

        everything = [*objects[entry["image_id"]], *ignored[entry["image_id"]]]
        best = max(everything, key=overlap, default=None)
        if best is not None and overlap(best) >= 0.5 and best[2]:
            continue
        counted += 1
        if best is not None and overlap(best) >= 0.5 and best in left[entry["image_id"]]:
            left[entry["image_id"]].remove(best)
            hits += 1
        points.append((hits / total, hits / counted))
    return [max((p for r, p in points if r >= recall - 1e-12), default=0.0) for recall in RECALLS]


def test_precision_is_that_of_the_files(comparison, as_results, voc_truth):
    folder, tree = comparison
    found = read_precision(as_results(tree), folder)
    assert list(found.mean) == [row["method"] for row in tree["rows"]]
    for method in ("ce", "fitnet"):
        for name in ("ring", "star"):
            by_seed = [precision_by_hand(folder / f"detect/seed{seed}/{method}", name, voc_truth) for seed in range(3)]
            assert found.per_class[name][method].tolist() == pytest.approx(np.mean(by_seed, axis=0).tolist())
        mean = np.mean([curves[method] for curves in found.per_class.values()], axis=0)
        assert found.mean[method].tolist() == pytest.approx(mean.tolist())
    assert all(np.all(np.diff(curve) <= 1e-12) for curve in found.mean.values())


def test_a_row_without_detections_is_left_out(comparison, as_results, tmp_path):
    folder, tree = comparison
    copy = tmp_path / "copy"
    shutil.copytree(folder / "detect", copy / "detect")
    (copy / "detect/seed1/kd/detections.json").unlink()
    (copy / "detect/seed2/at/detections.json").write_text("[{}]")
    found = read_precision(as_results(tree), copy)
    assert set(found.mean) == {row["method"] for row in tree["rows"]} - {"kd", "at"}
    nowhere = read_precision(as_results(tree), tmp_path / "nowhere")
    assert (nowhere.mean, nowhere.per_class) == ({}, {})


def test_no_detection_at_all_has_no_precision():
    nothing = Curve(np.zeros(0), np.zeros(0), np.zeros(0))
    assert interpolated(nothing).tolist() == [0.0] * len(RECALLS)


def test_the_detectors_own_losses_are_one_term_of_stage_two():
    def curve(first, last):
        values = np.array([first, last])
        return LossCurve(np.array([0.0, 10.0]), values, values, values)

    detect = {
        "loss_cls": {"ce": curve(1, 1), "cwd@det": curve(2, 1)},
        "loss_box_reg": {"ce": curve(1, 1), "cwd@det": curve(1, 2)},
        "loss_transfer_cwd": {"cwd@det": curve(1, 9)},
        "total_loss": {"ce": curve(2, 2), "cwd@det": curve(4, 12)},
    }
    own, taught = term_shares(Training({}, {}, {}, detect, {}))
    assert (own.stage, own.method, own.term, own.first, own.last) == ("two", "cwd@det", "the detector's own", 3, 3)
    assert (own.first_share, own.last_share) == (0.75, 0.25)
    assert (taught.term, taught.first_share, taught.last_share) == ("cwd", 0.25, 0.75)


def test_curves_are_means_over_seeds(comparison, as_results):
    folder, tree = comparison
    training = read_training(as_results(tree), folder)
    assert set(training.detect_losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(training.detect_losses["loss_cls"]) == {row["method"] for row in tree["rows"]}
    assert set(training.distill_accuracy) == {"val/top1", "val/top5"}
    assert set(training.distill_losses["loss/nst-poly"]) == {"nst-poly", "kd+nst-poly"}
    assert set(training.distill_losses) == {f"loss/{t}" for t in ("ce", "kd", "fitnet", "at", "nst-poly", "total")}
    assert set(training.distill_levels) == {"level/nst-poly@res3", "level/nst-poly@res4"}
    assert set(training.distill_levels["level/nst-poly@res3"]) == {"nst-poly", "kd+nst-poly"}
    curve = training.distill_accuracy["val/top1"]["kd"]
    values = []
    for seed in range(3):
        lines = (folder / f"distill/seed{seed}/students/kd/metrics.jsonl").read_text().splitlines()
        values.append([row["val/top1"] for row in map(json.loads, lines) if "val/top1" in row])
    assert curve.steps.tolist() == list(range(24, 200, 25))
    assert curve.mean.tolist() == pytest.approx(np.mean(values, axis=0).tolist())
    assert curve.low.tolist() == pytest.approx(np.min(values, axis=0).tolist())
    assert curve.high.tolist() == pytest.approx(np.max(values, axis=0).tolist())


def test_long_curves_are_thinned_by_means():
    points = [(step, float(step)) for step in range(1000)]
    curve = merge_seeds([points], bins=10)
    assert curve.mean.tolist() == pytest.approx([49.5 + 100 * i for i in range(10)], abs=1.0)
    assert curve.steps.tolist() == pytest.approx(curve.mean.tolist())
    single = merge_seeds([[(7, 0.5)]])
    assert (single.steps.tolist(), single.mean.tolist()) == ([7.0], [0.5])
