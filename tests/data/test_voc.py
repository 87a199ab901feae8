import os
import time

import numpy as np
import pytest

from nst_det.data.voc import VOC_CLASSES, VocDataset, find_voc_root, split_names
from nst_det.errors import UserError


@pytest.fixture
def root(voc, tmp_path):
    annotations = {
        "000002": voc.xml(voc.obj("wbc", (1, 1, 9, 9)) + voc.obj("rbc", (3, 3, 20, 20))),
        "000001": voc.xml(voc.obj("rbc")),
        "000003": voc.xml(),
    }
    return voc.make(tmp_path / "cells", annotations)


def test_ids_in_list_order_classes_sorted_labels(root):
    data = VocDataset(root, "train")
    assert data.ids == ("000002", "000001", "000003")
    assert len(data) == 3
    assert data.classes == ("rbc", "wbc")
    np.testing.assert_array_equal(data.labels(data.annotation("000002")), [1, 0])
    assert data.labels(data.annotation("000003")).shape == (0,)
    assert [a.id for a in data.annotations()] == list(data.ids)
    assert data.image_path("000001") == root.resolve() / "JPEGImages" / "000001.jpg"
    assert data.image("000001").shape == (30, 40, 3)


def test_the_twenty_classes_keep_the_official_order(voc, tmp_path):
    voc.make(tmp_path, {"a": voc.xml(voc.obj("tvmonitor") + voc.obj("cat"))})
    data = VocDataset(tmp_path, "train")
    assert data.classes == VOC_CLASSES
    assert len(set(VOC_CLASSES)) == 20
    np.testing.assert_array_equal(data.labels(data.annotation("a")), [19, 7])


def test_given_classes_decide_the_labels_and_an_unknown_name_is_an_error(root):
    data = VocDataset(root, "train", classes=["wbc", "rbc"])
    np.testing.assert_array_equal(data.labels(data.annotation("000002")), [0, 1])
    data = VocDataset(root, "train", classes=["wbc"])
    with pytest.raises(UserError, match=r"000001\.xml: object name 'rbc' is not among the classes wbc; add it"):
        data.labels(data.annotation("000001"))
    with pytest.raises(UserError, match="give each name once"):
        VocDataset(root, "train", classes=["wbc", "wbc"])


def test_roots_that_are_found(voc, tmp_path):
    for name in ("plain", "kit/VOC2007", "above/VOCdevkit/VOC2012"):
        voc.make(tmp_path / name, {"a": voc.xml(voc.obj())})
        top = tmp_path / name.split("/")[0]
        assert find_voc_root(top) == (tmp_path / name).resolve()
        assert VocDataset(top, "train").root == (tmp_path / name).resolve()


