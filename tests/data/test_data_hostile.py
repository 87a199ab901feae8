"""Files from strangers: each is refused in one clear line, none is executed, followed or decoded at any size."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nst_det.cli import main
from nst_det.data.annotation import MAX_XML_BYTES, parse_annotation
from nst_det.data.check import check_data
from nst_det.data.folders import read_image_folder
from nst_det.data.images import MAX_IMAGE_BYTES, decode_image, image_size, read_image
from nst_det.data.safe_io import name_problem, read_bytes, read_names, shown
from nst_det.data.voc import VocDataset
from nst_det.engine.io import read_json
from nst_det.errors import UserError
from nst_det.evaluation.io import detections_from_json, read_comp4

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
BOMB = f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>'
QUADRATIC = f'<!DOCTYPE a [<!ENTITY x "{"x" * 50000}">]><annotation>{"&x;" * 1000}</annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><folder>&x;</folder></annotation>'
PARAMETER = '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;]><annotation/>'
DTD = '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>'
DEEP = "<annotation>" + "<a>" * 500_000 + "</a>" * 500_000 + "</annotation>"


@pytest.mark.parametrize("text", [BOMB, QUADRATIC, EXTERNAL, PARAMETER, DTD])
def test_doctypes_and_entities_are_refused_at_once(text):
    start = time.monotonic()
    annotation, problems = parse_annotation(text.encode(), "a")
    assert annotation is None
    assert problems[0].startswith("XML with a DOCTYPE or entities is refused")
    assert time.monotonic() - start < 1


def test_deep_nesting_is_read_and_found_to_be_no_annotation():
    assert len(DEEP) < MAX_XML_BYTES
    annotation, problems = parse_annotation(DEEP.encode(), "a")
    assert annotation is None
    assert problems[0] == "size/width is missing; write the image's width in pixels"


def sized(**sides):
    sides = {"width": 40, "height": 30, **sides}
    return f"<annotation><size><width>{sides['width']}</width><height>{sides['height']}</height></size>"


def boxed(xmin="1", name="cat", more=""):
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    return f"{sized()}<object><name>{name}</name>{more}{box}</object></annotation>"


BAD_XML = {
    "nothing": ("", "not well-formed XML"),
    "half": ("<annotation>", "not well-formed XML"),
    "binary": (b"\x00\xff\x00\xff", "not well-formed XML"),
    "two roots": ("<annotation/><annotation/>", "not well-formed XML"),
    "unknown encoding": ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not well-formed XML"),
    "encoding of several bytes": ('<?xml version="1.0" encoding="shift_jis"?><annotation/>', "not well-formed XML"),
    "wrong encoding": (
        '<?xml version="1.0" encoding="utf-8"?><annotation>\xff</annotation>'.encode("latin-1"),
        "not well",
    ),
    "nul": ("<annotation>\x00</annotation>", "not well-formed XML"),
    "html": ("<html><body/></html>", "its root is <html>, not <annotation>"),
    "tag of a megabyte": (f"<{'a' * 1_000_000}/>", "its root is <aaa"),
    "no size": ("<annotation/>", "size/width is missing"),
    "width zero": (sized(width=0) + "</annotation>", "size/width is '0'"),
    "negative height": (sized(height=-3) + "</annotation>", "size/height is '-3'"),
    "half a pixel": (sized(width="40.5") + "</annotation>", "size/width is '40.5'"),
    "huge width": (sized(width=10**9) + "</annotation>", "size/width is '1000000000'"),
    "a number of a million digits": (sized(width="9" * 1_000_000) + "</annotation>", "size/width is '999"),
    "width in words": (sized(width="many") + "</annotation>", "size/width is 'many'"),
    "digits of another script": (sized(width="٤٠") + "</annotation>", "size/width is"),
    "underscores": (sized(width="4_0") + "</annotation>", "size/width is '4_0'"),
    "not a number": (boxed("nan"), r"bndbox/xmin is 'nan'"),
    "infinity": (boxed("-inf"), r"bndbox/xmin is '-inf'"),
    "overflow": (boxed("1e99"), r"bndbox/xmin is '1e99'"),
    "far out": (boxed("1000001"), r"bndbox/xmin is '1000001'; write pixels, at most 1000000"),
    "long integer": (boxed("1" * 5000), r"bndbox/xmin is '111"),
    "empty corner": (boxed(""), r"bndbox/xmin is ''"),
    "hexadecimal": (boxed("0x10"), r"bndbox/xmin is '0x10'"),
    "no corner": (f"{sized()}<object><name>a</name><bndbox/></object></annotation>", "bndbox/xmin is missing"),
    "no name": (boxed(name=""), "its name is missing"),
    "name of several lines": (boxed(name="a\nb"), "its name is not printable or too long"),
    "long name": (boxed(name="a" * 201), "its name is not printable or too long"),
    "name that turns the text around": (boxed(name="a\u202eb"), "its name is not printable"),
    "difficult maybe": (boxed(more="<difficult>maybe</difficult>"), "difficult is 'maybe'; write 0 or 1"),
    "truncated two": (boxed(more="<truncated>2</truncated>"), "truncated is '2'; write 0 or 1"),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_annotations(voc, tmp_path, case, capsys):
    content, message = BAD_XML[case]
    voc.make(tmp_path, {"a": "", "b": voc.xml(voc.obj())})
    voc.write(tmp_path / "Annotations" / "a.xml", content)
    with pytest.raises(UserError, match=rf"Annotations/a\.xml: .*{message}") as error:
        VocDataset(tmp_path, "train")
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()
    # and by the command line: exit code 2, one line, no traceback, no file changed
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--voc-root", str(tmp_path), "--split", "train", "--detections", str(tmp_path)])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("nst-det: ")
    assert snapshot(tmp_path) == before
    assert "bad annotation" in check_data(tmp_path).by_kind()


def snapshot(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_gigabyte_of_xml_or_image_is_refused_by_its_size(tmp_path):
    for name, limit, read in (("a.xml", MAX_XML_BYTES, None), ("a.jpg", MAX_IMAGE_BYTES, read_image)):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(1 << 30)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"1073741824 bytes, but an \w+ may have"):
            read(path) if read else read_bytes(path, limit, "annotation")
        assert time.monotonic() - start < 1


def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    for name in ("pipe.jpg", "folder.jpg", "zero.jpg"):
        with pytest.raises(UserError, match=rf"{name}: not a regular file; put the image itself there"):
            read_image(tmp_path / name)
    os.symlink(tmp_path / "loop.jpg", tmp_path / "loop.jpg")
    with pytest.raises(UserError, match=r"loop\.jpg: image can't be read"):
        read_image(tmp_path / "loop.jpg")


HOSTILE_IDS = [
    "../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "..\\windows", "C:\\x", "a\x00b", "a\x1b[31mb",
    "a\u202eb", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("id_", HOSTILE_IDS)
def test_hostile_ids_are_refused_and_printed_without_their_control_characters(voc, tmp_path, id_):
    voc.make(tmp_path, {"a": voc.xml(voc.obj())})
    voc.write(tmp_path / "ImageSets" / "Main" / "train.txt", f"a\n{id_}\n")
    with pytest.raises(UserError, match=r"train\.txt: line 2: '") as error:
        VocDataset(tmp_path, "train")
    assert str(error.value).isprintable()
    assert [problem.kind for problem in check_data(tmp_path).problems] == ["bad list"]


def test_files_whose_names_are_not_utf8_are_listed_legibly(voc, tmp_path):
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
    with pytest.raises(UserError, match=r"class '\\udcff\\udcfe' has characters that can't be printed; name a folder"):
        read_image_folder(tmp_path)


# --- fuzzing: whatever comes in, nothing but UserError (or a clean result) comes out


def outcome(call, *words):
    """(result, None), or (None, what the UserError says)."""
    try:
        return call(*words), None
    except UserError as error:
        return None, str(error)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(data, draw_from):
    """Bytes with a few changed, cut and doubled."""
    data = bytearray(data)
    for _ in range(draw_from.draw(st.integers(1, 6))):
        at = draw_from.draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw_from.draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if how == "set" and data:
            data[at] = draw_from.draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + draw_from.draw(st.integers(1, 20))]
        elif how == "insert":
            data[at:at] = draw_from.draw(st.binary(max_size=8))
        else:
            del data[at:]
    return bytes(data)


@given(st.data())
@FUZZ
def test_fuzzed_annotations(data):
    annotation, problems = parse_annotation(mutated(boxed().encode(), data), "a")
    assert annotation is not None or problems
    assert all("\n" not in problem for problem in problems)


@given(st.binary(max_size=200))
@FUZZ
def test_random_bytes_as_annotation_image_and_list(tmp_path, data):
    annotation, problems = parse_annotation(data, "a")
    assert annotation is None
    assert problems
    for decode in (decode_image, image_size):
        with pytest.raises(UserError, match="^x: can't be decoded"):
            decode(data, "x")
    path = tmp_path / "list.txt"
    path.write_bytes(data)
    read, error = outcome(read_names, path)
    if read is None:
        assert "is not UTF-8" in error
    else:
        assert all(name_problem(name) is None for _, name in read[0])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("extension", [".jpg", ".png", ".bmp", ".webp"])
@given(data=st.data())
@FUZZ
def test_fuzzed_images(extension, data):
    import cv2
    import numpy as np

    pixels = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    image = mutated(cv2.imencode(extension, pixels)[1].tobytes(), data)
    decoded, error = outcome(decode_image, image, "x")
    if decoded is None:
        assert error.startswith("x: ")
    else:
        assert decoded.dtype == np.uint8
        assert decoded.ndim == 3
        assert decoded.shape[2] == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "image_id": st.just("a") | json_values,
        "category": st.just("cat") | json_values,
        "category_id": st.just(1) | json_values,
        "bbox": st.lists(st.floats(0, 100), min_size=4, max_size=4) | json_values,
        "score": st.floats(0, 1) | json_values,
    },
)


@given(st.lists(entries | json_values, max_size=4) | json_values)
@FUZZ
def test_fuzzed_detections(value):
    found, error = outcome(detections_from_json, value, ("a",), ("cat",), "f")
    assert error.startswith("f: ") if found is None else len(found) == len(value)


@given(st.text(max_size=60) | st.lists(st.sampled_from(["a", "0.5", "1", "nan", "1e999", "x", "\n"])).map(" ".join))
@FUZZ
def test_fuzzed_results_files(tmp_path, text):
    (tmp_path / "comp4_det_test_cat.txt").write_text(text, encoding="utf-8", newline="")
    found, error = outcome(read_comp4, tmp_path, ("a",), ("cat",), "test")
    assert "comp4_det_test_cat.txt: " in error if found is None else len(found) * 6 == len(text.split())


@given(st.text())
@settings(deadline=None)
def test_shown_text_is_printable_and_short(text):
    assert shown(text).isprintable()
    assert len(shown(text, 10)) <= 10 * 10 + 3


def test_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match=r"deep\.json: not valid JSON"):
        read_json(path)
    path.write_text(json.dumps([1]) + "x")
    with pytest.raises(UserError, match=r"deep\.json: not valid JSON"):
        read_json(path)
