import os
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from nst_det.data.check import check_data
from nst_det.data.voc import VOC_CLASSES, VocDataset, find_voc_root, read_split, split_names
from nst_det.errors import UserError
from tests.helpers.voc import jpeg, make, obj, write, write_list, xml


@pytest.fixture
def root(tmp_path):
    both = obj("wbc", (1, 1, 9, 9)) + obj("rbc", (3, 3, 20, 20))
    return make(tmp_path / "cells", {"000002": xml(both), "000001": xml(obj("rbc")), "000003": xml()})


def test_the_files_are_looked_at_once_for_all_lists_and_lines(root, monkeypatch):
    lists = root / "ImageSets" / "Main"
    for name in ("rbc_train", "wbc_train"):
        (lists / f"{name}.txt").write_text("000002 1\n000001 -1\n")
    (lists / "exam.txt").write_text("000002.jpg\n000001.jpg\n000003.jpg\n")
    looked = []
    monkeypatch.setattr(
        "nst_det.data.voc.known_ids", lambda root: looked.append(root) or {"000001", "000002", "000003"}
    )
    assert split_names(root) == ["exam", "train"]
    assert len(looked) == 1
    assert read_split(root, "exam") == ("000002", "000001", "000003")
    assert len(looked) == 2


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


def test_the_twenty_classes_keep_the_official_order(tmp_path):
    data = VocDataset(make(tmp_path, {"a": xml(obj("tvmonitor") + obj("cat"))}), "train")
    assert data.classes == VOC_CLASSES
    assert len(set(VOC_CLASSES)) == 20
    np.testing.assert_array_equal(data.labels(data.annotation("a")), [19, 7])


def test_given_classes_decide_the_labels(root):
    data = VocDataset(root, "train", classes=["wbc", "rbc"])
    np.testing.assert_array_equal(data.labels(data.annotation("000002")), [0, 1])
    data = VocDataset(root, "train", classes=["wbc"])
    with pytest.raises(UserError, match=r"000001\.xml: object name 'rbc'"):
        data.labels(data.annotation("000001"))
    with pytest.raises(UserError, match="classes: wbc, wbc"):
        VocDataset(root, "train", classes=["wbc", "wbc"])