def test_several_or_no_roots_are_errors(voc, tmp_path):
    for name in ("VOC2007", "VOC2012"):
        voc.make(tmp_path / name, {"a": voc.xml(voc.obj())})
    with pytest.raises(UserError, match=r"several VOC folders inside; name one of .*VOC2007, .*VOC2012"):
        find_voc_root(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not a VOC folder; it needs Annotations"):
        find_voc_root(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_voc_root(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no image is listed"),
        ("\n \n", "no image is listed"),
        ("a\nb\na\n", "line 3: a stands in line 1 too"),
        ("a\n../x\n", r"line 2: '\.\./x' could lead to another folder"),
        ("sub/a\n", "line 1: 'sub/a' could lead to another folder"),
        ("..\n", r"line 1: '\.\.' could lead to another folder"),
        ("a\x00b\n", r"line 1: 'a\\x00b' has characters that can't be printed"),
        ("a 1\nb -1\n", "a list of one class"),
        ("x" * 201 + "\n", "is longer than 200 bytes"),
        (b"a\n\xff\xfe\n", "line 2 is not UTF-8; save the list as UTF-8 text"),
    ],
)
def test_bad_lists(voc, root, content, message):
    voc.write(root / "ImageSets" / "Main" / "bad.txt", content)
    with pytest.raises(UserError, match=message) as error:
        VocDataset(root, "bad")
    assert "bad.txt" in str(error.value)


def test_a_missing_list_names_those_there_are(root):
    with pytest.raises(UserError, match=r"test\.txt: no such list; there are train"):
        VocDataset(root, "test")
    with pytest.raises(UserError, match="could lead to another folder"):
        VocDataset(root, "../../train")


def test_lists_of_one_class_are_no_splits(voc, root):
    voc.write(root / "ImageSets" / "Main" / "cat_train.txt", "000001 -1\n000002  1\n")
    assert split_names(root) == ["train"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_an_id(voc, root):
    voc.write(root / "ImageSets" / "Main" / "dos.txt", "\ufeff000001\r\n000002\r\n")
    assert VocDataset(root, "dos").ids == ("000001", "000002")


def test_image_extensions(voc, root):
    images = root / "JPEGImages"
    (images / "000001.jpg").rename(images / "000001.JPEG")
    (images / "000002.jpg").rename(images / "000002.png")
    data = VocDataset(root, "train")
    assert data.image_path("000001").name == "000001.JPEG"
    assert data.image_path("000002").name == "000002.png"
    (images / "000003.jpg").rename(images / "000003.gif")
    with pytest.raises(UserError, match=r"000003: no image with this name and \.jpg or \.jpeg or \.png; add it"):
        VocDataset(root, "train").image_path("000003")


def test_a_missing_annotation_and_a_wrong_size_are_named(voc, root):
    voc.write(root / "Annotations" / "000001.xml", voc.xml(voc.obj("rbc"), width=41))
    (root / "Annotations" / "000003.xml").unlink()
    data = VocDataset(root, "train", classes=["rbc", "wbc"])
    with pytest.raises(UserError, match=r"000001\.jpg: the image is 40x30, but its annotation says 41x30; correct"):
        data.image("000001")
    with pytest.raises(UserError, match=r"000003\.xml: no such annotation; add the file or take it out of the list"):
        data.annotation("000003")


def test_no_link_is_followed_out_of_the_root(voc, root, tmp_path):
    secret = voc.write(tmp_path / "secret.xml", voc.xml(voc.obj("rbc")))
    for name in ("Annotations/000001.xml", "JPEGImages/000001.jpg"):
        (root / name).unlink()
        os.symlink(secret, root / name)
    data = VocDataset(root, "train", classes=["rbc", "wbc"])
    for read in (data.annotation, data.image_path):
        with pytest.raises(UserError, match="leads outside .*; put the file itself there, not a link"):
            read("000001")


def test_a_folder_that_is_a_link_out_of_the_root_is_refused_and_one_inside_it_is_not(voc, root, tmp_path):
    (root / "JPEGImages").rename(root / "elsewhere")
    os.symlink(root / "elsewhere", root / "JPEGImages")
    assert VocDataset(root, "train").image("000001").shape == (30, 40, 3)
    (root / "elsewhere").rename(tmp_path / "outside")
    (root / "JPEGImages").unlink()
    os.symlink(tmp_path / "outside", root / "JPEGImages")
    with pytest.raises(UserError, match="leads outside"):
        VocDataset(root, "train").image_path("000001")


def test_the_fingerprint_sees_ids_annotations_classes_and_image_sizes(voc, root):
    before = VocDataset(root, "train").fingerprint()
    assert before == VocDataset(str(root), "train").fingerprint()
    seen = {before, VocDataset(root, "train", classes=["wbc", "rbc"]).fingerprint()}
    voc.write(root / "Annotations" / "000003.xml", voc.xml(voc.obj("rbc", (1, 1, 2, 2))))
    seen.add(VocDataset(root, "train").fingerprint())
    voc.write(root / "JPEGImages" / "000003.jpg", voc.jpeg(seed=1) + b"!")
    seen.add(VocDataset(root, "train").fingerprint())
    voc.write(root / "ImageSets" / "Main" / "train.txt", "000001\n000002\n000003\n")
    seen.add(VocDataset(root, "train").fingerprint())
    assert len(seen) == 5


@pytest.mark.real_data
def test_all_of_voc_2007_test_is_read_in_seconds(real_data):
    start = time.monotonic()
    data = VocDataset(real_data / "voc2007_test_golden", "test")
    assert time.monotonic() - start < 10
    assert data.classes == VOC_CLASSES
    annotations = data.annotations()
    assert len(annotations) == 4952
    assert sum(len(a.objects) for a in annotations) == 14976
    assert sum(int(a.difficult.sum()) for a in annotations) == 2944


@pytest.mark.real_data
def test_real_images_have_the_size_that_the_annotation_says(real_data):
    data = VocDataset(real_data / "VOC2007", "val")
    for id_ in data.ids[:20]:
        assert data.image(id_).dtype == np.uint8
