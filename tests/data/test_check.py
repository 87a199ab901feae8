import json
import os
import re

import pytest

from nst_det.cli import main
from nst_det.data.check import check_data, similar_names
from nst_det.data.voc import VOC_CLASSES
from nst_det.errors import UserError


def lines(report):
    return [f"{problem.kind}: {problem.line()}" for problem in report.problems]


@pytest.fixture
def root(voc, tmp_path):
    return voc.make(tmp_path / "data", {"a": voc.xml(voc.obj()), "b": voc.xml(voc.obj("dog")), "c": voc.xml()})


def listed(voc, root, name, *ids):
    voc.write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{id_}\n" for id_ in ids))


def test_a_sound_folder(root):
    report = check_data(root)
    assert report.problems == []
    assert report.counts == {"lists": 1, "images": 3, "annotations": 3, "objects": 2, "classes": 2}
    assert report.summary() == "VOC folder, 1 lists, 3 images, 3 annotations, 2 objects, 2 classes: no problem"


def test_everything_wrong_is_listed_in_one_go(voc, root, tmp_path):
    boxes = voc.obj("cat", (5, 5, 5, 9)) + voc.obj("cat", (0, 1, 9, 9)) + voc.obj("cat", (50, 1, 60, 9))
    voc.write(root / "Annotations" / "boxes.xml", voc.xml(boxes + voc.obj("cat", (0, 1, 9, 9))))
    voc.write(root / "JPEGImages" / "boxes.png", voc.jpeg(seed=9))
    voc.write(root / "Annotations" / "a.xml", voc.xml(voc.obj("Cat") + voc.obj("cat"), width=41, height=30))
    voc.write(root / "Annotations" / "b.xml", "<annotation><size>")
    voc.write(root / "Annotations" / "c.xml", voc.xml(extra="<filename>../../secret.jpg</filename>"))
    voc.write(root / "JPEGImages" / "b.jpg", voc.jpeg()[:-300])
    voc.write(root / "JPEGImages" / "a.png", voc.jpeg())
    voc.write(root / "JPEGImages" / "lonely.jpg", voc.jpeg(seed=5))
    voc.write(root / "Annotations" / "orphan.xml", voc.xml())
    os.symlink(voc.write(tmp_path / "secret.xml", voc.xml()), root / "Annotations" / "link.xml")
    voc.write(root / "JPEGImages" / "link.jpg", voc.jpeg(seed=6))
    listed(voc, root, "train", "a", "b", "a", "../a", "gone", "noxml")
    voc.write(root / "JPEGImages" / "noxml.jpg", voc.jpeg(seed=7))
    listed(voc, root, "test", "b", "twin")
    voc.write(root / "Annotations" / "twin.xml", voc.xml())
    voc.write(root / "JPEGImages" / "twin.jpg", voc.jpeg())  # the same bytes as a.jpg
    listed(voc, root, "empty")
    voc.write(root / "ImageSets" / "Main" / "latin.txt", b"caf\xe9\n")
    voc.write(root / "ImageSets" / "Main" / "cat_train.txt", "a  1\nb -1\n")
    found = [re.split(r"[;(]", line)[0].strip() for line in lines(check_data(root))]
    assert found == [
        "annotation without image: Annotations/orphan.xml: no image orphan with .jpg or .jpeg or .png",
        "bad annotation: Annotations/b.xml: not well-formed XML",
        "bad list: ImageSets/Main/empty.txt: no image is listed",
        "bad list: ImageSets/Main/latin.txt: line 1 is not UTF-8",
        "bad list: ImageSets/Main/train.txt: line 4: '../a' could lead to another folder",
        "box outside: Annotations/boxes.xml: the box",
        "box reaches outside: Annotations/boxes.xml: the box",
        "box reaches outside: Annotations/boxes.xml: the box",
        "box with no area: Annotations/boxes.xml: the box",
        "id in two lists: ImageSets/Main/test.txt: b is in train too",
        "image without annotation: JPEGImages/lonely.jpg: no Annotations/lonely.xml",
        "leads outside: Annotations/c.xml: filename '../../secret.jpg' leads elsewhere",
        "leads outside: Annotations/link.xml: is a link to outside the data set",
        "missing annotation: JPEGImages/noxml.jpg: no Annotations/noxml.xml",
        "missing image: JPEGImages/gone: no image and no annotation",
        "repeated id: ImageSets/Main/train.txt: line 3: a stands in line 1 too",
        "repeated id: JPEGImages/a.png: a.jpg has the same name and is taken",
        "repeated object: Annotations/boxes.xml: object 4",
        "same image in two lists: JPEGImages/twin.jpg: in test, is the same file as a in train",
        "similar class names: Annotations: 'Cat'",
        "unreadable image: JPEGImages/b.jpg: can't be decoded as an image",
        "wrong size: Annotations/a.xml: says 41x30, but the image is 40x30",
    ]


