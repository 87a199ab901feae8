import json

import numpy as np
import pytest

from nst_det.cli import main
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections
from nst_det.evaluation.io import detections_from_json, read_coco_names, read_detections

IDS = ("000001", "2008_000002")
CLASSES = ("cat", "dog")


def write_results(folder, cat="", dog="", prefix="comp4"):
    folder.mkdir(exist_ok=True)
    for name, text in (("cat", cat), ("dog", dog)):
        (folder / f"{prefix}_det_test_{name}.txt").write_text(text)
    return folder


def test_devkit_files(tmp_path):
    folder = write_results(tmp_path, "000001 0.5 1 2.5 30 4e1\n\n2008_000002 -1 0 0 1 1\n", "")
    found = read_detections(folder, IDS, CLASSES, "test")
    assert found.image_id == ["000001", "2008_000002"]
    np.testing.assert_array_equal(found.label, [0, 0])
    np.testing.assert_array_equal(found.box, [[1, 2.5, 30, 40], [0, 0, 1, 1]])
    np.testing.assert_array_equal(found.score, [0.5, -1])
    write_results(tmp_path / "three", "000001 0.5 1 2 3 4", prefix="comp3")
    assert len(read_detections(tmp_path / "three", IDS, CLASSES, "test")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000001 0.5 1 2 3", r"line 2: '000001 0\.5 1 2 3' is not 'id score x1 y1 x2 y2'"),
        ("000001 0.5 1 2 3 4 5", "line 2"),
        ("000001 x 1 2 3 4", "line 2"),
        ("000001 nan 1 2 3 4", "line 2: .* with finite numbers"),
        ("000001 0.5 1 2 3 inf", "line 2: .* with finite numbers"),
        ("000001 0.5 1 2 3 1e300", "line 2: .* with finite numbers"),
        ("000009 0.5 1 2 3 4", "line 2: image 000009 is not in the split; name the right split"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    folder = write_results(tmp_path, f"000001 0.5 1 2 3 4\n{line}\n")
    with pytest.raises(UserError, match=rf"comp4_det_test_cat\.txt: {message}"):
        read_detections(folder, IDS, CLASSES, "test")


def test_a_missing_file_is_named(tmp_path):
    (write_results(tmp_path) / "comp4_det_test_dog.txt").unlink()
    with pytest.raises(UserError, match=r"no comp4_det_test_dog\.txt; add it \(empty if nothing was found\)"):
        read_detections(tmp_path, IDS, CLASSES, "test")
    with pytest.raises(UserError, match="nowhere: no such file"):
        read_detections(tmp_path / "nowhere", IDS, CLASSES, "test")
    with pytest.raises(UserError, match="can't be part of a file name"):
        read_detections(tmp_path, IDS, ("../cat",), "test")


def test_our_json_comes_back_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 100, (5, 2, 2)), axis=1).reshape(5, 4)
    images = [("000001", boxes[:3], np.array([0, 1, 0]), rng.random(3)), ("2008_000002", boxes[3:], [1, 1], [0.1, 0.2])]
    before = Detections.from_images(images, CLASSES)
    np.testing.assert_allclose(before.box, np.add(boxes, (1, 1, 0, 0)))
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(before.to_json()))
    after = read_detections(file, IDS, CLASSES, "test")
    assert after.image_id == before.image_id
    np.testing.assert_array_equal(after.label, before.label)
    np.testing.assert_array_equal(after.score, before.score)
    np.testing.assert_allclose(after.box, before.box, atol=1e-12)


def entry(**changes):
    return {"image_id": "000001", "category": "cat", "bbox": [0, 1, 10, 20], "score": 0.5, **changes}


def test_numbers_of_coco_results():
    rows = [entry(image_id=1, category=None, category_id=2), entry(image_id=2008000002)]
    found = detections_from_json(rows, IDS, CLASSES, "f")
    assert found.image_id == ["000001", "2008_000002"]
    np.testing.assert_array_equal(found.label, [1, 0])
    np.testing.assert_array_equal(found.box, [[1, 2, 10, 21]] * 2)


