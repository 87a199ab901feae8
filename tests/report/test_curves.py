import json

import numpy as np
import pytest

from nst_det.report.curves import Curve, merge_seeds, read_curves
from nst_det.report.summary import term_shares
from tests.helpers.finished import NUMBERS, typed


def test_the_detectors_own_losses_are_one_term_of_stage_two():
    def curve(first, last):
        values = np.array([first, last])
        return Curve(np.array([0.0, 10.0]), values, values, values)

    detect = {
        "loss_cls": {"ce": curve(1, 1), "cwd@det": curve(2, 1)},
        "loss_box_reg": {"ce": curve(1, 1), "cwd@det": curve(1, 2)},
        "loss_transfer_cwd": {"cwd@det": curve(1, 9)},
        "total_loss": {"ce": curve(2, 2), "cwd@det": curve(4, 12)},
    }
    line = {"stage": "two", "method": "cwd@det"}
    assert term_shares({}, detect) == [
        {**line, "term": "the detector's own", "first": 3, "last": 3, "first_share": 0.75, "last_share": 0.25},
        {**line, "term": "cwd", "first": 1, "last": 9, "first_share": 0.25, "last_share": 0.75},
    ]


def test_curves_are_means_over_seeds(finished):
    folder, tree, _ = finished
    distill, detect = (read_curves(typed(tree), folder, stage) for stage in ("distill_run", "run"))
    assert set(detect["loss"]) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(detect["loss"]["loss_cls"]) == NUMBERS.keys()
    assert set(distill["accuracy"]) == {"val/top1", "val/top5"}
    assert set(distill["loss"]) == {f"loss/{term}" for term in ("ce", "kd", "fitnet", "at", "nst-poly", "total")}
    assert set(distill["loss"]["loss/nst-poly"]) == {"nst-poly", "kd+nst-poly"}
    assert set(distill["level"]) == {"level/nst-poly@res3", "level/nst-poly@res4"}
    curve, values = distill["accuracy"]["val/top1"]["kd"], []
    for seed in range(3):
        lines = (folder / f"distill/seed{seed}/students/kd/metrics.jsonl").read_text().splitlines()
        values.append([row["val/top1"] for row in map(json.loads, lines) if "val/top1" in row])
    assert curve.steps.tolist() == list(range(24, 200, 25))
    for found, of in ((curve.mean, np.mean), (curve.low, np.min), (curve.high, np.max)):
        assert found.tolist() == pytest.approx(of(values, axis=0).tolist())


def test_long_curves_are_thinned_by_means():
    curve = merge_seeds([[(step, float(step)) for step in range(1000)]], bins=10)
    assert curve.mean.tolist() == pytest.approx([49.5 + 100 * i for i in range(10)], abs=1.0)
    assert curve.steps.tolist() == pytest.approx(curve.mean.tolist())
    single = merge_seeds([[(7, 0.5)]])
    assert (single.steps.tolist(), single.mean.tolist()) == ([7.0], [0.5])
