import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.stages import check_data_folders
from nst_det.data.check import check_data
from nst_det.data.coco import CocoSource, convert_coco
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from nst_det.scaffold.init import init_project


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, words)])
    return ended.value.code


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
    root = convert_coco(coco(), tmp_path / "voc")
    (root / "ImageSets" / "Main" / "all.txt").write_text("a\ndeep_b\nempty\n")
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
    assert check_data(root, ["all"]).problems == ()


def test_pycocotools_reads_the_same_boxes(coco, tmp_path):
    """The same JSON read by COCO's own reader."""
    from pycocotools.coco import COCO

    source = coco()
    root = convert_coco(source, tmp_path / "voc")
    (root / "ImageSets" / "Main" / "all.txt").write_text("a\ndeep_b\nempty\n")
    data = VocDataset(root, "all")
    api = COCO(str(source.files[0]))
    for image, id_ in ((7, "a"), (9, "deep_b"), (3, "empty")):
        annotation = data.annotation(id_)
        theirs = api.loadAnns(api.getAnnIds([image]))
        assert [api.cats[entry["category_id"]]["name"] for entry in theirs] == list(annotation.names)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in theirs)]
        np.testing.assert_allclose(annotation.boxes, np.array(corners).reshape(-1, 4), rtol=1e-6)
        assert [bool(entry["iscrowd"]) for entry in theirs] == annotation.difficult.tolist()


def as_coco(voc, split, file, names):
    """A VOC list as COCO JSON, by hand."""
    data = VocDataset(voc, split)
    tree = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    for number, annotation in enumerate(data.annotations()):
        name = data.image_path(annotation.id).name
        entry = {"id": number, "file_name": name, "width": annotation.width, "height": annotation.height}
        tree["images"].append(entry)
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            entry = {"image_id": number, "category_id": names.index(item.name), "bbox": box}
            tree["annotations"].append({**entry, "iscrowd": int(item.difficult)})
    file.write_text(json.dumps(tree))
    return file


def test_a_project_like_the_one_from_voc(thirty, tmp_path, monkeypatch, capsys):
    names = list(VocDataset(thirty, "trainval").classes)
    train = as_coco(thirty, "trainval", tmp_path / "train.json", names)
    test = as_coco(thirty, "test", tmp_path / "test.json", names)
    monkeypatch.chdir(tmp_path)
    assert call("mine", "--coco", train, test, "--images", thirty / "JPEGImages", "--device", "cpu") == 0
    assert "nst-det compare --config-file mine/compare.yaml" in capsys.readouterr().out
    root = tmp_path / "mine" / "data" / "voc"
    for split, theirs in (("train", "trainval"), ("test", "test")):
        mine, wanted = VocDataset(root, split), VocDataset(thirty, theirs)
        assert mine.ids == wanted.ids
        assert mine.classes == wanted.classes
        for one, other in zip(mine.annotations(), wanted.annotations()):
            # COCO has no word for truncated
            assert (one.names, one.width, one.height) == (other.names, other.width, other.height)
            np.testing.assert_array_equal(one.boxes, other.boxes)
            np.testing.assert_array_equal(one.difficult, other.difficult)
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    check_data_folders(comparison.distill, comparison.detect, "here")
    assert Path(comparison.detect.DATASETS.VOC.own_train.ROOT) == root
    # the configs are those that the VOC folder itself gets
    init_project(tmp_path / "other", thirty, device="cpu")
    trees = [yaml.safe_load((tmp_path / name / "detect.yaml").read_text()) for name in ("mine", "other")]
    for tree in trees:
        del tree["DATASETS"]["VOC"], tree["OUTPUT_DIR"]
    assert trees[0] == trees[1]


def test_one_file_is_cut(thirty, tmp_path):
    names = list(VocDataset(thirty, "trainval").classes)
    source = CocoSource((as_coco(thirty, "trainval", tmp_path / "all.json", names),), (thirty / "JPEGImages",))
    project = init_project(tmp_path / "mine", source)
    assert project.cut
    assert sum(project.images) == 24
    assert project.values.voc == project.report.root == tmp_path / "mine" / "data" / "voc"


def put(key, number, field, value):
    def change(tree):
        tree[key][number][field] = value

    return change


def drop(key):
    return lambda tree: tree.pop(key)


BAD = {
    "no list 'images'": drop("images"),
    "no list 'annotations'": drop("annotations"),
    "no list 'categories'": drop("categories"),
    r"images\[1\]: the id 7 stands there twice": put("images", 1, "id", 7),
    r"images\[0\]: its file_name is missing": lambda tree: tree["images"][0].pop("file_name"),
    r"images\[0\]: its width is '60'": put("images", 0, "width", "60"),
    r"images\[0\]: its size is 0x40": put("images", 0, "width", 0),
    "the image is 60x40, but .* says 40x60": lambda tree: tree["images"][0].update(width=40, height=60),
    r"file_name '\.\./a\.jpg' could lead to another folder": put("images", 0, "file_name", "../a.jpg"),
    "file_name '/etc/a.jpg'": put("images", 0, "file_name", "/etc/a.jpg"),
    "'a.tif' is not one of": put("images", 0, "file_name", "a.tif"),
    "gone.jpg: no such image": put("images", 0, "file_name", "gone.jpg"),
    "images 'a.jpg' and 'a.jpg' would both be called a": put("images", 2, "file_name", "a.jpg"),
    r"annotations\[2\]: image_id 8 is not among": put("annotations", 2, "image_id", 8),
    r"annotations\[0\]: category_id 91 is not among": put("annotations", 0, "category_id", 91),
    r"annotations\[0\]: its bbox is \[1, 2, 3\]": put("annotations", 0, "bbox", [1, 2, 3]),
    r"annotations\[0\]: its bbox is \[1, 2, 3, '4'\]": put("annotations", 0, "bbox", [1, 2, 3, "4"]),
    r"annotations\[0\]: its bbox is \[1, 2, 3, nan\]": put("annotations", 0, "bbox", [1, 2, 3, math.nan]),
    r"annotations\[0\]: its bbox is missing": lambda tree: tree["annotations"][0].pop("bbox"),
    r"categories\[1\]: id 2 or name 'cat' stands there twice": put("categories", 1, "name", "cat"),
    r"categories\[0\]: its name '' is empty": put("categories", 0, "name", " "),
    "a.json: no image in it": lambda tree: tree.update(images=[], annotations=[]),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing(coco, tmp_path, capsys, said):
    source = coco(BAD[said])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said) as caught:
        init_project(tmp_path / "mine", source)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_words_on_the_command_line(coco, tmp_path, capsys):
    (file,), (folder,) = coco().files, coco().images
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"images": [')
    out = tmp_path / "mine"
    for words, said in (
        ((out, "--coco", file), "name the folder of its images by --images"),
        ((out, "--coco", file, "--images", folder, folder), "--coco: give one JSON file or two"),
        ((out, "--coco", file, "--images", tmp_path / "none"), "none: no such folder"),
        ((out, "--coco", tmp_path / "none.json", "--images", folder), "none.json: no such file"),
        ((out, "--coco", tmp_path / "list.json", "--images", folder), "not COCO's object detection format"),
        ((out, "--coco", tmp_path / "half.json", "--images", folder), "not valid JSON"),
        ((out, "--voc", folder, "--images", folder, folder), "--images: one folder of classification data"),
    ):
        assert call(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert not out.exists()


def test_a_link_out_of_the_folder_is_refused(coco, tmp_path):
    source = coco()
    image = source.images[0] / "a.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(UserError, match="leads outside"):
        convert_coco(source, tmp_path / "voc")
