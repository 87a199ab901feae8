"""The same images and boxes in the layouts that tools write."""

import os
import re

import numpy as np
import pytest

from nst_det.data.check import check_data
from nst_det.data.layouts import convert_layout, find_layout
from nst_det.data.voc import VocDataset, read_split, split_names
from tests.helpers.layouts import LAYOUTS, data_yaml
from tests.helpers.voc import jpeg, obj, write, xml

NAMES = ("dog", "cat", "tür")  # as in LAYOUTS
# 40 x 30 pixels; boxes counted from 1, both ends inside
BOXES = {
    "a": [("cat", (1, 1, 40, 30))],
    "b": [("dog", (5, 6, 20, 26)), ("tür", (21, 2, 30, 13))],
    "c": [],
    "d": [("cat", (2, 3, 4, 5))],
    "e": [("cat", (11, 11, 14, 28)), ("dog", (31, 1, 40, 10))],
}
SPLIT = {"a": "train", "b": "train", "c": "train", "d": "valid", "e": "test"}


def image(id_):
    return jpeg(seed=ord(id_))


def xml_of(id_):
    return xml("".join(obj(*item) for item in BOXES[id_]), extra=f"<filename>{id_}.jpg</filename>")


def yolo_of(id_, polygon=False):
    lines = []
    for name, (x0, y0, x1, y1) in BOXES[id_]:
        left, top, right, bottom = (x0 - 1) / 40, (y0 - 1) / 30, x1 / 40, y1 / 30
        middle = (left + right) / 2, (top + bottom) / 2
        numbers = (*middle, right - left, bottom - top)
        if polygon:
            # a diamond and a point inside
            numbers = (left, middle[1], middle[0], top, right, middle[1], middle[0], bottom, *middle)
        lines.append(" ".join([str(NAMES.index(name)), *(f"{number:.6f}" for number in numbers)]))
    return "\n".join(lines)


def build(root, name, **of):
    files, others, _ = LAYOUTS[name]
    for id_ in BOXES:
        for file in files.format(id_, SPLIT[id_]).split():
            content = {"jpg": image, "png": image, "xml": xml_of, "txt": yolo_of} | of
            write(root / file, content[file.rpartition(".")[2]](id_))
    for file, content in others.items():
        write(root / file, content)
    return root


def opened(root, tmp_path):
    """The VOC folder that training reads."""
    layout = find_layout(root)
    return layout.root if layout.is_voc else convert_layout(layout, tmp_path / "made")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_data(tmp_path, name):
    root = build(tmp_path / "data", name)
    report = check_data(root)
    assert report.problems == []
    assert {key: report.counts[key] for key in ("images", "annotations", "objects", "classes")} == {
        "images": 5, "annotations": 5, "objects": 6, "classes": 3,
    }  # fmt: skip
    before = sorted(root.rglob("*"))
    voc = opened(root, tmp_path)
    assert sorted(root.rglob("*")) == before
    listed = LAYOUTS[name][2]
    assert split_names(voc) == (["train"] if listed is None else ["test", "train", "val"] if listed else [])
    if listed:
        assert [read_split(voc, split) for split in ("train", "val", "test")] == [("a", "b", "c"), ("d",), ("e",)]
    write(voc / "ImageSets" / "Main" / "all.txt", "\n".join(BOXES))
    data = VocDataset(voc, "all")
    for id_, annotation in zip(BOXES, data.annotations()):
        assert list(annotation.names) == [label for label, _ in BOXES[id_]]
        wanted = np.array([box for _, box in BOXES[id_]]).reshape(-1, 4) - (1, 1, 0, 0)
        np.testing.assert_allclose(annotation.boxes, wanted, atol=1e-3)
        assert data.image_path(id_).read_bytes() == image(id_)
        assert data.image(id_).shape == (30, 40, 3)


@pytest.mark.parametrize("name", ["YOLO above", "YOLO of labelImg"])
def test_polygons_become_the_box_around_them(tmp_path, name):
    data = opened(build(tmp_path / "data", name, txt=lambda id_: yolo_of(id_, polygon=True)), tmp_path)
    write(data / "ImageSets" / "Main" / "all.txt", "\n".join(BOXES))
    found = [item.box for annotation in VocDataset(data, "all").annotations() for item in annotation.objects]
    np.testing.assert_allclose(found, [box for items in BOXES.values() for _, box in items], atol=1e-3)


