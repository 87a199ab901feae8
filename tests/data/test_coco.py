import copy
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nst_det.data.check import check_data
from nst_det.data.coco import CocoSource, convert_coco
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from tests.helpers.voc import write_list

TREE = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 60, "height": 40},
        {"id": 9, "file_name": "deep/b.PNG", "width": 32, "height": 48},
        {"id": 3, "file_name": "empty.jpg", "width": 20, "height": 20},
    ],
    "categories": [{"id": 90, "name": "cat"}, {"id": 2, "name": "r&d <dog>"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 90, "bbox": [0, 0, 32, 48], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [10.25, 5.5, 20.125, 30.0], "area": 600, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [1 / 3, 2 / 3, 8, 9], "iscrowd": 1},
    ],
}


@pytest.fixture
def coco(tmp_path):
    """TREE with its images, and a way to change it."""
    folder = tmp_path / "pictures"
    for entry in TREE["images"]:
        path = folder / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
        Image.fromarray(pixels).save(path)

    def source(change=lambda tree: None, name="a.json"):
        tree = copy.deepcopy(TREE)
        change(tree)
        (tmp_path / name).write_text(json.dumps(tree))
        return CocoSource((tmp_path / name,), (folder,))

    return source


def test_values_survive(coco, tmp_path):
    source = coco()
    root = convert_coco(source, tmp_path / "voc")
    write_list(root, "all", ["a", "deep_b", "empty"])
    data = VocDataset(root, "all")
    assert data.classes == ("cat", "r&d <dog>")
    a, b, empty = data.annotations()
    assert (a.width, a.height, b.width, b.height) == (60, 40, 32, 48)
    assert a.names == ("r&d <dog>", "cat")
    # COCO's corners, pixels from 0: x, y, x + width, y + height
    np.testing.assert_allclose(a.boxes, [[10.25, 5.5, 30.375, 35.5], [1 / 3, 2 / 3, 25 / 3, 29 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(b.boxes, [[0, 0, 32, 48]])
    assert a.difficult.tolist() == [False, True]
    assert empty.objects == ()
    pixels = np.asarray(Image.open(tmp_path / "pictures" / "deep" / "b.PNG"))
    np.testing.assert_array_equal(data.image("deep_b"), pixels)
    assert check_data(root, ["all"]).problems == []
    # and by COCO's own reader
    api = COCO(str(source.files[0]))
    for image, annotation in ((7, a), (9, b), (3, empty)):
        theirs = api.loadAnns(api.getAnnIds([image]))
        assert [api.cats[entry["category_id"]]["name"] for entry in theirs] == list(annotation.names)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in theirs)]
        np.testing.assert_allclose(annotation.boxes, np.array(corners).reshape(-1, 4), rtol=1e-6)
        assert [bool(entry["iscrowd"]) for entry in theirs] == annotation.difficult.tolist()


def put(key, number, field, value):
    def change(tree):
        tree[key][number][field] = value

    return change


def drop(key):
    return lambda tree: tree.pop(key)


BAD = [
    (drop("images"), "'images'"),
    (drop("annotations"), "'annotations'"),
    (drop("categories"), "'categories'"),
    (put("images", 1, "id", 7), "images[1]: the id 7"),
    (put("images", 0, "file_name", None), "images[0]: its file_name"),
    (put("images", 0, "width", "60"), "images[0]: its width is '60'"),
    (put("images", 0, "width", 0), "images[0]: its size is 0x40"),
    (lambda tree: tree["images"][0].update(width=40, height=60), "a.jpg: the image is 60x40"),
    (put("images", 0, "file_name", "../a.jpg"), "images[0]: file_name '../a.jpg'"),
    (put("images", 0, "file_name", "/etc/a.jpg"), "images[0]: file_name '/etc/a.jpg'"),
    (put("images", 0, "file_name", ""), "images[0]: file_name ''"),
    (put("images", 0, "file_name", "q/" * 101 + "a.jpg"), "images[0]: file_name 'q/"),
    (put("images", 0, "file_name", "a.gif"), "images[0]: 'a.gif'"),
    (put("images", 0, "file_name", "gone.jpg"), "gone.jpg: "),
    (put("images", 2, "file_name", "a.jpg"), "'a.jpg' and 'a.jpg' would both be called a"),
    (put("annotations", 2, "image_id", 8), "annotations[2]: image_id 8"),
    (put("annotations", 0, "category_id", 91), "annotations[0]: category_id 91"),
    (put("annotations", 0, "bbox", [1, 2, 3]), "annotations[0]: its bbox is [1, 2, 3]"),
    (put("annotations", 0, "bbox", [1, 2, 3, "4"]), "annotations[0]: its bbox is [1, 2, 3, '4']"),
    (put("annotations", 0, "bbox", [1, 2, 3, math.nan]), "annotations[0]: its bbox is [1, 2, 3, nan]"),
    (put("annotations", 0, "bbox", None), "annotations[0]: its bbox is missing"),
    (put("categories", 1, "id", 90), "categories[1]: the id 90"),
    (put("categories", 1, "name", "cat"), "categories[1]: the name 'cat'"),
    (put("categories", 0, "name", " "), "categories[0]: its name"),
    (lambda tree: tree.update(images=[], annotations=[]), "no image in it"),
]


@pytest.mark.parametrize(("change", "key"), BAD, ids=[key for _, key in BAD])
def test_bad_input_is_one_line(coco, tmp_path, change, key):
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        convert_coco(coco(change), tmp_path / "voc")
    assert "a.json" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_link_out_of_the_folder_is_refused(coco, tmp_path):
    source = coco()
    image = source.images[0] / "a.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: leads outside"):
        convert_coco(source, tmp_path / "voc")
