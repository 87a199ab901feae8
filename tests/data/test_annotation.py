import numpy as np
import pytest

from nst_det.data.annotation import (
    MAX_XML_BYTES,
    NO_AREA,
    OUTSIDE,
    REACHES_OUTSIDE,
    VocAnnotation,
    VocObject,
    box_fault,
    parse_annotation,
    read_annotation,
    to_zero_based,
    usable_boxes,
    voc_xml,
)
from nst_det.errors import UserError


def parse(text):
    return parse_annotation(text.encode() if isinstance(text, str) else text, "a")


def test_objects_flags_and_boxes(voc):
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    annotation, problems = parse(voc.xml(voc.obj("cat", (1, 2, 30, 20)) + voc.obj(" dog ", (5, 5.5, 9, 9), flags)))
    assert problems == []
    assert annotation == VocAnnotation(
        "a", 40, 30, (VocObject("cat", (1, 2, 30, 20)), VocObject("dog", (5, 5.5, 9, 9), True, True))
    )
    np.testing.assert_array_equal(annotation.boxes, np.array([[0, 1, 30, 20], [4, 4.5, 9, 9]], np.float32))
    assert annotation.boxes.dtype == np.float32
    assert annotation.names == ("cat", "dog")
    np.testing.assert_array_equal(annotation.difficult, [False, True])


def test_boxes_of_parts_are_not_objects(voc):
    part = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    # the part stands before the object's own box
    annotation, problems = parse(voc.xml(voc.obj("person", (1, 1, 30, 30), part)))
    assert problems == []
    assert annotation.objects == (VocObject("person", (1, 1, 30, 30)),)
    annotation, (problem,) = parse(voc.xml(f"<object><name>person</name>{part}</object>"))
    assert annotation.objects == ()
    assert problem.startswith("object 1 (person): bndbox is missing")


def test_no_objects_give_empty_arrays(voc):
    annotation, problems = parse(voc.xml())
    assert problems == []
    assert annotation.boxes.shape == (0, 4)
    assert annotation.difficult.shape == (0,)


def test_zero_based_boxes_keep_width_as_number_of_pixels():
    boxes = to_zero_based([(1, 1, 1, 1), (3, 4, 10, 20)])
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], [[1, 1], [8, 17]])


@pytest.mark.parametrize("flag", ["0", "", " 0 ", "false", "Unspecified"])
def test_flags_that_mean_no(voc, flag):
    annotation, problems = parse(voc.xml(voc.obj(extra=f"<difficult>{flag}</difficult>")))
    assert problems == []
    assert not annotation.objects[0].difficult


def test_every_problem_of_a_file_is_collected_and_the_first_raised(voc, tmp_path):
    bad = (
        voc.obj("", (1, 1, 5, 5)) + voc.obj("cat", ("nan", 1, 5, "")) + voc.obj("cat", extra="<difficult>2</difficult>")
    )
    text = voc.xml(bad + voc.obj("dog"), width=0)
    annotation, problems = parse(text)
    assert annotation is None
    keys = ["size/width is '0'", "object 1: its name is missing", "object 2 (cat): bndbox/xmin is 'nan'"]
    keys += ["object 2 (cat): bndbox/ymax is ''", "object 3 (cat): difficult is '2'"]
    assert [problem.split(";")[0] for problem in problems] == keys
    with pytest.raises(UserError, match=r"x\.xml: size/width is '0'.* \(and 4 more; nst-det check-data"):
        read_annotation(voc.write(tmp_path / "x.xml", text))


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((1, 1, 40, 30), None),
        ((5, 5, 5, 9), NO_AREA),
        ((5, 9, 9, 5), NO_AREA),
        ((0, 1, 10, 10), REACHES_OUTSIDE),
        ((1, 1, 41, 30), REACHES_OUTSIDE),
        ((41, 1, 50, 10), OUTSIDE),
        ((-9, 1, 0, 10), OUTSIDE),
    ],
)
def test_faults_of_boxes(box, fault):
    assert box_fault(box, 40, 30) == fault


def test_usable_boxes_name_what_they_drop():
    objects = [VocObject("cat", b) for b in [(1, 1, 9, 9), (5, 5, 5, 5), (0, 0, 9, 9), (50, 1, 60, 9)]]
    keep, dropped = usable_boxes(VocAnnotation("img7", 40, 30, tuple(objects)))
    np.testing.assert_array_equal(keep, [True, False, True, False])
    assert dropped == [
        "img7: the box (5, 5, 5, 5) of object 2 (cat) has no area",
        "img7: the box (50, 1, 60, 9) of object 4 (cat) lies outside the image",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_encodings_are_read_as_declared(voc, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + voc.xml(voc.obj("Kätzchen"))
    annotation, problems = parse(text.encode(encoding))
    assert problems == []
    assert annotation.names == ("Kätzchen",)


def test_a_file_as_large_as_the_bound_is_read_and_one_byte_more_refused(voc, tmp_path):
    text = voc.xml(voc.obj())
    path = voc.write(tmp_path / "big.xml", text + " " * (MAX_XML_BYTES - len(text)))
    assert read_annotation(path).names == ("cat",)
    voc.write(path, text + " " * (MAX_XML_BYTES - len(text) + 1))
    with pytest.raises(UserError, match=r"big\.xml: 4194305 bytes"):
        read_annotation(path)


@pytest.mark.parametrize("folder", ["", "r&d"])
def test_what_is_written_is_read_back(folder):
    objects = VocObject("<a> & b", (1, 2.25, 1 + 1 / 3, 9), True), VocObject("cat", (1, 1, 2, 2), truncated=True)
    annotation = VocAnnotation("x", 12, 34, objects)
    text = voc_xml(annotation, "<x>.jpg", folder, scores=(0.1, 1 / 3), digits="")
    assert parse_annotation(text.encode(), "x") == (annotation, [])
    assert [f"<score>{score}</score>" in text for score in (0.1, 1 / 3)] == [True, True]
    assert "<score>" not in voc_xml(annotation, "x.jpg")


@pytest.mark.real_data
def test_a_real_annotation_with_parts(real_data):
    annotation = read_annotation(real_data / "voc2007_golden_small" / "VOC2007" / "Annotations" / "000001.xml")
    assert (annotation.width, annotation.height) == (353, 500)
    assert annotation.objects == (
        VocObject("dog", (48, 240, 195, 371), False, True),
        VocObject("person", (8, 12, 352, 498), False, True),
    )
