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
from tests.helpers.voc import jpeg, make, obj, write, write_list, xml

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
BOMB = f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>'
QUADRATIC = f'<!DOCTYPE a [<!ENTITY x "{"x" * 50000}">]><annotation>{"&x;" * 1000}</annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><folder>&x;</folder></annotation>'
PARAMETER = '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;]><annotation/>'
DTD = '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>'


def boxed(xmin="1", name="cat", more=""):
    return xml(obj(name, (xmin, 1, 9, 9), more))


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
    (xml(height=-3), "size/height is '-3'"),
    (xml(width="40.5"), "size/width is '40.5'"),
    (xml(width=10**9), "size/width is '1000000000'"),
    (xml(width="9" * 1_000_000), "size/width is '999"),
    (xml(width="many"), "size/width is 'many'"),
    (xml(width="٤٠"), "size/width"),
    (xml(width="4_0"), "size/width is '4_0'"),
    *((boxed(xmin), "bndbox/xmin is '") for xmin in ("nan", "-inf", "1e99", "1000001", "1" * 5000, "", "0x10")),
    (xml("<object><name>a</name><bndbox/></object>"), "bndbox/xmin is missing"),
    (boxed(name=""), "name"),
    (boxed(name="a\nb"), "name"),
    (boxed(name="a" * 201), "name"),
    (boxed(name="a\u202eb"), "name"),
    (boxed(more="<difficult>maybe</difficult>"), "difficult is 'maybe'"),
    (boxed(more="<truncated>2</truncated>"), "truncated is '2'"),
]


def one_line(error, key):
    assert key in error
    assert len(error) < 700
    assert error.isprintable()


@pytest.mark.parametrize(("content", "key"), BAD_XML, ids=range(len(BAD_XML)))
def test_bad_annotations(tmp_path, content, key):
    make(tmp_path, {"a": content, "b": xml(obj())})
    assert os.path.getsize(tmp_path / "Annotations" / "a.xml") < MAX_XML_BYTES
    start = time.monotonic()
    with pytest.raises(UserError, match=r"Annotations/a\.xml: ") as error:
        VocDataset(tmp_path, "train")
    assert time.monotonic() - start < 5
    one_line(str(error.value), key)
    assert "bad annotation" in check_data(tmp_path).by_kind()


HOSTILE_IDS = [
    "../../etc/passwd", "/etc/passwd", "sub/a", "a/../../b", "..", ".", "..\\windows", "C:\\x", "a\x00b", "a\x1b[31mb",
    "a\u202eb", "x" * 201, "x" * 5000,
]  # fmt: skip
BAD_LISTS = [
    *((f"a\n{id_}\n", "line 2: '", "bad list") for id_ in HOSTILE_IDS),
    ("", "no image", "bad list"),
    ("\n \n", "no image", "bad list"),
    ("a\nb\na\n", "line 3: a", "repeated id"),
    (b"a\n\xff\xfe\n", "line 2", "bad list"),
]


@pytest.mark.parametrize(("content", "key", "kind"), BAD_LISTS, ids=range(len(BAD_LISTS)))
def test_bad_lists(tmp_path, content, key, kind):
    make(tmp_path, {"a": xml(obj()), "b": xml(obj())})
    write(tmp_path / "ImageSets" / "Main" / "bad.txt", content)
    with pytest.raises(UserError, match=r"bad\.txt: ") as error:
        VocDataset(tmp_path, "bad")
    one_line(str(error.value), key)
    assert kind in check_data(tmp_path).by_kind()


def test_lists_of_one_class_are_no_splits(tmp_path):
    make(tmp_path, {"a": xml(obj())}, "train")
    write_list(tmp_path, "cat_train", ["a 1", "b -1"])
    with pytest.raises(UserError, match=r"cat_train\.txt: a list of one class"):
        VocDataset(tmp_path, "cat_train")


def test_a_gigabyte_is_refused_by_its_size(tmp_path):
    write(tmp_path / "a.jpg")
    os.truncate(tmp_path / "a.jpg", 1 << 30)
    start = time.monotonic()
    for limit in (MAX_XML_BYTES, MAX_IMAGE_BYTES):
        with pytest.raises(UserError, match=rf"a\.jpg: .*{limit}"):
            read_bytes(tmp_path / "a.jpg", limit, "image")
    assert time.monotonic() - start < 2


def test_pipes_devices_folders_and_circles_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    os.symlink(tmp_path / "loop.jpg", tmp_path / "loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "zero.jpg", "loop.jpg"):
        with pytest.raises(UserError, match=rf"{name}: "):
            read_image(tmp_path / name)


def test_names_that_are_not_utf8_are_listed_legibly(tmp_path):
    make(tmp_path, {"a": xml(obj())})
    with open(os.fsencode(tmp_path / "JPEGImages") + b"/caf\xe9\x1b[31m.jpg", "wb") as file:
        file.write(jpeg(seed=3))
    (problem,) = check_data(tmp_path).problems
    assert problem.file == r"JPEGImages/caf\udce9\x1b[31m.jpg"
    assert problem.line().isprintable()
    assert VocDataset(tmp_path, "train").ids == ("a",)


def test_class_folders_with_strange_names(tmp_path):
    name = "<script>alert(1)<_script>"
    write(tmp_path / name / "1.jpg", jpeg())
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
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(write(tmp_path / "a.json", content))