def test_roots_that_are_found(tmp_path):
    for name in ("plain", "kit/VOC2007", "above/VOCdevkit/VOC2012"):
        made = make(tmp_path / name, {"a": xml(obj())}).resolve()
        top = tmp_path / name.split("/")[0]
        assert find_voc_root(top) == VocDataset(top, "train").root == made
    make(tmp_path / "kit" / "VOC2012", {"a": xml(obj())})
    (tmp_path / "empty").mkdir()
    for name, key in (("kit", "VOC2007, .*VOC2012"), ("empty", "needs Annotations"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=f"{name}: .*{key}"):
            find_voc_root(tmp_path / name)


def test_a_missing_list_names_those_there_are(root):
    write_list(root, "cat_train", ["000001 -1", "000002  1"])
    assert split_names(root) == ["train"]
    with pytest.raises(UserError, match=r"test\.txt: .*there are cat_train, train"):
        VocDataset(root, "test")
    with pytest.raises(UserError, match="split '../../train'"):
        VocDataset(root, "../../train")


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_an_id(root):
    write(root / "ImageSets" / "Main" / "dos.txt", "\ufeff000001\r\n000002\r\n")
    assert VocDataset(root, "dos").ids == ("000001", "000002")


# lists as tools write them: their lines, and the ids they mean; None where it is a list of one class
LISTS = [
    ("all", ['"shelf 0"', '"shelf 1"'], ["shelf 0", "shelf 1"]),
    ("all", ["'shelf 0'"], ["shelf 0"]),
    ("all", ["shelf 0", "shelf 1"], ["shelf 0", "shelf 1"]),
    ("my_test", ["shelf 0", "shelf 1"], ["shelf 0", "shelf 1"]),
    ("all", ["a.jpg", "tür.JPG"], ["a", "tür"]),
    ("all", [unicodedata.normalize("NFD", "tür")], ["tür"]),
    ("all", ["cam1/b", "cam1/c.jpg", "cam1\\d"], ["cam1_b", "cam1_c", "cam1_d"]),
    ("all", ["gone.jpg"], ["gone"]),
    ("cat_train", ["a.jpg 1", "tür.jpg 1"], None),
    ("cat_val", ["a 1", "shelf 0  0"], None),
    ("cat_trainval", [], None),
    ("train_cat", ["a  1", "tür -1"], None),
]


@pytest.mark.parametrize(("name", "lines", "ids"), LISTS, ids=range(len(LISTS)))
def test_lists_as_tools_write_them(tmp_path, name, lines, ids):
    images = ["shelf 0", "shelf 1", "a", "tür", "cam1/b", "cam1/c", "cam1/d"]
    for seed, image in enumerate(images):
        # a Mac's form of the names, as a Mac writes files
        image = unicodedata.normalize("NFD", image)
        write(tmp_path / "Annotations" / f"{image}.xml", xml(obj()))
        write(tmp_path / "JPEGImages" / f"{image}.jpg", jpeg(seed=seed))
    write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", "\n".join(lines))
    assert split_names(tmp_path) == ([] if ids is None else [name])
    if ids is None:
        with pytest.raises(UserError, match=rf"{name}\.txt: a list of one class"):
            VocDataset(tmp_path, name)
        return
    data = VocDataset(tmp_path, name, ["cat"])
    assert list(data.ids) == ids
    if ids != ["gone"]:
        assert [(item.id, item.names) for item in data.annotations()] == [(id_, ("cat",)) for id_ in ids]
        places = [images.index(id_.replace("cam1_", "cam1/")) for id_ in ids]
        assert [data.image_path(id_).read_bytes() for id_ in ids] == [jpeg(seed=place) for place in places]


@pytest.mark.parametrize("extension", [".bmp", ".webp", ".tif", ".TIFF", ".png"])
def test_formats_of_images(root, extension):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    (root / "JPEGImages" / "000001.jpg").unlink()
    options = {"lossless": True} if extension == ".webp" else {}
    Image.fromarray(pixels).save(root / "JPEGImages" / f"000001{extension}", **options)
    np.testing.assert_array_equal(VocDataset(root, "train").image("000001"), pixels)
    assert check_data(root).problems == []


def test_image_extensions(root):
    images = root / "JPEGImages"
    (images / "000001.jpg").rename(images / "000001.JPEG")
    (images / "000002.jpg").rename(images / "000002.png")
    (images / "000003.jpg").rename(images / "000003.gif")
    data = VocDataset(root, "train")
    assert [data.image_path(id_).name for id_ in ("000001", "000002")] == ["000001.JPEG", "000002.png"]
    with pytest.raises(UserError, match=r"JPEGImages/000003: .*train\.txt"):
        data.image_path("000003")


def test_a_missing_annotation_and_a_wrong_size_are_named(root):
    write(root / "Annotations" / "000001.xml", xml(obj("rbc"), width=41))
    (root / "Annotations" / "000003.xml").unlink()
    data = VocDataset(root, "train", classes=["rbc", "wbc"])
    with pytest.raises(UserError, match=r"000001\.jpg: .*40x30.*41x30"):
        data.image("000001")
    with pytest.raises(UserError, match=r"000003\.xml: no such annotation"):
        data.annotation("000003")


def test_no_link_is_followed_out_of_the_root(root, tmp_path):
    secret = write(tmp_path / "secret.xml", xml(obj("rbc")))
    for name in ("Annotations/000001.xml", "JPEGImages/000001.jpg"):
        (root / name).unlink()
        os.symlink(secret, root / name)
    data = VocDataset(root, "train", classes=["rbc", "wbc"])
    for read in (data.annotation, data.image_path):
        with pytest.raises(UserError, match="000001.* leads outside"):
            read("000001")
    # a folder that is a link may lead elsewhere inside the root alone
    (root / "JPEGImages").rename(root / "elsewhere")
    os.symlink(root / "elsewhere", root / "JPEGImages")
    assert VocDataset(root, "train", ["rbc", "wbc"]).image("000002").shape == (30, 40, 3)
    (root / "elsewhere").rename(tmp_path / "outside")
    (root / "JPEGImages").unlink()
    os.symlink(tmp_path / "outside", root / "JPEGImages")
    with pytest.raises(UserError, match="JPEGImages: leads outside"):
        VocDataset(root, "train", ["rbc", "wbc"]).image_path("000002")


def test_the_fingerprint_sees_ids_annotations_classes_and_image_sizes(root):
    before = VocDataset(root, "train").fingerprint()
    assert before == VocDataset(str(root), "train").fingerprint()
    seen = {before, VocDataset(root, "train", classes=["wbc", "rbc"]).fingerprint()}
    write(root / "Annotations" / "000003.xml", xml(obj("rbc", (1, 1, 2, 2))))
    seen.add(VocDataset(root, "train").fingerprint())
    write(root / "JPEGImages" / "000003.jpg", jpeg(seed=1) + b"!")
    seen.add(VocDataset(root, "train").fingerprint())
    write_list(root, "train", ["000001", "000002", "000003"])
    seen.add(VocDataset(root, "train").fingerprint())
    assert len(seen) == 5


@pytest.mark.real_data
def test_real_voc_2007(real_data):
    start = time.monotonic()
    data = VocDataset(real_data / "voc2007_test_golden", "test")
    assert time.monotonic() - start < 10
    assert data.classes == VOC_CLASSES
    annotations = data.annotations()
    assert len(annotations) == 4952
    assert sum(len(a.objects) for a in annotations) == 14976
    assert sum(int(a.difficult.sum()) for a in annotations) == 2944
    data = VocDataset(real_data / "VOC2007", "val")
    for id_ in data.ids[:20]:
        assert data.image(id_).dtype == np.uint8


@pytest.mark.parametrize("text", [xml(obj(), 0, 0), xml(obj(), "", 30), f"<annotation>{obj()}</annotation>"])
def test_a_size_that_is_not_said_is_the_images_own(root, text):
    write(root / "Annotations" / "000001.xml", text)
    write(root / "JPEGImages" / "000001.jpg", jpeg(52, 34))
    data = VocDataset(root, "train")
    assert (data.annotation("000001").width, data.annotation("000001").height) == (52, 34)
    assert data.image("000001").shape == (34, 52, 3)