def test_numbers_looked_up_in_a_coco_annotation_file(tmp_path):
    file = tmp_path / "gold.json"
    images = [{"id": 7, "file_name": "JPEGImages/000001.jpg"}, {"id": 8, "file_name": "2008_000002.jpg"}]
    file.write_text(json.dumps({"images": images, "categories": [{"id": 0, "name": "dog"}, {"id": 5, "name": "cat"}]}))
    names = read_coco_names(file)
    rows = [entry(image_id=8, category=None, category_id=5), entry(image_id=7, category=None, category_id=0)]
    found = detections_from_json(rows, IDS, CLASSES, "f", names)
    assert found.image_id == ["2008_000002", "000001"]
    np.testing.assert_array_equal(found.label, [0, 1])
    file.write_text('{"images": [{"id": "x", "file_name": "a"}], "categories": []}')
    with pytest.raises(UserError, match=r"gold\.json: images\[0\]: its id is 'x'"):
        read_coco_names(file)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"gold\.json: .*'images'"):
        read_coco_names(file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": 1}, "detections must be a list"),
        ([1], "detection 0: image_id None is no image of the split"),
        ([entry(), entry(image_id="x")], "detection 1: image_id 'x' is no image of the split"),
        ([entry(image_id=[])], r"detection 0: image_id \[\] is no image"),
        ([entry(image_id=10**400)], "detection 0: image_id 1000"),
        ([entry(image_id=True)], "detection 0: image_id True is no image"),
        ([entry(category="cow")], "detection 0: category 'cow' is not one of cat, dog; name all classes"),
        ([entry(category={})], r"detection 0: category \{\} is not one of"),
        ([entry(category=None, category_id=3)], "detection 0: category 3 is not one of"),
        ([entry(category=None, category_id=0)], "detection 0: category 0 is not one of"),
        ([entry(score=float("nan"))], "detection 0: needs a finite score"),
        ([entry(score=10**400)], "detection 0: needs a finite score"),
        ([entry(score="1")], "detection 0: needs a finite score"),
        ([entry(bbox=[1, 2, 3])], "detection 0: needs a finite score and bbox"),
        ([entry(bbox=None)], "detection 0: needs a finite score and bbox"),
        ([entry(bbox=[1, 2, 3, float("inf")])], "detection 0: needs a finite score and bbox"),
        ([entry(bbox=[1, 2, -3, 4])], "detection 0: bbox .* has a negative size"),
        ([entry(bbox=[1e9, 2, 3, 4])], "detection 0: bbox .* lies too far out"),
    ],
)
def test_bad_entries_are_named(rows, message):
    with pytest.raises(UserError, match=f"^f: {message}"):
        detections_from_json(rows, IDS, CLASSES, "f")


def test_ids_that_make_the_same_number_are_not_guessed():
    with pytest.raises(UserError, match="image_id 12 is no image of the split"):
        detections_from_json([entry(image_id=12)], ("1_2", "12"), CLASSES, "f")


@pytest.mark.real_data
def test_the_command_prints_and_writes_the_official_figures(real_data, tmp_path, capsys):
    root, file = real_data / "voc2007_golden_small", tmp_path / "out.json"
    words = ["evaluate", "--voc-root", str(root), "--split", "test", "--detections", str(root / "dets")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--iou", "0.5", "0.75", "--coco", "--output", str(file)])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "0.7856" in printed
    assert "0.8040" in printed
    figures = json.loads(file.read_text())
    expected = json.loads((root / "expected.json").read_text())
    assert figures["map"] == pytest.approx(expected["mAP11"], abs=1e-9)
    assert figures["per_class"]["person"]["ap11"] == pytest.approx(0.742740141481, abs=1e-9)
    assert figures["by_iou"]["0.75"]["map"] < figures["by_iou"]["0.5"]["map"] == figures["map"]
    assert 0.4 < figures["coco"]["AP"] < 0.6


def test_the_command_refuses_what_makes_no_sense(tmp_path, capsys):
    words = ["evaluate", "--voc-root", str(tmp_path), "--detections", str(tmp_path)]
    for extra, message in ((["--iou", "1.5"], "overlap thresholds lie above 0"), ([], "not a VOC folder")):
        with pytest.raises(SystemExit) as stop:
            main([*words, *extra])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
