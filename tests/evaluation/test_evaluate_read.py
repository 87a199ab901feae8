import json
import math
import re

import numpy as np
import pytest

from nst_det.data.splits import list_to_test
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections
from nst_det.evaluation.io import (
    CocoNames,
    detections_from_json,
    read_coco_names,
    read_detections,
    read_voc,
    write_detections,
)
from nst_det.evaluation.voc import evaluate_voc
from tests.helpers.voc import make, obj, write, write_list, xml

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
        "shelf (1) 0.5 1 2 3 4",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    folder = write_results(tmp_path, f"000001 0.5 1 2 3 4\n{line}\n")
    with pytest.raises(UserError, match=r"comp4_det_test_cat\.txt: line 2: "):
        read_detections(folder, IDS, CLASSES, "test")


def test_names_of_images_may_have_spaces(tmp_path):
    folder = write_results(tmp_path, "shelf (1) 0.5 1 2 3 4\n a b  c 1 1 2 3 4\n1 2 0.25 1 2 3 4\nu\u0308 1 1 2 3 4\n")
    ids = ["shelf (1)", "a b  c", "1 2", "\u00fc"]
    assert read_detections(folder, ids, CLASSES, "test").image_id == ids


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


# the numbers of two classes, what tells their order, and the labels, or what the error names
ORDERED, NAMED = {"numbered": True}, {"names": CocoNames({}, {17: "dog", 1: "cat", "d": "dog", 3: "cow"})}
NUMBERS = [
    ([0, 1], ORDERED, [0, 1]),
    ([2, 1, 2], ORDERED, [1, 0, 1]),
    ([0], ORDERED, [0]),
    ([2], ORDERED, [1]),
    ([1], ORDERED, "from 0 or from 1.*--coco-names"),
    ([0, 1], {}, "count from 0.*--coco-names.*--classes"),
    ([1, 2], {}, "count from 1.*--coco-names.*--classes"),
    ([1], {}, "from 0 or from 1.*--coco-names"),
    ([0, 2], ORDERED, "detection 0: category 0 .*--coco-names"),
    ([1, 17], {}, "detection 0: category 1 .*--coco-names"),
    ([-1], ORDERED, "detection 0: category -1"),
    ([17, 1], NAMED, [1, 0]),
    (["d", "cat"], NAMED, [1, 0]),
    ([2], NAMED, "detection 0: category 2 "),
    ([3], NAMED, r"detection 0: category 3 \(cow\) is not one of cat, dog.*--classes"),
    (["cat", "dog"], {}, [0, 1]),
    ([" dog "], {}, [1]),
    (["1"], ORDERED, "detection 0: category '1'"),
    ([True], ORDERED, "detection 0: category True"),
    ([1.0], ORDERED, "detection 0: category 1.0"),
    # a name and a number at once
    (["dog", 1], NAMED, [1, 0]),
    ([], {}, []),
]


