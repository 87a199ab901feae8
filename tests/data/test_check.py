import json
import os

import pytest

from nst_det.data.check import check_data
from nst_det.data.voc import VOC_CLASSES
from nst_det.errors import UserError
from tests.helpers.voc import jpeg, make, obj, write, write_list, xml


def found(report):
    """Kind and file of each problem."""
    return [(problem.kind, problem.file) for problem in report.problems]


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "data", {"a": xml(obj()), "b": xml(obj("dog")), "c": xml()})


def test_a_sound_folder(root):
    report = check_data(root)
    assert report.problems == []
    assert report.counts == {"lists": 1, "images": 3, "annotations": 3, "objects": 2, "classes": 2}
    assert report.summary() == "VOC folder, 1 lists, 3 images, 3 annotations, 2 objects, 2 classes: no problem"


def test_everything_wrong_is_listed_in_one_go(root, tmp_path):
    boxes = obj("cat", (5, 5, 5, 9)) + obj("cat", (0, 1, 9, 9)) + obj("cat", (50, 1, 60, 9))
    annotations = {
        "boxes": xml(boxes + obj("cat", (0, 1, 9, 9))),
        "a": xml(obj("Cat") + obj("cat"), width=41),
        "b": "<annotation><size>",
        "c": xml(extra="<filename>../../secret.jpg</filename>"),
        "orphan": xml(),
        "twin": xml(obj("TV-Monitor") + obj("tv monitor", (2, 2, 9, 9))),
    }
    for id_, text in annotations.items():
        write(root / "Annotations" / f"{id_}.xml", text)
    os.symlink(write(tmp_path / "secret.xml", xml()), root / "Annotations" / "link.xml")
    images = {
        "boxes.png": jpeg(seed=9), "b.jpg": jpeg()[:-300], "a.png": jpeg(), "lonely.jpg": jpeg(seed=5),
        "link.jpg": jpeg(seed=6), "noxml.jpg": jpeg(seed=7), "twin.jpg": jpeg(),  # the same bytes as a.jpg
    }  # fmt: skip
    for name, content in images.items():
        write(root / "JPEGImages" / name, content)
    write_list(root, "train", ["a", "b", "a", "../a", "gone", "noxml"])
    write_list(root, "test", ["b", "twin"])
    write_list(root, "empty", [])
    write(root / "ImageSets" / "Main" / "latin.txt", b"caf\xe9\n")
    write_list(root, "cat_train", ["a  1", "b -1"])
    assert found(check_data(root)) == [
        ("annotation without image", "Annotations/orphan.xml"),
        ("bad annotation", "Annotations/b.xml"),
        ("bad list", "ImageSets/Main/empty.txt"),
        ("bad list", "ImageSets/Main/latin.txt"),
        ("bad list", "ImageSets/Main/train.txt"),
        ("box outside", "Annotations/boxes.xml"),
        ("box reaches outside", "Annotations/boxes.xml"),
        ("box reaches outside", "Annotations/boxes.xml"),
        ("box with no area", "Annotations/boxes.xml"),
        ("id in two lists", "ImageSets/Main/test.txt"),
        ("image without annotation", "JPEGImages/lonely.jpg"),
        ("leads outside", "Annotations/c.xml"),
        ("leads outside", "Annotations/link.xml"),
        ("missing annotation", "JPEGImages/noxml.jpg"),
        ("missing image", "JPEGImages/gone"),
        ("repeated id", "ImageSets/Main/train.txt"),
        ("repeated id", "JPEGImages/a.png"),
        ("repeated object", "Annotations/boxes.xml"),
        ("same image in two lists", "JPEGImages/twin.jpg"),
        ("similar class names", "Annotations"),
        ("similar class names", "Annotations"),
        ("unreadable image", "JPEGImages/b.jpg"),
        ("wrong size", "Annotations/a.xml"),
    ]


def test_given_lists_and_classes(root):
    write_list(root, "val", ["b"])
    write(root / "JPEGImages" / "a.jpg", b"broken")
    assert check_data(root, splits=["val"]).problems == []
    (problem,) = check_data(root, splits=["val"], classes=["cat", "cow"]).problems
    assert problem.kind == "unknown class"
    assert "object 1 (dog)" in problem.text
    with pytest.raises(UserError, match=r"nope\.txt.*train, val"):
        check_data(root, splits=["nope"])


def test_no_lists_and_no_images(tmp_path):
    write(tmp_path / "Annotations" / "a.xml", xml())
    assert check_data(tmp_path).by_kind() == {"annotation without image": 1, "missing image": 1}


def test_image_folders(tmp_path):
    for seed, name in enumerate(("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/1.jpg", "val/wasp/1.jpg")):
        write(tmp_path / name, jpeg(8, 8, seed))
    write(tmp_path / "val/ant/2.jpg", jpeg(8, 8, seed=1))
    write(tmp_path / "train/ant/cut.jpg", jpeg(8, 8)[:60])
    write(tmp_path / "train/ant/notes.txt", "x")
    (tmp_path / "train/ant/deeper").mkdir()
    (tmp_path / "train/cow").mkdir()
    report = check_data(tmp_path)
    assert report.layout == "image folder"
    assert found(report) == [
        ("empty class", "train/cow"),
        ("missing class", "val/bee"),
        ("missing class", "val/cow"),
        ("other file", "train/ant/deeper"),
        ("other file", "train/ant/notes.txt"),
        ("same image in two lists", "val/ant/2.jpg"),
        ("unknown class", "val/wasp"),
        ("unreadable image", "train/ant/cut.jpg"),
    ]
    assert report.counts == {"classes": 3, "images": 6}


@pytest.mark.parametrize(
    ("path", "splits", "file", "key"),
    [
        ("", None, "", "neither a VOC folder"),
        ("gone", None, "", "gone"),
        ("", ["train"], "cat/1.jpg", "lists"),
        ("", None, "JPEGImages/1.jpg", "Annotations"),
    ],
)
def test_what_is_neither(tmp_path, path, splits, file, key):
    if file:
        write(tmp_path / file, jpeg())
    with pytest.raises(UserError, match=key):
        check_data(tmp_path / path, splits=splits)


def test_the_command(root, tmp_path, cli, capsys):
    assert cli("check-data", root) == 0
    write(root / "Annotations" / "a.xml", xml(obj("[red]x[/]", (7, 7, 7, 7))))
    assert cli("check-data", root, "--output", tmp_path / "out.json") == 2
    (problem,) = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert (problem["kind"], problem["file"]) == ("box with no area", "Annotations/a.xml")
    assert "the box (7, 7, 7, 7) of object 1 ([red]x[/])" in problem["text"]
    assert f"box with no area: Annotations/a.xml: {problem['text']}" in capsys.readouterr().out


@pytest.mark.real_data
def test_real_data(real_data):
    report = check_data(real_data / "bccd")
    assert [problem.line() for problem in report.problems] == [
        "Annotations/BloodImage_00338.xml: the box (504, 337, 504, 337) of object 13 (RBC) has no area",
        "Annotations/BloodImage_00343.xml: the box (181, 329, 181, 329) of object 4 (RBC) has no area",
    ]
    assert report.counts == {"lists": 4, "images": 364, "annotations": 364, "objects": 4888, "classes": 3}
    assert check_data(real_data / "VOC2007", splits=["val"], classes=VOC_CLASSES).problems == []
    assert check_data(real_data / "tiny_imagenet_50").problems == []
