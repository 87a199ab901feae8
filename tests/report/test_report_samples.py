import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nst_det.report.curves import merge_seeds, read_training
from nst_det.report.samples import Truth, choose_samples, match, read_truth
from nst_det.report.schema import read_results


def image(boxes, labels, difficult) -> Truth:
    return Truth("x", Path("x.jpg"), np.array(boxes, float).reshape(-1, 4), tuple(labels), np.array(difficult, bool))


def test_match_by_the_rule_of_voc() -> None:
    truth = image([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], ["cat", "dog", "dog"], [0, 0, 1])
    detections = [
        ("cat", 0.9, np.array([0.0, 0, 10, 5])),  # IoU 0.5 exactly
        ("cat", 0.8, np.array([0.0, 0, 10, 10])),  # the object is taken
        ("cat", 0.7, np.array([20.0, 0, 30, 10])),  # another class
        ("dog", 0.6, np.array([41.0, 0, 50, 10])),  # a difficult one
        ("dog", 0.5, np.array([20.0, 0, 30, 4.9])),  # IoU 0.49
    ]
    found, kinds = match(truth, detections)
    assert kinds == ["found", "false", "false", "difficult", "false"]
    assert found.tolist() == [True, False, False]


def test_match_nothing() -> None:
    found, kinds = match(image([], [], []), [("cat", 0.9, np.array([0.0, 0, 1, 1]))])
    assert (len(found), kinds) == (0, ["false"])
    assert match(image([[0, 0, 1, 1]], ["cat"], [0]), [])[0].tolist() == [False]


def test_worst_misses_come_first(comparison) -> None:
    folder, tree = comparison
    results = read_results(tree, folder)
    chosen = choose_samples(results)
    assert (chosen.leader, chosen.seed, chosen.images, len(chosen.samples)) == ("fitnet", 0, 16, 6)
    # independently: every image's misses of fitnet, seed 0
    entries = json.loads((folder / "detect/seed0/fitnet/detections.json").read_text())
    truth = {one.image_id: one for one in read_truth(folder / "detect/seed0/fitnet/config.json")}
    missed = {}
    for image_id, one in truth.items():
        left = [index for index in range(len(one.labels)) if not one.difficult[index]]
        for entry in sorted(entries, key=lambda e: -e["score"]):
            if entry["image_id"] == image_id and entry["score"] >= 0.5:
                for index in left:
                    x, y, w, h = entry["bbox"]
                    a, b, c, d = one.boxes[index]
                    inner = max(0, min(x + w, c) - max(x, a)) * max(0, min(y + h, d) - max(y, b))
                    if entry["category"] == one.labels[index] and inner / (w * h + (c - a) * (d - b) - inner) >= 0.5:
                        left.remove(index)
                        break
        missed[image_id] = len(left)
    shown = [next(panel for panel in sample.panels if panel.title == "fitnet").missed for sample in chosen.samples]
    assert shown == sorted(missed.values(), reverse=True)[:6]
    assert [missed[sample.image_id] for sample in chosen.samples] == shown
    for sample in chosen.samples:
        assert [panel.title for panel in sample.panels] == ["ce", "fitnet", "kd+nst-poly"]
        assert [panel.title for panel in sample.more] == ["scratch", "kd", "at", "nst-poly"]
        assert len(sample.truth.boxes) == len(truth[sample.image_id].labels)
        assert all(panel.found + panel.missed == sample.objects for panel in sample.panels + sample.more)
        assert sample.data.startswith("data:image/jpeg;base64,/9j/")


def test_box_in_shown_pixels(comparison, monkeypatch) -> None:
    folder, tree = comparison
    monkeypatch.setattr("nst_det.report.samples.LONGEST_SIDE", 80)  # half of the images' 160
    sample = choose_samples(read_results(tree, folder)).samples[0]
    truth = next(one for one in read_truth(folder / "detect/seed0/ce/config.json") if one.image_id == sample.image_id)
    assert (sample.width, sample.height) == (80, 60)
    box = sample.truth.boxes[0]
    expected = truth.boxes[0] / 2
    assert [box.x, box.y] == pytest.approx(expected[:2], abs=0.05)
    assert [box.x + box.width, box.y + box.height] == pytest.approx(expected[2:], abs=0.1)


@pytest.mark.parametrize("gone", ["data", "detect/seed0/fitnet/detections.json", "detect"])
def test_what_is_gone_is_said(comparison, tmp_path, gone) -> None:
    folder, tree = comparison
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for config in copy.rglob("config.json"):
        config.write_text(config.read_text().replace(str(folder), str(copy)))
    victim = copy / gone
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    chosen = choose_samples(read_results(tree, copy))
    assert chosen.samples == ()
    assert chosen.reason


def test_an_unreadable_image_is_passed_over(comparison, tmp_path) -> None:
    folder, tree = comparison
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for config in copy.rglob("config.json"):
        config.write_text(config.read_text().replace(str(folder), str(copy)))
    before = choose_samples(read_results(tree, copy)).samples
    (copy / "data/JPEGImages" / f"{before[0].image_id}.jpg").write_bytes(b"no image")
    after = choose_samples(read_results(tree, copy)).samples
    assert [one.image_id for one in after[:5]] == [one.image_id for one in before[1:]]


def test_curves_are_means_over_seeds(comparison) -> None:
    folder, tree = comparison
    training = read_training(read_results(tree, folder))
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


def test_long_curves_are_thinned_by_means() -> None:
    points = [(step, float(step)) for step in range(1000)]
    curve = merge_seeds([points], bins=10)
    assert curve.mean.tolist() == pytest.approx([49.5 + 100 * i for i in range(10)], abs=1.0)
    assert curve.steps.tolist() == pytest.approx(curve.mean.tolist())
    single = merge_seeds([[(7, 0.5)]])
    assert (single.steps.tolist(), single.mean.tolist()) == ([7.0], [0.5])