def test_given_lists_and_classes(voc, root):
    listed(voc, root, "val", "b")
    (root / "JPEGImages" / "a.jpg").write_bytes(b"broken")
    assert check_data(root, splits=["val"]).problems == []
    assert lines(check_data(root, splits=["val"], classes=["cat", "cow"])) == [
        "unknown class: Annotations/b.xml: object 1 (dog) is not one of 'cat', 'cow'"
    ]
    with pytest.raises(UserError, match=r"nope\.txt: no such list; there are train, val"):
        check_data(root, splits=["nope"])


def test_no_lists_and_no_images(voc, tmp_path):
    voc.write(tmp_path / "Annotations" / "a.xml", voc.xml())
    assert check_data(tmp_path).by_kind() == {"annotation without image": 1, "missing image": 1}


def test_image_folders(voc, tmp_path):
    for part, name, seed in (("train", "ant", 0), ("train", "bee", 1), ("val", "ant", 2), ("val", "wasp", 3)):
        voc.write(tmp_path / part / name / "1.jpg", voc.jpeg(8, 8, seed=seed))
    voc.write(tmp_path / "val" / "ant" / "2.jpg", voc.jpeg(8, 8, seed=1))
    voc.write(tmp_path / "train" / "ant" / "cut.jpg", voc.jpeg(8, 8)[:60])
    voc.write(tmp_path / "train" / "ant" / "notes.txt", "x")
    (tmp_path / "train" / "ant" / "deeper").mkdir()
    (tmp_path / "train" / "cow").mkdir()
    report = check_data(tmp_path)
    assert report.layout == "image folder"
    assert [line.split(" (")[0].split(";")[0] for line in lines(report)] == [
        "empty class: train/cow: no images",
        "missing class: val/bee: no such folder",
        "missing class: val/cow: no such folder",
        "other file: train/ant/deeper: a folder inside a class folder is not read",
        "other file: train/ant/notes.txt: is passed over, since it is none of .jpg, .jpeg, .png, .bmp, .webp",
        "same image in train and val: val/ant/2.jpg: is the same file as train/bee/1.jpg",
        "unknown class: val/wasp: not one of the classes",
        "unreadable image: train/ant/cut.jpg: can't be decoded as an image",
    ]
    assert report.counts == {"classes": 3, "images": 6}


def test_what_is_neither(voc, tmp_path):
    for name, splits, files, fact in (
        ("", None, (), "neither a VOC folder"),
        ("gone", None, (), "gone"),
        ("", ["train"], ("cat/1.jpg",), "lists"),
        ("", None, ("JPEGImages/1.jpg",), "Annotations"),
    ):
        for file in files:
            voc.write(tmp_path / file, voc.jpeg())
        with pytest.raises(UserError, match=fact):
            check_data(tmp_path / name, splits=splits)


def test_similar_names():
    assert similar_names(["cat", "Cat", "dog", "tv monitor", "TV-Monitor", "cow"]) == [
        ["Cat", "cat"], ["TV-Monitor", "tv monitor"],
    ]  # fmt: skip


def test_the_command_says_by_its_exit_code_whether_anything_is_wrong(voc, root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check-data", str(root)])
    assert stop.value.code == 0
    assert "no problem" in capsys.readouterr().out
    voc.write(root / "Annotations" / "a.xml", voc.xml(voc.obj("[red]x[/]", (7, 7, 7, 7))))
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        main(["check-data", str(root), "--output", str(file)])
    assert stop.value.code == 2
    printed = capsys.readouterr().out
    text = "the box (7, 7, 7, 7) of object 1 ([red]x[/]) has no area"
    assert f"box with no area: Annotations/a.xml: {text}" in printed
    expected = {"kind": "box with no area", "file": "Annotations/a.xml", "text": text}
    assert json.loads(file.read_text())["problems"] == [expected]


@pytest.mark.real_data
def test_the_two_real_faults_of_the_blood_cells_are_found_and_nothing_else(real_data):
    report = check_data(real_data / "bccd")
    assert [problem.line() for problem in report.problems] == [
        "Annotations/BloodImage_00338.xml: the box (504, 337, 504, 337) of object 13 (RBC) has no area",
        "Annotations/BloodImage_00343.xml: the box (181, 329, 181, 329) of object 4 (RBC) has no area",
    ]
    assert report.counts == {"lists": 4, "images": 364, "annotations": 364, "objects": 4888, "classes": 3}


@pytest.mark.real_data
def test_real_voc_and_real_folders_are_sound(real_data):
    assert check_data(real_data / "VOC2007", splits=["val"], classes=VOC_CLASSES).problems == []
    assert check_data(real_data / "tiny_imagenet_50").problems == []
