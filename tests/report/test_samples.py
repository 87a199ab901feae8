import json
import shutil

import numpy as np
import pytest

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.report.samples import choose_samples, match, open_data
from tests.helpers.finished import typed


def image(boxes, labels, difficult):
    """Boxes are 0-based and continuous, those of an annotation count from 1."""
    found = zip(boxes, labels, difficult)
    return VocAnnotation(
        "x", 50, 10, tuple(VocObject(n, (x + 1, y + 1, r, b), bool(d)) for (x, y, r, b), n, d in found)
    )


def annotations(folder):
    (data,) = open_data(folder / "detect/seed0/fitnet", ("any",))
    return {one.id: one for one in data.annotations()}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the comparison that may be damaged."""
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    for config in copy.rglob("config.json"):
        config.write_text(config.read_text().replace(str(finished[0]), str(copy)))
    return copy


def test_thresholds_of_the_validation_split_decide_what_is_shown(finished, copied):
    _, tree, _ = finished
    for path in copied.glob("detect/*/*/result.json"):
        result = json.loads(path.read_text())
        result["thresholds"]["ring"]["score"] = 0.8
        del result["thresholds"]["star"]
        path.write_text(json.dumps(result))
    found = {("ring", 0.79): False, ("ring", 0.8): True, ("star", 0.49): False, ("star", 0.5): True}
    entries = [{"image_id": "000000", "category": name, "bbox": [0, 0, 9, 9], "score": s} for name, s in found]
    (copied / "detect/seed0/fitnet/detections.json").write_text(json.dumps(entries))
    chosen = choose_samples(typed(tree), copied)
    (panel,) = (
        panel for one in chosen.samples if one.image_id == "000000" for panel in one.panels if panel.title == "fitnet"
    )
    assert chosen.validated
    shown = {(box.label, box.score) for box in panel.boxes if box.score}
    assert shown == {key for key, there in found.items() if there}


def test_of_several_sets_to_test_on_the_figures_are_those_of_the_first(finished, copied):
    for path in copied.rglob("config.json"):
        config = json.loads(path.read_text())
        more = {key.replace("shapes", "more"): value for key, value in config.items() if ".shapes." in key}
        path.write_text(json.dumps({**config, **more, "DATASETS.TEST": ["shapes", "more"]}))
    assert len(open_data(copied / "detect/seed0/fitnet", ("any",))) == 1
    results = typed(finished[1])
    assert choose_samples(results, copied) == choose_samples(results, finished[0])


def test_match_by_the_rule_of_voc():
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
    found, kinds = match(image([], [], []), detections[:1])
    assert (len(found), kinds) == (0, ["false"])
    assert match(truth, [])[0].tolist() == [False] * 3


def test_worst_misses_come_first(finished):
    folder, tree, _ = finished
    chosen = choose_samples(typed(tree), folder)
    assert (chosen.leader, chosen.seed, chosen.images, len(chosen.samples)) == ("fitnet", "0", 16, 6)
    # independently: every image's misses of fitnet, seed 0
    entries = json.loads((folder / "detect/seed0/fitnet/detections.json").read_text())
    truth = annotations(folder)
    missed = {}
    for image_id, one in truth.items():
        left = [index for index in range(len(one.names)) if not one.difficult[index]]
        for entry in sorted(entries, key=lambda e: -e["score"]):
            if entry["image_id"] == image_id and entry["score"] >= 0.5:
                for index in left:
                    x, y, w, h = entry["bbox"]
                    a, b, c, d = one.boxes[index]
                    inner = max(0, min(x + w, c) - max(x, a)) * max(0, min(y + h, d) - max(y, b))
                    if entry["category"] == one.names[index] and inner / (w * h + (c - a) * (d - b) - inner) >= 0.5:
                        left.remove(index)
                        break
        missed[image_id] = len(left)
    shown = [next(panel for panel in one.panels if panel.title == "fitnet").count("missed") for one in chosen.samples]
    assert shown == sorted(missed.values(), reverse=True)[:6]
    assert [missed[sample.image_id] for sample in chosen.samples] == shown
    for sample in chosen.samples:
        assert [panel.title for panel in sample.panels] == ["ce", "fitnet", "kd+nst-poly"]
        assert [panel.title for panel in sample.more] == ["scratch", "kd", "at", "nst-poly"]
        assert len(sample.truth.boxes) == len(truth[sample.image_id].names)
        for panel in sample.panels + sample.more:
            assert panel.count("found") + panel.count("missed") == sample.truth.count("true")
        assert sample.data.startswith("data:image/jpeg;base64,/9j/")


def test_boxes_are_in_pixels_of_the_image_whose_picture_may_be_smaller(finished, monkeypatch):
    folder, tree, _ = finished
    large = choose_samples(typed(tree), folder).samples[0]
    monkeypatch.setattr("nst_det.report.samples.LONGEST_SIDE", 80)  # half of the images' 160
    sample = choose_samples(typed(tree), folder).samples[0]
    assert (sample.width, sample.height) == (160, 120)
    assert len(sample.data) < len(large.data) / 2
    box = sample.truth.boxes[0]
    expected = annotations(folder)[sample.image_id].boxes[0]
    assert [box.x, box.y, box.x + box.width, box.y + box.height] == pytest.approx(expected)


@pytest.mark.parametrize("gone", ["data", "detect/seed0/fitnet/detections.json", "detect"])
def test_a_reason_is_given_where_files_are_gone(finished, copied, gone):
    victim = copied / gone
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    chosen = choose_samples(typed(finished[1]), copied)
    assert not chosen.samples
    assert chosen.reason


def test_an_unreadable_image_is_passed_over(finished, copied):
    results = typed(finished[1])
    before = choose_samples(results, copied).samples
    (copied / "data/JPEGImages" / f"{before[0].image_id}.jpg").write_bytes(b"no image")
    after = choose_samples(results, copied).samples
    assert [one.image_id for one in after[:5]] == [one.image_id for one in before[1:]]
