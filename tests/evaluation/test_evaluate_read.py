import json
import math

import numpy as np
import pytest

from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections
from nst_det.evaluation.io import detections_from_json, read_coco_names, read_detections, write_detections

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
    "line",
    [
        "000001 0.5 1 2 3",
        "000001 0.5 1 2 3 4 5",
        "000001 x 1 2 3 4",
        "000001 nan 1 2 3 4",
        "000001 0.5 1 2 3 inf",
        "000001 0.5 1 2 3 1e300",
        "000009 0.5 1 2 3 4",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    folder = write_results(tmp_path, f"000001 0.5 1 2 3 4\n{line}\n")
    with pytest.raises(UserError, match=r"comp4_det_test_cat\.txt: line 2: "):
        read_detections(folder, IDS, CLASSES, "test")


def test_a_missing_file_is_named(tmp_path):
    (write_results(tmp_path) / "comp4_det_test_dog.txt").unlink()
    for folder, classes, key in (
        ("", CLASSES, "no comp4_det_test_dog.txt"),
        ("nowhere", CLASSES, "nowhere: no such file"),
        ("", ("../cat",), "no comp4_det_test_../cat.txt"),
    ):
        with pytest.raises(UserError, match=key):
            read_detections(tmp_path / folder, IDS, classes, "test")


def test_our_json_comes_back_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (50, 2))
    box = np.concatenate([corner, corner + rng.uniform(1, 200, (50, 2))], axis=1)
    ids = [IDS[i] for i in rng.integers(0, 2, 50)]
    found = Detections(ids, CLASSES, rng.integers(0, 2, 50), box, rng.random(50))
    write_detections(tmp_path / "detections.json", found)
    again = read_detections(tmp_path / "detections.json", IDS, CLASSES, "test")
    assert again.image_id == found.image_id
    np.testing.assert_array_equal(again.label, found.label)
    np.testing.assert_array_equal(again.score, found.score)
    np.testing.assert_allclose(again.box, found.box, rtol=0, atol=1e-12)
    write_detections(tmp_path / "none.json", Detections.from_images([], CLASSES))
    assert len(read_detections(tmp_path / "none.json", IDS, CLASSES, "test")) == 0


def entry(**changes):
    return {"image_id": "000001", "category": "cat", "bbox": [0, 1, 10, 20], "score": 0.5, **changes}


def number(image, category):
    return entry(image_id=image, category=None, category_id=category)


def test_numbers_of_coco_results(tmp_path):
    found = detections_from_json([number(1, 2), number(2008000002, 1)], IDS, CLASSES, "f")
    assert found.image_id == list(IDS)
    np.testing.assert_array_equal(found.label, [1, 0])
    np.testing.assert_array_equal(found.box, [[1, 2, 10, 21]] * 2)
    # or as an annotation file has them
    images = [{"id": 7, "file_name": "deep/000001.jpg"}, {"id": 8, "file_name": "2008_000002.jpg"}]
    file = tmp_path / "gold.json"
    file.write_text(json.dumps({"images": images, "categories": [{"id": 0, "name": "dog"}, {"id": 5, "name": "cat"}]}))
    found = detections_from_json([number(8, 5), number(7, 0)], IDS, CLASSES, "f", read_coco_names(file))
    assert found.image_id == ["2008_000002", "000001"]
    np.testing.assert_array_equal(found.label, [0, 1])
    for text, key in (('{"images": [{"id": "x", "file_name": "a"}]}', r"images\[0\]: its id"), ("[]", "'images'")):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"gold\.json: .*{key}"):
            read_coco_names(file)


BAD = [
    ([1], "image_id None"),
    ([entry(), entry(image_id="x")], "image_id 'x'"),
    ([entry(image_id=[])], r"image_id \[\]"),
    ([entry(image_id=10**400)], "image_id 1000"),
    ([entry(image_id=True)], "image_id True"),
    ([entry(category="cow")], "category 'cow' .*cat, dog"),
    ([entry(category={})], r"category \{\}"),
    ([number(1, 3)], "category 3"),
    ([number(1, 0)], "category 0"),
    *(([entry(score=score)], "score") for score in (math.nan, 10**400, "1", True, None)),
    *(([entry(bbox=box)], "bbox") for box in ([1, 2, 3], None, [1, 2, 3, math.inf], [1, 2, -3, 4], [1e9, 2, 3, 4])),
]


@pytest.mark.parametrize(("rows", "key"), BAD, ids=range(len(BAD)))
def test_bad_entries_are_named(rows, key):
    with pytest.raises(UserError, match=f"^f: detection {len(rows) - 1}: {key}"):
        detections_from_json(rows, IDS, CLASSES, "f")


def test_what_is_no_list_or_ambiguous():
    with pytest.raises(UserError, match="^f: .*list"):
        detections_from_json({"a": 1}, IDS, CLASSES, "f")
    # both ids make the number 12
    with pytest.raises(UserError, match="image_id 12"):
        detections_from_json([entry(image_id=12)], ("1_2", "12"), CLASSES, "f")


@pytest.mark.real_data
def test_the_command_gives_the_official_figures(real_data, tmp_path, cli, capsys):
    root, file = real_data / "voc2007_golden_small", tmp_path / "out.json"
    words = ["evaluate", "--voc-root", root, "--split", "test", "--detections", root / "dets"]
    assert cli(*words, "--iou", "0.5", "0.75", "--coco", "--output", file) == 0
    printed = capsys.readouterr().out
    assert "0.7856" in printed
    assert "0.8040" in printed
    figures = json.loads(file.read_text())
    expected = json.loads((root / "expected.json").read_text())
    assert figures["map"] == pytest.approx(expected["mAP11"], abs=1e-9)
    assert figures["per_class"]["person"]["ap11"] == pytest.approx(0.742740141481, abs=1e-9)
    assert figures["by_iou"]["0.75"]["map"] < figures["by_iou"]["0.5"]["map"] == figures["map"]
    assert 0.4 < figures["coco"]["AP"] < 0.6


@pytest.mark.parametrize(("words", "key"), [(["--iou", "1.5"], "1.5"), ([], "not a VOC folder")])
def test_the_command_refuses(tmp_path, cli, capsys, words, key):
    assert cli("evaluate", "--voc-root", tmp_path, "--detections", tmp_path, *words) == 2
    assert key in capsys.readouterr().err
