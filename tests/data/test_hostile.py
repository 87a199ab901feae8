"""Files from strangers: each is refused in one clear line, none is executed, followed or decoded at any size."""

import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nst_det.data.annotation import MAX_XML_BYTES
from nst_det.data.check import check_data
from nst_det.data.folders import read_image_folder
from nst_det.data.images import MAX_IMAGE_BYTES, read_image
from nst_det.data.safe_io import read_bytes, shown
from nst_det.data.voc import VocDataset
from nst_det.engine.io import read_json
from nst_det.errors import UserError

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
BOMB = f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>'
QUADRATIC = f'<!DOCTYPE a [<!ENTITY x "{"x" * 50000}">]><annotation>{"&x;" * 1000}</annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><folder>&x;</folder></annotation>'
PARAMETER = '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;]><annotation/>'
DTD = '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>'
DEEP = "<annotation>" + "<a>" * 500_000 + "</a>" * 500_000 + "</annotation>"


def sized(width=40, height=30, objects=""):
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def boxed(xmin="1", name="cat", more=""):
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    return sized(objects=f"<object><name>{name}</name>{more}{box}</object>")


BAD_XML = [
    ("", "XML"),
    ("<annotation>", "XML"),
    (b"\x00\xff\x00\xff", "XML"),
    ("<annotation/><annotation/>", "XML"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "XML"),
    ('<?xml version="1.0" encoding="shift_jis"?><annotation/>', "XML"),
    ('<?xml version="1.0" encoding="utf-8"?><annotation>\xff</annotation>'.encode("latin-1"), "XML"),
    ("<annotation>\x00</annotation>", "XML"),
    *((text, "DOCTYPE") for text in (BOMB, QUADRATIC, EXTERNAL, PARAMETER, DTD)),
    ("<html><body/></html>", "<html>"),
    (f"<{'a' * 1_000_000}/>", "<aaa"),
    (DEEP, "size/width"),
    ("<annotation/>", "size/width"),
    (sized(width=0), "size/width is '0'"),
    (sized(height=-3), "size/height is '-3'"),
    (sized(width="40.5"), "size/width is '40.5'"),
    (sized(width=10**9), "size/width is '1000000000'"),
    (sized(width="9" * 1_000_000), "size/width is '999"),
    (sized(width="many"), "size/width is 'many'"),
    (sized(width="٤٠"), "size/width"),
    (sized(width="4_0"), "size/width is '4_0'"),
    *((boxed(xmin), "bndbox/xmin is '") for xmin in ("nan", "-inf", "1e99", "1000001", "1" * 5000, "", "0x10")),
    (sized(objects="<object><name>a</name><bndbox/></object>"), "bndbox/xmin is missing"),
    (boxed(name=""), "name"),
    (boxed(name="a\nb"), "name"),
    (boxed(name="a" * 201), "name"),
    (boxed(name="a\u202eb"), "name"),
    (boxed(more="<difficult>maybe</difficult>"), "difficult is 'maybe'"),
    (boxed(more="<truncated>2</truncated>"), "truncated is '2'"),
]


@pytest.mark.parametrize(("content", "key"), BAD_XML, ids=range(len(BAD_XML)))
def test_bad_annotations(voc, tmp_path, content, key):
    voc.make(tmp_path, {"a": content, "b": voc.xml(voc.obj())})
    assert os.path.getsize(tmp_path / "Annotations" / "a.xml") < MAX_XML_BYTES
    start = time.monotonic()
    with pytest.raises(UserError, match=r"Annotations/a\.xml: ") as error:
        VocDataset(tmp_path, "train")
    assert time.monotonic() - start < 5
    assert key in str(error.value)
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()
    assert "bad annotation" in check_data(tmp_path).by_kind()


def test_a_gigabyte_is_refused_by_its_size(tmp_path):
    path = tmp_path / "a.jpg"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    start = time.monotonic()
    for limit in (MAX_XML_BYTES, MAX_IMAGE_BYTES):
        with pytest.raises(UserError, match=rf"a\.jpg: 1073741824 bytes.* {limit}"):
            read_bytes(path, limit, "image")
    assert time.monotonic() - start < 1


def test_pipes_devices_folders_and_circles_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    os.symlink(tmp_path / "loop.jpg", tmp_path / "loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "zero.jpg", "loop.jpg"):
        with pytest.raises(UserError, match=rf"{name}: "):
            read_image(tmp_path / name)


HOSTILE_IDS = [
    "../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "..\\windows", "C:\\x", "a\x00b", "a\x1b[31mb",
    "a\u202eb", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("id_", HOSTILE_IDS)
def test_hostile_ids_are_refused_and_printed_without_control_characters(voc, tmp_path, id_):
    voc.make(tmp_path, {"a": voc.xml(voc.obj())})
    voc.write(tmp_path / "ImageSets" / "Main" / "train.txt", f"a\n{id_}\n")
    with pytest.raises(UserError, match=r"train\.txt: line 2: '") as error:
        VocDataset(tmp_path, "train")
    assert str(error.value).isprintable()
    assert [problem.kind for problem in check_data(tmp_path).problems] == ["bad list"]


def test_names_that_are_not_utf8_are_listed_legibly(voc, tmp_path):
    voc.make(tmp_path, {"a": voc.xml(voc.obj())})
    strange = os.fsencode(tmp_path / "JPEGImages") + b"/caf\xe9\x1b[31m.jpg"
    with open(strange, "wb") as file:
        file.write(voc.jpeg(seed=3))
    report = check_data(tmp_path)
    assert [problem.file for problem in report.problems] == [r"JPEGImages/caf\udce9\x1b[31m.jpg"]
    assert all(problem.line().isprintable() for problem in report.problems)
    assert VocDataset(tmp_path, "train").ids == ("a",)


def test_class_folders_with_strange_names(voc, tmp_path):
    name = "<script>alert(1)<_script>"
    voc.write(tmp_path / name / "1.jpg", voc.jpeg())
    assert read_image_folder(tmp_path, val_fraction=0).classes == (name,)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    with pytest.raises(UserError, match=r"class '\\udcff\\udcfe'"):
        read_image_folder(tmp_path)


@given(st.text())
@settings(deadline=None)
def test_shown_text_is_printable_and_short(text):
    assert shown(text).isprintable()
    assert len(shown(text, 10)) <= 10 * 10 + 3


@pytest.mark.parametrize("content", ["[" * 200_000 + "]" * 200_000, "[1]x"])
def test_json_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
