import numpy as np
import pytest

from nst_det.data.annotation import (
    MAX_XML_BYTES,
    NO_AREA,
    OUTSIDE,
    REACHES_OUTSIDE,
    SWAPPED,
    VocAnnotation,
    VocObject,
    parse_annotation,
    read_annotation,
    usable_boxes,
    voc_xml,
)
from nst_det.errors import UserError
from tests.helpers.voc import obj, write, xml


def parse(text):
    return parse_annotation(text.encode() if isinstance(text, str) else text, "a")


def test_objects_flags_and_boxes():
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    annotation, problems = parse(xml(obj("cat", (1, 2, 30, 20)) + obj(" dog ", (5, 5.5, 9, 9), flags)))
    assert problems == []
    objects = (VocObject("cat", (1, 2, 30, 20)), VocObject("dog", (5, 5.5, 9, 9), True, True))
    assert annotation == VocAnnotation("a", 40, 30, objects)
    # from 1 and inclusive to from 0 and continuous: the width stays the number of pixels
    np.testing.assert_array_equal(annotation.boxes, np.array([[0, 1, 30, 20], [4, 4.5, 9, 9]], np.float32))
    assert annotation.boxes.dtype == np.float32
    assert annotation.names == ("cat", "dog")
    np.testing.assert_array_equal(annotation.difficult, [False, True])
    nothing, problems = parse(xml())
    assert (problems, nothing.boxes.shape, nothing.difficult.shape) == ([], (0, 4), (0,))


def test_boxes_of_parts_are_not_objects():
    part = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    # the part comes before the object's own box
    annotation, problems = parse(xml(obj("person", (1, 1, 30, 30), part)))
    assert problems == []
    assert annotation.objects == (VocObject("person", (1, 1, 30, 30)),)
    annotation, (problem,) = parse(xml(f"<object><name>person</name>{part}</object>"))
    assert annotation.objects == ()
    assert "object 1 (person): bndbox" in problem


@pytest.mark.parametrize("flag", ["0", "", " 0 ", "false", "Unspecified"])
def test_flags_that_mean_no(flag):
    annotation, problems = parse(xml(obj(extra=f"<difficult>{flag}</difficult>")))
    assert problems == []
    assert not annotation.objects[0].difficult


def test_every_problem_is_collected_and_the_first_raised(tmp_path):
    bad = obj("", (1, 1, 5, 5)) + obj("cat", ("nan", 1, 5, "")) + obj("cat", extra="<difficult>2</difficult>")
    text = xml(bad + obj("dog"), width=-1)
    annotation, problems = parse(text)
    assert annotation is None
    keys = ("size/width", "object 1: its name", "object 2 (cat): bndbox/xmin", "object 2 (cat): bndbox/ymax")
    for problem, key in zip(problems, (*keys, "object 3 (cat): difficult"), strict=True):
        assert problem.startswith(key)
    with pytest.raises(UserError, match=r"x\.xml: size/width.*4 more"):
        read_annotation(write(tmp_path / "x.xml", text), "x")


BOXES = [
    ((1, 1, 40, 30), None),
    ((5, 5, 5, 9), NO_AREA),
    ((5, 9, 9, 5), SWAPPED),
    ((0, 1, 10, 10), REACHES_OUTSIDE),
    ((1, 1, 41, 30), REACHES_OUTSIDE),
    ((41, 1, 50, 10), OUTSIDE),
    ((-9, 1, 0, 10), OUTSIDE),
]


def test_faults_of_boxes():
    annotation = VocAnnotation("img7", 40, 30, tuple(VocObject("cat", box) for box, _ in BOXES))
    for index, (_, fault) in enumerate(BOXES):
        assert (annotation.box_fault(index) or (None,))[0] == fault
    keep, dropped = usable_boxes(annotation)
    assert keep.tolist() == [fault in (None, REACHES_OUTSIDE) for _, fault in BOXES]
    assert dropped[0].startswith("img7: the box (5, 5, 5, 9) of object 2 (cat) ")
    assert len(dropped) == 4


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_encodings_are_read_as_declared(encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + xml(obj("Kätzchen"))
    annotation, problems = parse(text.encode(encoding))
    assert problems == []
    assert annotation.names == ("Kätzchen",)


def test_the_largest_file(tmp_path):
    path = write(tmp_path / "big.xml", xml(obj()).ljust(MAX_XML_BYTES))
    assert read_annotation(path, path.stem).names == ("cat",)
    write(path, xml(obj()).ljust(MAX_XML_BYTES + 1))
    with pytest.raises(UserError, match=rf"big\.xml: .*{MAX_XML_BYTES}"):
        read_annotation(path, path.stem)


@pytest.mark.parametrize("folder", ["", "r&d"])
def test_what_is_written_is_read_back(folder):
    objects = VocObject("<a> & b", (1, 2.25, 1 + 1 / 3, 9), True), VocObject("cat", (1, 1, 2, 2), truncated=True)
    annotation = VocAnnotation("x", 12, 34, objects)
    text = voc_xml(annotation, "<x>.jpg", folder, scores=(0.1, 1 / 3), digits="")
    assert parse(text)[0].objects == objects
    assert parse_annotation(text.encode(), "x") == (annotation, [])
    assert all(f"<score>{score}</score>" in text for score in (0.1, 1 / 3))
    assert "<score>" not in voc_xml(annotation, "x.jpg")


@pytest.mark.real_data
def test_a_real_annotation_with_parts(real_data):
    annotation = read_annotation(
        real_data / "voc2007_golden_small" / "VOC2007" / "Annotations" / "000001.xml", "000001"
    )
    assert (annotation.width, annotation.height) == (353, 500)
    assert annotation.objects == (
        VocObject("dog", (48, 240, 195, 371), False, True),
        VocObject("person", (8, 12, 352, 498), False, True),
    )