@pytest.mark.parametrize("key", ["category_id", "category", "category_name"])
@pytest.mark.parametrize(("given", "known", "labels"), NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_of_categories(given, known, labels, key, caplog):
    rows = [{"image_id": "000001", key: value, "bbox": [0, 1, 10, 20], "score": 0.5} for value in given]
    if isinstance(labels, str):
        with pytest.raises(UserError, match=f"^f: .*{labels}"):
            detections_from_json(rows, IDS, CLASSES, "f", **known)
    else:
        assert detections_from_json(rows, IDS, CLASSES, "f", **known).label.tolist() == labels
        # what was made of numbers without names is said
        assert ("categories are" in caplog.text) == (known is ORDERED)


@pytest.mark.parametrize("number", [0, 1])
def test_the_number_of_the_only_class(number):
    assert detections_from_json([entry(category=number)], IDS, ("cat",), "f").label.tolist() == [0]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (1, "000001"), (2008000002, "2008_000002"), ("000001", "000001"), ("000001.jpg", "000001"),
        ("val/000001.png", "000001"), ("C:\\val\\000001.png", "000001"), ("cam1/a.jpg", "cam1_a"), ("cam1_a", "cam1_a"),
        ("val/cam1/a.jpg", "cam1_a"), ("C:\\x.y\\val\\b", "val_b"), ("x/b.jpg", "b"), ("u\u0308.jpg", "\u00fc"),
        (7, "cam1_a"), ("u7", "cam1_a"), (8, None), (12, None), ("a", None), ("", None), (None, None), (1.0, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["image_id", "file_name"])
def test_images_by_number_name_and_path(given, found, key):
    # 8 is the number of another image than its digits say, which is none of these
    names = CocoNames({7: "cam1/a.jpg", "u7": "cam1\\a.jpg", 8: "elsewhere.jpg"}, {})
    ids = (*IDS, "cam1_a", "8", "1_2", "12", "b", "val_b", "\u00fc")
    rows = [{"image_id": None, "category": "cat", "bbox": [0, 0, 1, 1], "score": 1, key: given}]
    if found:
        assert detections_from_json(rows, ids, CLASSES, "f", names).image_id == [found]
    else:
        with pytest.raises(UserError, match="^f: detection 0: image_id .*(--split|--coco-names)"):
            detections_from_json(rows, ids, CLASSES, "f", names)


def test_a_file_of_names(tmp_path):
    images = [{"id": 7, "file_name": "deep/000001.jpg"}, {"id": 8, "file_name": "2008_000002.jpg"}]
    file = tmp_path / "gold.json"
    categories = [{"id": 0, "name": "dog"}, {"id": 5, "name": " cat"}]
    file.write_text(json.dumps({"images": images, "categories": categories}))
    found = detections_from_json([number(8, 5), number(7, 0)], IDS, CLASSES, "f", read_coco_names(file))
    assert found.image_id == ["2008_000002", "000001"]
    np.testing.assert_array_equal(found.label, [0, 1])
    np.testing.assert_array_equal(found.box, [[1, 2, 10, 21]] * 2)
    # of categories alone
    file.write_text(json.dumps({"categories": categories}))
    assert detections_from_json([number(1, 0)], IDS, CLASSES, "f", read_coco_names(file)).label.tolist() == [1]
    bad = {"images": [{"id": 1.5, "file_name": "a"}], "categories": []}
    for text, key in ((json.dumps(bad), r"images\[0\]: its id"), ("[]", "'categories'"), ("{}", "'categories'")):
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
    ([entry(category=None)], "category None"),
    *(([entry(score=score)], "score") for score in (math.nan, 10**400, "1", True, None)),
    *(([entry(bbox=box)], "bbox") for box in ([1, 2, 3], None, ["1", 2, 3, 4], [1, 2, 3, math.inf], [1, 2, -3, 4])),
    ([entry(bbox=[1e9, 2, 3, 4])], "bbox"),
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


@pytest.mark.parametrize(
    ("lists", "split"),
    [
        (["trainval", "test"], "test"),
        (["train", "val", "test"], "test"),
        (["train", "val"], "val"),
        (["nst_det_train", "nst_det_test"], "nst_det_test"),
        (["all"], "all"),
        (["mine", "test"], "test"),
        (["one", "two"], None),
        ([], None),
    ],
)
def test_the_list_to_test_on_is_the_default(tmp_path, lists, split):
    root = make(tmp_path, {"a": xml(obj())}, split="x")
    (root / "ImageSets" / "Main" / "x.txt").unlink()
    for name in lists:
        write_list(root, name, ["a"])
    if split is None:
        with pytest.raises(UserError, match=rf"{', '.join(lists) or 'no lists'}.*--split"):
            list_to_test(root)
    else:
        assert list_to_test(root) == split


@pytest.mark.parametrize(
    ("boxes", "key"),
    [
        ([[10, 10, 20, 15]], None),
        # corners written as sizes, fractions, and what merely reaches outside
        ([[10, 10, 35, 25], [2, 2, 39, 29]], r"1 of 2 boxes reach outside"),
        ([[0.1, 0.1, 0.5, 0.5]], "fractions"),
        ([[10, 10, 35, 9]], None),
        ([], None),
    ],
)
def test_boxes_of_another_form_are_said(tmp_path, boxes, key, cli, caplog, capsys):
    root = make(tmp_path / "voc", {"a": xml(obj())}, split="test")
    rows = [{"image_id": "a", "category": "cat", "bbox": box, "score": 0.9} for box in boxes]
    write(tmp_path / "r.json", json.dumps(rows))
    assert cli("evaluate", "--voc-root", root, "--detections", tmp_path / "r.json") == 0
    assert bool(re.search(key or "reach|fractions", caplog.text)) == (key is not None)


def test_the_command_takes_the_order_of_the_classes(tmp_path, cli, capsys):
    objects = obj("rod", (1, 1, 10, 10)) + obj("disc", (11, 11, 20, 20))
    root = make(tmp_path / "voc", {"a": xml(objects)}, split="only")
    rows = [{"image_id": "a", "category_id": n, "bbox": [10 * n, 10 * n, 10, 10], "score": 0.9} for n in (0, 1)]
    write(tmp_path / "r.json", json.dumps(rows))
    words = ["evaluate", "--voc-root", root, "--detections", tmp_path / "r.json", "--output", tmp_path / "o.json"]
    assert cli(*words) == 2
    assert "--coco-names" in capsys.readouterr().err
    assert cli(*words, "--classes", "rod", "disc") == 0
    assert json.loads((tmp_path / "o.json").read_text())["map"] == 1.0
    assert cli(*words, "--classes", "disc", "rod") == 0
    assert json.loads((tmp_path / "o.json").read_text())["map"] == 0.0


@pytest.mark.parametrize(("words", "key"), [(["--iou", "1.5"], "1.5"), ([], "not a VOC folder")])
def test_the_command_refuses(tmp_path, cli, capsys, words, key):
    assert cli("evaluate", "--voc-root", tmp_path, "--detections", tmp_path, *words) == 2
    assert key in capsys.readouterr().err


def test_a_class_that_only_images_of_another_list_have_is_one(tmp_path):
    make(tmp_path, {"a": xml(obj("kitten")), "b": xml(obj("rare") + obj("other"))}, "train")
    make(tmp_path, {"c": xml(obj("kitten", (1, 1, 20, 20)))}, "test")
    file = tmp_path / "detections.json"
    boxes = [("rare", [0, 0, 20, 20], 0.9), ("kitten", [0, 0, 20, 20], 0.05)]
    file.write_text(
        json.dumps([{"image_id": "c", "category": name, "bbox": b, "score": score} for name, b, score in boxes])
    )
    found, truth = read_voc(file, tmp_path, "test", None, None)
    assert found.classes == truth.classes == ("kitten", "rare")
    result = evaluate_voc(found, truth)
    # as the run itself has it: no AP without an object, and cat's is not touched
    assert np.isnan(result.ap_area[0][1])
    assert (result.ap_area[0][0], result.map_area[0]) == (1.0, 1.0)
    file.write_text(file.read_text().replace("rare", "nowhere"))
    with pytest.raises(UserError, match=r"detection 0: category 'nowhere'.*--classes"):
        read_voc(file, tmp_path, "test", None, None)
