import copy
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nst_det.data.check import check_coco, check_data
from nst_det.data.coco import CocoSource, read_coco, write_coco_as_voc
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from tests.helpers.voc import write_list

TREE = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 60, "height": 40},
        {"id": 9, "file_name": "deep/b.PNG", "width": 32, "height": 48},
        {"id": 3, "file_name": "empty.jpg", "width": 20, "height": 20},
    ],
    "categories": [{"id": 90, "name": "cat"}, {"id": 2, "name": "r&d <dog>"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 90, "bbox": [0, 0, 32, 48], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [10.25, 5.5, 20.125, 30.0], "area": 600, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [1 / 3, 2 / 3, 8, 9], "iscrowd": 1},
    ],
}


@pytest.fixture
def coco(tmp_path):
    """TREE with its images, and a way to change it."""
    folder = tmp_path / "pictures"
    for entry in TREE["images"]:
        path = folder / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("no image")

    def source(change=lambda tree: None, name="a.json"):
        tree = copy.deepcopy(TREE)
        change(tree)
        (tmp_path / name).write_text(json.dumps(tree))
        return CocoSource((tmp_path / name,), (folder,))

    return source


def test_values_survive(coco, tmp_path):
    source = coco()
    report, found = check_coco(source)
    assert report.summary() == "COCO JSON, 3 images, 3 objects, 2 classes: no problem"
    root = write_coco_as_voc(found, tmp_path / "voc")
    write_list(root, "all", ["a", "deep_b", "empty"])
    data = VocDataset(root, "all")
    assert data.classes == ("cat", "r&d <dog>")
    a, b, empty = data.annotations()
    assert (a.width, a.height, b.width, b.height) == (60, 40, 32, 48)
    assert a.names == ("r&d <dog>", "cat")
    # COCO's corners, pixels from 0: x, y, x + width, y + height
    np.testing.assert_allclose(a.boxes, [[10.25, 5.5, 30.375, 35.5], [1 / 3, 2 / 3, 25 / 3, 29 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(b.boxes, [[0, 0, 32, 48]])
    assert a.difficult.tolist() == [False, True]
    assert empty.objects == ()
    pixels = np.asarray(Image.open(tmp_path / "pictures" / "deep" / "b.PNG"))
    np.testing.assert_array_equal(data.image("deep_b"), pixels)
    assert check_data(root, ["all"]).problems == []
    # and by COCO's own reader
    api = COCO(str(source.files[0]))
    for image, annotation in ((7, a), (9, b), (3, empty)):
        theirs = api.loadAnns(api.getAnnIds([image]))
        assert [api.cats[entry["category_id"]]["name"] for entry in theirs] == list(annotation.names)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in theirs)]
        np.testing.assert_allclose(annotation.boxes, np.array(corners).reshape(-1, 4), rtol=1e-6)
        assert [bool(entry["iscrowd"]) for entry in theirs] == annotation.difficult.tolist()


def put(key, number, field, value):
    def change(tree):
        tree[key][number][field] = value

    return change


def drop(key):
    return lambda tree: tree.pop(key)


def add(key, **entry):
    return lambda tree: tree[key].append(entry)


def both(*changes):
    def change(tree):
        for one in changes:
            one(tree)

    return change


def each(key, field, value):
    """Put a value, or what a function makes of the former one, into every entry."""

    def change(tree):
        for entry in tree[key]:
            entry[field] = value(entry[field]) if callable(value) else value

    return change


def first_box(*box):
    return put("annotations", 0, "bbox", list(box))


# what can't be read at all
NO_COCO = [
    (drop("images"), "'images'"),
    (drop("annotations"), "'annotations'"),
    (drop("categories"), "'categories'"),
    (lambda tree: tree.update(annotations={}), "'annotations'"),
    (lambda tree: tree.update(images=[], annotations=[]), "no image in it"),
]
BAD, MISSING, OTHER_FORM, NO_AREA = "bad annotation", "missing image", "other form of boxes", "box with no area"
# a change, the kinds of problem that it makes, and what the first one begins with
CASES = [
    (put("images", 1, "id", 7), [BAD, BAD], "images[1]: the id 7"),
    (put("images", 0, "id", 7.5), [BAD] * 3, "images[0]: its id is 7.5"),
    (put("images", 0, "file_name", None), [BAD], "images[0]: its file_name"),
    (lambda tree: tree["images"][0].update(width=40, height=60), ["wrong size"], "size is 40x60"),
    # names of files
    *(
        (put("images", 0, "file_name", name), [BAD], f"images[0]: file_name '{name[:9]}")
        for name in ("", "..", "q" * 201 + ".jpg", "q/" * 501 + "a.jpg", "a.jpg/..")
    ),
    (put("images", 0, "file_name", "a\n.jpg"), [BAD], "images[0]: file_name 'a\\n.jpg'"),
    (put("images", 0, "file_name", "gone.jpg"), [MISSING], "images[0]: no image 'gone.jpg'"),
    (put("images", 0, "file_name", "http://host/gone.jpg"), [MISSING], "images[0]: no image 'http://host/gone.jpg'"),
    (put("images", 0, "file_name", "notes.txt"), [BAD], "images[0]: 'notes.txt' is not one of"),
    (put("images", 2, "file_name", "a.jpg"), [BAD], "images[2]: 'a.jpg' is listed twice (ids 7 and 3)"),
    (put("images", 2, "file_name", ".\\a.jpg"), [BAD], "images[2]: '.\\a.jpg' is listed twice (ids 7 and 3)"),
    # ids
    (put("annotations", 2, "image_id", 8), [BAD], "annotations[2]: image_id 8"),
    (put("annotations", 2, "image_id", "7"), [BAD], "annotations[2]: image_id '7'"),
    (put("annotations", 2, "image_id", True), [BAD], "annotations[2]: its image_id is True"),
    (put("annotations", 0, "category_id", 91), [BAD], "annotations[0]: category_id 91"),
    (put("annotations", 0, "category_id", None), [BAD], "annotations[0]: its category_id is missing"),
    (lambda tree: tree["annotations"].append(3), [BAD], "annotations[3]: its image_id is missing"),
    # names of categories
    (put("categories", 1, "id", 90), [BAD, BAD], "categories[1]: the id 90"),
    (put("categories", 1, "name", "cat"), [BAD], "annotations[1]: categories 90 and 2 are both called cat"),
    (put("categories", 0, "name", " "), [BAD, BAD], "annotations[0]: the name ''"),
    (add("categories", id=0, name="cat", supercategory="none"), [], ""),
    (add("categories", id=0, name="", supercategory="none"), [], ""),
    (add("categories", id=0, name="bird"), [], ""),
    (both(put("categories", 1, "id", 10**6), put("annotations", 1, "category_id", 10**6)), [], ""),
    # boxes
    *(
        (put("annotations", 0, "bbox", box), [BAD], f"annotations[0]: its bbox is {text}")
        for box, text in (
            ([1, 2, 3], "[1, 2, 3]"), ([1, 2, 3, "4"], "[1, 2, 3, '4']"), ([1, 2, 3, math.nan], "[1, 2, 3, nan]"),
            ([1, 2, 3, math.inf], "[1, 2, 3, inf]"), ([], "[]"), ([5, 5, 4, 4, 30.0], "[5, 5, 4, 4, 30.0]"),
            ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"), (None, "missing"), ("1 2 3 4", "'1 2 3 4'"), ([1e9, 2, 3, 4], "[1"),
        )
    ),
    *(
        (first_box(*box), [NO_AREA], f"annotations[0]: its bbox {list(box)}")
        for box in ((5, 5, 0, 9), (5, 5, 9, 0), (5, 5, -3, 9), (20, 20, -5, -5), (5, 5, 0.5, 9))
    ),
    (first_box(0, 0, 33, 48), ["box reaches outside"], "the box (1, 1, 33, 48) of object 1 (cat)"),
    (first_box(40, 0, 5, 5), ["box outside"], "the box (41, 1, 45, 5) of object 1 (cat)"),
    (add("annotations", image_id=9, category_id=90, bbox=[0, 0, 32, 48]), ["repeated object"], "object 2 (cat)"),
    # corners: 30.5 + 60 is beyond 60, and as corners all fit
    (each("annotations", "bbox", [1, 2, 18, 17]), [], ""),
    (each("annotations", "bbox", [12, 10, 31, 39]), [OTHER_FORM, "box reaches outside"], "3 of 3 boxes"),
    (each("annotations", "bbox", [0.1, 0.2, 0.5, 1]), [OTHER_FORM], "no value of any bbox is above 1"),
    # flags
    (put("annotations", 0, "iscrowd", "0"), [BAD], "annotations[0]: its iscrowd is '0'"),
    (put("annotations", 0, "ignore", 2), [BAD], "annotations[0]: its ignore is 2"),
    # turned boxes
    (put("annotations", 0, "attributes", {"rotation": 0.0}), [], ""),
    (put("annotations", 0, "attributes", {"rotation": 360}), [], ""),
    (put("annotations", 0, "attributes", {"rotation": "30"}), [BAD], "annotations[0]: its rotation is '30'"),
    (put("annotations", 0, "attributes", [1]), [], ""),
    (put("annotations", 0, "segmentation", {"counts": "abc", "size": [48, 32]}), [], ""),
    # sizes
    *((each("images", "width", width), ["size missing"], "has no size of 3") for width in (0, None, "60", -1, 60.5)),
    (put("images", 0, "width", 60.0), [], ""),
    # all at once
    (both(each("annotations", "bbox", []), put("images", 2, "file_name", "b.jpg")), [BAD] * 3 + [MISSING], "annotat"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "key"), NO_COCO, ids=[key for _, key in NO_COCO])
def test_what_is_no_coco_file_is_one_line(coco, change, key):
    with pytest.raises(UserError, match=rf"a\.json: .*{key}"):
        check_data(coco(change))


@pytest.mark.parametrize(("change", "kinds", "text"), CASES, ids=range(len(CASES)))
def test_every_fault_of_a_file_is_listed(coco, change, kinds, text):
    problems = check_data(coco(change)).problems
    of_kind = [problem.kind for problem in problems]
    if OTHER_FORM in kinds:
        # each box reaches outside besides
        of_kind = sorted(set(of_kind))
    assert sorted(of_kind) == sorted(kinds)
    first = next((problem for problem in problems if problem.kind != "box reaches outside"), (problems or [None])[0])
    assert not kinds or (first.text.startswith(text) and first.file.startswith("a.json"))
    assert all(problem.line().isprintable() for problem in problems)


def test_the_command_lists_them_and_the_other_one_refuses(coco, tmp_path, cli, capsys):
    source = coco(both(each("annotations", "bbox", []), put("images", 2, "file_name", "no.jpg")))
    words = [source.files[0], "--images", source.images[0]]
    assert cli("check-data", *words) == 2
    out = capsys.readouterr().out
    assert out.count("a.json: annotations[") == 3
    assert out.count("a.json: images[2]") == 1
    assert cli("init", tmp_path / "project", "--coco", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 more" in line
    assert f"nst-det check-data {source.files[0]} --images {source.images[0]}" in line
    assert not (tmp_path / "project").exists()
    # and the remedies for commands that are not whole
    for typed, key in (
        ([source.files[0]], "--images"),
        ([*words, "--split", "train"], "--split"),
        ([tmp_path, tmp_path], "one folder"),
    ):
        assert cli("check-data", *typed) == 2
        assert key in capsys.readouterr().err
    assert cli("check-data", coco().files[0], "--images", source.images[0]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "deep\\b.PNG", "..\\deep\\b.PNG", "C:\\data\\deep\\b.PNG", "/srv/data/deep/b.PNG", "../deep/b.PNG",
        "./deep/b.PNG", "other/b.PNG", "b.PNG", "https://host/bucket/deep/b.PNG?sig=a/c.jpg",
        "s3://bucket/deep/b%2EPNG", "/etc/../b.PNG",
    ],
)  # fmt: skip
def test_paths_of_other_machines_lead_to_the_image(coco, tmp_path, name):
    source = coco(put("images", 1, "file_name", name))
    report, found = check_coco(source)
    assert report.problems == []
    assert [image.path.relative_to(source.images[0]).as_posix() for image in found] == [
        "a.jpg",
        "deep/b.PNG",
        "empty.jpg",
    ]
    assert found[1].annotation.id == "deep_b"


@pytest.mark.parametrize(
    ("name", "taken"),
    [("x/b.PNG", None), ("b.PNG", None), ("/srv/deep/b.PNG", "deep/b.PNG"), ("z\\other\\b.PNG", "other/b.PNG")],
)
def test_of_several_images_of_a_name_the_path_tells_which(coco, name, taken):
    source = coco(put("images", 1, "file_name", name))
    other = source.images[0] / "other" / "b.PNG"
    other.parent.mkdir()
    other.write_bytes((source.images[0] / "deep" / "b.PNG").read_bytes())
    report, found = check_coco(source)
    if taken is None:
        (problem,) = report.problems
        assert f"images[1]: file_name '{name}' may be deep/b.PNG and other/b.PNG" in problem.line()
    else:
        assert found[1].path == source.images[0] / taken


def test_a_file_from_windows_whose_name_has_a_backslash(coco, tmp_path):
    source = coco(put("images", 0, "file_name", "in\\a.jpg"))
    (source.images[0] / "a.jpg").rename(source.images[0] / "in\\a.jpg")
    report, found = check_coco(source)
    assert report.problems == []
    assert found[0].annotation.id == "in_a"


def test_names_that_a_mac_has_decomposed(coco):
    source = coco(put("images", 0, "file_name", "t\u00fcr.jpg"))
    (source.images[0] / "a.jpg").rename(source.images[0] / "tu\u0308r.jpg")
    report, found = check_coco(source)
    assert (report.problems, found[0].annotation.id) == ([], "t\u00fcr")


@pytest.mark.parametrize(
    ("angle", "box"),
    [
        (90, (12, -2, 20, 30)), (-90, (12, -2, 20, 30)), (450, (12, -2, 20, 30)), (180, (7, 3, 30, 20)),
        # the corners of a square turned by half a right angle are a diagonal apart
        (45, (22 - 25 / 2**0.5, 13 - 25 / 2**0.5, 50 / 2**0.5, 50 / 2**0.5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [True, False])
def test_the_upright_box_around_a_turned_one_is_taken(coco, angle, box, nested):
    turned = {"attributes": {"rotation": angle}} if nested else {"rotation": angle}
    report, found = check_coco(coco(lambda tree: tree["annotations"][1].update(bbox=[7, 3, 30, 20], **turned)))
    x, y, width, height = box
    np.testing.assert_allclose(found[0].annotation.boxes[0], (x, y, x + width, y + height), rtol=1e-6, atol=1e-6)
    assert "turned box" in report.by_kind()


@pytest.mark.parametrize("key", ["iscrowd", "ignore", "difficult"])
@pytest.mark.parametrize("value", [1, True, 0, False, None])
def test_what_is_not_to_be_counted_is_difficult(coco, key, value):
    for entry in ({key: value}, {"attributes": {key: value}, "iscrowd": 0}):
        _, found = check_coco(coco(lambda tree, entry=entry: tree["annotations"][1].update(entry)))
        whole = key == "iscrowd" and "attributes" in entry
        assert found[0].annotation.difficult.tolist() == [bool(value) and not whole, True]


def test_a_size_that_is_not_said_is_the_images_own(coco, tmp_path):
    _, found = check_coco(coco(each("images", "width", 0)))
    root = write_coco_as_voc(found, tmp_path / "voc")
    write_list(root, "all", ["a", "deep_b", "empty"])
    assert [(a.width, a.height) for a in VocDataset(root, "all").annotations()] == [(60, 40), (32, 48), (20, 20)]


def two_jobs(tmp_path, names, folders=("job1/images", "job2/images")):
    """Two files, each with images of its own of these names."""
    files = []
    for number, (folder, listed) in enumerate(zip(folders, names)):
        entries = []
        for place, name in enumerate(listed):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 10), (100 * number, 9 * place, 0)).save(path)
            entries.append({"id": place, "file_name": name, "width": 20, "height": 10})
        file = tmp_path / f"{number}.json"
        annotations = [{"image_id": entry["id"], "category_id": 1, "bbox": [1, 1, 5, 5]} for entry in entries]
        file.write_text(
            json.dumps({"images": entries, "categories": [{"id": 1, "name": "x"}], "annotations": annotations})
        )
        files.append(file)
    return CocoSource(tuple(files), tuple(tmp_path / folder for folder in dict.fromkeys(folders)))


@pytest.mark.parametrize("folders", [("job1/images", "job2/images"), ("all", "all/more")])
def test_images_of_one_name_are_told_apart_by_their_lists(tmp_path, folders):
    report, found = check_coco(two_jobs(tmp_path, (["f.png"], ["f.png"]), folders))
    assert report.problems == []
    assert [image.annotation.id for image in found] == ["train_f", "test_f"]
    root = write_coco_as_voc(found, tmp_path / "voc")
    assert [VocDataset(root, split).ids for split in ("train", "test")] == [("train_f",), ("test_f",)]
    # as they are where they differ
    _, found = check_coco(two_jobs(tmp_path, (["f.png"], ["g.png"]), folders))
    assert [image.annotation.id for image in found] == ["f", "g"]


@pytest.mark.parametrize(
    ("names", "folders", "key"),
    [
        # the same image in both, two of one name in one folder, two whose paths make one name
        ((["f.png", "g.png"], ["g.png"]), ("all", "all"), "0.json (g.png) too"),
        ((["f.png", "f.jpg"], []), ("all", "all"), "called f like "),
        ((["a/b.png", "a_b.png"], ["c.png"]), ("all", "other"), "called train_a_b like "),
    ],
)
def test_images_that_stay_alike_are_named(tmp_path, names, folders, key):
    source = two_jobs(tmp_path, names, folders)
    if not names[1]:
        source = CocoSource(source.files[:1], source.images)
    (problem,) = check_data(source).problems
    assert problem.kind == BAD
    assert key in problem.text


def test_the_same_pixels_on_both_sides(tmp_path):
    source = two_jobs(tmp_path, (["f.png"], ["g.png"]))
    (source.images[1] / "g.png").write_bytes((source.images[0] / "f.png").read_bytes())
    (problem,) = check_data(source).problems
    assert (problem.kind, problem.file) == ("same image in two lists", "job2/images/g.png")
    assert "job1/images/f.png" in problem.text


@pytest.mark.parametrize("name", ["a.jpg", "/elsewhere/a.jpg"])
def test_a_link_out_of_the_folder_is_refused(coco, tmp_path, name):
    source = coco(put("images", 0, "file_name", name))
    image = source.images[0] / "a.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    (problem,) = check_data(source).problems
    assert problem.kind == BAD
    assert "a.jpg leads outside" in problem.text


# what a damaged file may hold where something else is meant
WRONG = [
    None, True, False, 0, 1, 7, 9, 90, -1, 2.5, 10**400, -(10**18), math.nan, math.inf, "", "7", "a.jpg", "../a.jpg",
    "deep", "x\n\x1b[31m", "ü" * 3000, "\ud800", [], [1], [1, 2, 3, 4], [1e300] * 4, ["1", 2, 3, 4], [[1], 2, 3, 4], {},
    {"id": 7}, {"rotation": "x"}, {"rotation": 1e9}, {"difficult": "no"},
]  # fmt: skip
# what a line on a fault names one of
FIELDS = "ids?|file_name|name|image_id|category_id|bbox|rotation|iscrowd|ignore|difficult|no image|both called"


def damage(tree, draw):
    """Change one to three places of a tree, all depths alike: put another value, remove it or double it."""
    for _ in range(draw.integers(1, 4)):
        nodes, places = [tree], []
        while nodes:
            node = nodes.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            nodes += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            return
        node, key = places[draw.integers(len(places))]
        how = draw.integers(6)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(WRONG[draw.integers(len(WRONG))])


def plain_objects(tree):
    """What any reader would take from a tree: (image, class, corners) of annotations that have all of it."""

    def number(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e8

    def known(key, *fields):
        entries = [entry for entry in tree[key] if isinstance(entry, dict)]
        return [tuple(entry.get(field) for field in fields) for entry in entries]

    found = []
    for entry in (entry for entry in tree["annotations"] if isinstance(entry, dict)):
        boxes = entry.get("bbox")
        if not isinstance(boxes, list) or len(boxes) != 4 or not all(map(number, boxes)) or min(boxes[2:]) <= 1:
            continue
        x, y, width, height = boxes
        for id_, name in known("images", "id", "file_name"):
            for category, label in known("categories", "id", "name"):
                if (repr(id_), repr(category)) == (repr(entry.get("image_id")), repr(entry.get("category_id"))):
                    corners = (x + 1, y + 1, x + width, y + height)
                    found.append((str(name), str(label).strip(), corners))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_is_read_rightly_or_its_faults_are_named(coco, seed):
    draw = np.random.default_rng(seed)
    source = coco()
    (file,) = source.files
    whole = copy.deepcopy(TREE)
    whole["annotations"][0]["attributes"] = {"difficult": 0, "rotation": 0.0}
    for _ in range(240):
        tree = copy.deepcopy(whole)
        damage(tree, draw)
        file.write_text(json.dumps(tree))
        notes, refusal = [], ""
        try:
            found = read_coco(source, lambda kind, path, text, notes=notes: notes.append((kind, path, text)))
        except UserError as error:
            refusal = str(error)
        if refusal:
            # what is no COCO file at all
            assert re.search(r"a\.json: .*('images'|'annotations'|'categories'|no image in it)", refusal)
            assert refusal.isprintable()
            continue
        for kind, path, text in notes:
            assert str(path).startswith(str(file))
            assert text.isprintable()
            # which of them, and for a fault its field
            if kind in (BAD, MISSING, NO_AREA):
                assert re.match(rf"(images|annotations|categories)\[\d+\]: .*\b({FIELDS})\b", text), text
        plain = plain_objects(tree)
        mine = [
            (image.path.relative_to(source.images[0]).as_posix(), item.name, item.box)
            for image in found
            for item in image.annotation.objects
        ]
        for name, label, box in [] if "turned box" in {kind for kind, *_ in notes} else mine:
            assert any(
                listed.replace("\\", "/").rsplit("/")[-1] == name.rsplit("/")[-1] and (label, box) == (other, corners)
                for listed, other, corners in plain
            ), (tree, name, label, box)
        # nothing is lost without a word
        assert notes or len(mine) == len(tree["annotations"])
