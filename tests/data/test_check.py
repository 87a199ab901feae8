import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nst_det.data.check import check_data
from nst_det.data.voc import VOC_CLASSES
from nst_det.errors import UserError
from tests.helpers.voc import jpeg, make, obj, write, write_list, xml

BOX = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>8</xmax><ymax>8</ymax></bndbox>"


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
        ("link to outside", "Annotations/link.xml"),
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


def exif(orientation):
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    tags = image.getexif()
    tags[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=tags)
    return stream.getvalue()


def deep_png(color, channels):
    """A PNG of 16 bits a channel, 40 x 30."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40, 30, 16, color, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\1\2" * 40 * channels) * 30)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "kinds"),
    [
        # half a turn, mirrored, and a quarter, after which the size of the annotation is another
        ("JPEGImages/a.jpg", exif(3), ["turned image"]),
        ("JPEGImages/a.jpg", exif(2), ["turned image"]),
        ("JPEGImages/a.jpg", exif(6), ["turned image", "wrong size"]),
        ("JPEGImages/a.jpg", exif(1), []),
        # 16 bits in grey, RGB, grey with alpha and RGBA
        *(("JPEGImages/a.jpg", deep_png(*kind), ["unreadable image"]) for kind in ((0, 1), (2, 3), (4, 2), (6, 4))),
        # the filename of another image, of the same one with another extension, and of none
        ("Annotations/a.xml", xml(obj(), extra="<filename>b.jpg</filename>"), ["names another image"]),
        ("Annotations/a.xml", xml(obj(), extra="<filename> b.png</filename>"), ["names another image"]),
        ("Annotations/a.xml", xml(obj(), extra="<filename>a.png</filename>"), []),
        ("Annotations/a.xml", xml(obj(), extra="<filename>0001.jpg</filename>"), []),
        # objects that would be lost
        ("Annotations/a.xml", xml(obj(extra=BOX)), ["bad annotation"]),
        ("Annotations/a.xml", xml(f"<objects>{obj()}{obj('dog')}</objects>"), ["bad annotation"]),
        ("Annotations/a.xml", xml(obj(extra=f"<part><name>head</name>{BOX}</part>")), []),
        ("Annotations/a.xml", xml(obj(box=(9, 1, 5, 9))), ["swapped corners"]),
        ("Annotations/a.xml", xml(obj(box=(1, 9, 5, 2))), ["swapped corners"]),
        # the share of an object that is cut off
        *(("Annotations/a.xml", xml(obj(extra=f"<truncated>{x}</truncated>")), []) for x in ("0.0597", "0.5", "1.0")),
        *(("Annotations/a.xml", xml(obj(extra=f"<truncated>{x}</truncated>")), ["bad annotation"]) for x in (-0.1, 2)),
        ("Annotations/a.xml", xml(obj(extra="<difficult>0.5</difficult>")), ["bad annotation"]),
        # UTF-8 by other names
        *(
            ("Annotations/a.xml", f'<?xml version="1.0" encoding="{name}"?>{xml(obj("tür"))}', [])
            for name in ("utf8", "UTF8", "utf_8", "UTF-8")
        ),
        # sizes that the file doesn't say, or says by halves; boxes are held against the image's own
        *(("Annotations/a.xml", xml(obj(), *size), ["size missing"]) for size in ((0, 0), (0, 30), ("", ""), ("0", 1))),
        ("Annotations/a.xml", f"<annotation>{obj()}</annotation>", ["size missing"]),
        (
            "Annotations/a.xml",
            f"<annotation>{obj(box=(1, 1, 41, 9))}</annotation>",
            ["box reaches outside", "size missing"],
        ),
        *(("Annotations/a.xml", xml(obj(), width=x), ["bad annotation"]) for x in (-1, "wide", "40.5", "nan")),
        # what a Mac leaves
        ("JPEGImages/._a.jpg", b"\0\5\x16\7", []),
        ("Annotations/._a.xml", b"\0\5\x16\7", []),
    ],
)
def test_files_of_other_tools(root, name, content, kinds):
    write(root / name, content)
    assert [kind for kind, _ in found(check_data(root))] == kinds


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"GIF89a", "GIF"), (b"II*\0", "TIFF"), (b"<!DOCTYPE html>", "HTML"), (b"%PDF-1", "PDF"), (b"", "empty")],
)
def test_what_is_no_image_is_named(root, content, kind):
    write(root / "JPEGImages" / "a.jpg", content)
    (problem,) = check_data(root).problems
    assert problem.file == "JPEGImages/a.jpg"
    assert kind in problem.text


def test_given_lists_and_classes(root):
    write_list(root, "val", ["b"])
    write(root / "JPEGImages" / "a.jpg", b"broken")
    assert check_data(root, splits=["val"]).problems == []
    (problem,) = check_data(root, splits=["val"], classes=["cat", "cow"]).problems
    assert problem.kind == "unknown class"
    assert "object 1 (dog)" in problem.text
    with pytest.raises(UserError, match="'nope'.*train, val"):
        check_data(root, splits=["nope"])


TAGGED = obj(extra="<difficult>0</difficult>")


@pytest.mark.parametrize(
    ("objects", "keys"),
    [
        (TAGGED, []),
        (obj() + TAGGED, []),
        ("", []),
        (obj(), ["<difficult>"]),
        (obj(extra="<truncated>0</truncated><part><difficult>1</difficult></part>"), ["<difficult>"]),
        # ends of the image, 40 x 30, tell whether ends are inside
        (TAGGED + obj(box=(0, 2, 9, 9)), ["add 1 to xmin and ymin of all boxes, and to xmax"]),
        (
            TAGGED + obj(box=(2, 0, 9, 9)) + obj(box=(3, 3, 39, 29)),
            ["add 1 to xmin and ymin of all boxes, and to xmax"],
        ),
        (TAGGED + obj(box=(0, 2, 9, 9)) + obj(box=(3, 3, 40, 9)), ["add 1 to xmin and ymin of all boxes$"]),
        (TAGGED + obj(box=(0, 0, 9, 30)), ["add 1 to xmin and ymin of all boxes$"]),
        (TAGGED + obj(box=(1, 1, 40, 30)) + obj(box=(-1, 1, 9, 9)), []),
        (obj(box=(0, 1, 9, 9)), ["counted from 0.*: 1, .*x.xml", "<difficult>"]),
    ],
)
def test_what_a_whole_set_has_is_a_note(tmp_path, objects, keys):
    notes = check_data(make(tmp_path, {"x": xml(objects), "y": xml()})).notes
    assert len(notes) == len(keys)
    assert all(re.search(key, note) for key, note in zip(keys, notes))


@pytest.mark.parametrize(
    ("lists", "splits", "kinds"),
    [
        ({"nst_det_train": "ab", "nst_det_test": "bc"}, None, {"id in two lists": 1}),
        ({"nst_det_train": "ab", "nst_det_test": "d"}, None, {"same image in two lists": 1}),
        ({"learn": "ab", "exam": "bd"}, None, {}),
        ({"learn": "ab", "exam": "bd"}, ["learn", "exam"], {"id in two lists": 1, "same image in two lists": 1}),
        ({"night_val": "a", "night_test": "d", "day_test": "a"}, None, {"same image in two lists": 1}),
        ({"train": "a", "trainval": "ab", "test": "c"}, ["train", "trainval", "test"], {}),
        ({"train": ["e.rf.1"], "test": ["e.rf.2", "b"]}, None, {"same picture in two lists": 1}),
        ({"train": "a", "test": ["a_flip"]}, None, {"same picture in two lists": 1}),
        ({"train": ["a_flip"], "test": "a"}, None, {"same picture in two lists": 1}),
        ({"train": ["a", "a_flip"], "test": "a"}, None, {"id in two lists": 1}),
    ],
)
def test_lists_that_share_images(root, lists, splits, kinds):
    """d is a copy of a; e.rf.1 and e.rf.2, a and a_flip are versions of one picture."""
    (root / "ImageSets/Main/train.txt").unlink()
    for seed, id_ in enumerate(("d", "e.rf.1", "e.rf.2", "a_flip")):
        write(root / "Annotations" / f"{id_}.xml", xml(obj()))
        write(root / "JPEGImages" / f"{id_}.jpg", jpeg(seed=50 + seed if seed else 0))
    for name, ids in lists.items():
        write_list(root, name, ids)
    assert check_data(root, splits).by_kind() == kinds


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
    assert "note: no object has the tag <difficult>" in capsys.readouterr().out
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