def test_of_key_points_the_box_is_taken(tmp_path):
    def text(id_):
        return "\n".join(f"{line} 0.5 0.5 2 0.1 0.9 0" for line in yolo_of(id_).splitlines())

    root = build(tmp_path / "data", "YOLO below", txt=text)
    assert check_data(root).by_kind() == {"bad annotation": 6}
    write(root / "data.yaml", data_yaml(more="kpt_shape: [2, 3]\n"))
    assert check_data(root).problems == []


def test_an_image_without_a_label_has_no_objects(tmp_path):
    root = build(tmp_path / "data", "YOLO above")
    (root / "train/labels/c.txt").unlink()
    assert check_data(root).problems == []
    voc = opened(root, tmp_path)
    assert read_split(voc, "train") == ("a", "b", "c")
    assert VocDataset(voc, "train").annotation("c").objects == ()


def test_names_that_are_in_two_folders(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for camera in ("", "cam1/", "cam2/"):
            write(root / f"{split}/{camera}a.jpg", jpeg(seed=len(split + camera)))
            write(root / f"{split}/{camera}a.xml", xml_of("a"))
    voc = opened(root, tmp_path)
    assert read_split(voc, "test") == ("test_a", "test_cam1_a", "test_cam2_a")
    assert read_split(voc, "train") == ("train_a", "train_cam1_a", "train_cam2_a")


def test_lists_beside_the_folders_name_images_by_any_end_of_their_paths(tmp_path):
    for place in ("cam1/a", "cam2/a", "b"):
        write(tmp_path / f"images/{place}.jpg", jpeg())
        write(tmp_path / f"labels/{place}.txt", yolo_of("a"))
    write(tmp_path / "data.yaml", data_yaml())
    write(tmp_path / "train.txt", "./images/cam1/a.jpg\n'images/b.jpg'\nimages/gone.jpg\n")
    write(tmp_path / "test.txt", "C:\\my.set\\images\\cam2\\a.jpg\n")
    assert find_layout(tmp_path).splits == {"train": ("cam1_a", "b"), "test": ("cam2_a",)}


# what replaces files of a layout, and kind and file of what check-data says
TWIN = [("same image in two lists", "images/val/a.jpg")]
FAULTS = [
    ("flat", {"b.xml": "<annotation>"}, [("bad annotation", "b.xml")]),
    ("flat", {"f.jpg": jpeg()}, [("image without annotation", "f.jpg")]),
    ("flat", {"g.xml": xml()}, [("annotation without image", "g.xml")]),
    ("flat", {"a.png": jpeg()}, [("repeated id", "a.png")]),
    ("Roboflow", {"train/a.jpg": jpeg()[:-300]}, [("unreadable image", "train/a.jpg")]),
    ("Roboflow", {"test/f.jpg": image("a"), "test/f.xml": xml()}, [("same image in two lists", "test/f.jpg")]),
    ("Roboflow", {"train/a.xml": xml(width=41)}, [("wrong size", "train/a.xml")]),
    ("lower-case", {"annotations/a.xml": xml(obj(box=(9, 1, 5, 9)))}, [("swapped corners", "annotations/a.xml")]),
    *(
        ("YOLO below", {"labels/train/a.txt": text}, [("bad annotation", "labels/train/a.txt")])
        for text in (
            "3 .5 .5 .5 .5".replace(" .", " 0."),  # no such class
            "-1 0.5 0.5 0.5 0.5",
            "0.5 0.5 0.5 0.5 0.5",
            "cat 0.5 0.5 0.5 0.5",
            "0 20 15 10 10",  # pixels
            "0 0.5 0.5 0.5",
            "0 0.5 0.5 0.5 0.5 0.93",  # a prediction
            "0 0.1 0.1 0.5 0.5 nan 0.5",
            "0 0.5 0.5 0.5 -0.5",
        )
    ),
    ("YOLO below", {"labels/train/a.txt": "0 0.95 0.5 0.5 0.5"}, [("box reaches outside", "labels/train/a.txt")]),
    ("YOLO below", {"labels/train/a.txt": "0 0.5 0.5 0 0.5"}, [("box with no area", "labels/train/a.txt")]),
    ("YOLO below", {"labels/train/a.txt": "0 0.5 0.5 1.000001 1.0002"}, []),
    ("YOLO below", {"labels/train/z.txt": "0 0.5 0.5 0.5 0.5"}, [("annotation without image", "labels/train/z.txt")]),
    ("YOLO below", {"labels/val/a.txt": "", "images/val/a.jpg": image("a")}, TWIN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "wanted"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_named_by_the_users_own_file(tmp_path, name, files, wanted):
    root = build(tmp_path, name)
    for file, content in files.items():
        write(root / file, content)
    assert [(problem.kind, problem.file) for problem in check_data(root).problems] == wanted


# files beside images/a.jpg, and words of the one line
OTHER_FORMATS = [
    ({"annotations/instances.json": '{"images": [{"file_name": "a.jpg"}]}'}, "instances.json.*--coco"),
    ({"_annotations.coco.json": '{"categories": [], "annotations": []}'}, "--coco"),
    ({"images/a.json": '{"shapes": [{"points": []}]}'}, r"images/a\.json.*LabelMe"),
    ({"all.json": '[{"image": "a.jpg", "annotations": [{"coordinates": {}}]}]'}, "CreateML"),
    ({"annotations.xml": "<annotations><version>1.1</version></annotations>"}, r"annotations\.xml.*CVAT"),
    ({"images/_annotations.csv": "filename,width"}, "table"),
    ({"labels/a.txt": "0 0.5 0.5 0.5 0.5"}, "data.yaml"),
    ({"labels/a.txt": "", "data.yaml": "names: [a, a]"}, r"data\.yaml.*names"),
    ({"labels/a.txt": "", "data.yaml": "names: {1: a}"}, r"data\.yaml.*names"),
    ({"labels/a.txt": "", "data.yaml": "names: ["}, r"data\.yaml.*YAML"),
]


@pytest.mark.parametrize(("files", "named"), OTHER_FORMATS, ids=range(len(OTHER_FORMATS)))
def test_what_is_not_read_is_named(tmp_path, cli, capsys, files, named):
    write(tmp_path / "data/images/a.jpg", image("a"))
    for file, content in files.items():
        write(tmp_path / "data" / file, content)
    for words in (("check-data", tmp_path / "data"), ("init", tmp_path / "mine", "--voc", tmp_path / "data")):
        assert cli(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(named, line)
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, cli, capsys, monkeypatch):
    (build(tmp_path / "data", "flat") / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    # root, who may run this, can list every folder
    monkeypatch.setattr("os.scandir", refuse)
    for words in (("check-data", tmp_path / "data"), ("init", tmp_path / "mine", "--voc", tmp_path / "data")):
        assert cli(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search("lost.found: can't be listed.*permissions", line)


def test_several_in_a_folders_name_means_nothing(tmp_path):
    assert find_layout(build(tmp_path / "several_cams", "YOLO of labelImg")).classes


def test_a_folder_of_all_but_the_test_images_is_a_list(tmp_path):
    for split in ("trainval", "test"):
        write(tmp_path / f"images/{split}/{split}.jpg", jpeg())
        write(tmp_path / f"annotations/{split}/{split}.xml", xml())
    assert find_layout(tmp_path).splits == {"trainval": ("trainval",), "test": ("test",)}


def test_image_folders_stay_image_folders(tmp_path):
    """Captions, tables and a stray XML beside classified images."""
    for name in ("train/ant/1", "train/bee/2", "val/ant/3", "val/bee/4"):
        write(tmp_path / f"{name}.jpg", jpeg(8, 8, seed=int(name[-1])))
    write(tmp_path / "labels.csv", "1,ant")
    write(tmp_path / "train/notes.xml", "<note/>")
    assert check_data(tmp_path).layout == "image folder"
    write(tmp_path / "train/ant/1.txt", "an ant on a leaf, 3 cm")
    assert check_data(tmp_path).by_kind() == {"other file": 1}
