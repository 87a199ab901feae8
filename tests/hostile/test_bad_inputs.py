"""Inputs that can't be used: for each one clear line, exit code 2, no traceback, and no file changed.

The tables hold the name of an input, what is put there, and what the line must name beside the file: the key or place.
"""

import json
import os
import pickle
import re
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch

from tests.helpers.voc import obj, xml

# name -> command, words behind it, change of the tree, what the line must match
CASES = {}


def add(name, command, match, change=lambda root: None, words=()):
    assert name not in CASES, name
    CASES[name] = (command, words, change, match)


def add_contents(kind, command, path, rows, words=()):
    """Cases in which one file has other content: (name, content, key)."""
    for name, content, key in rows:

        def change(root, content=content):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

        add(f"{kind} {name}", command, rf"{re.escape(path.split('/')[-1])}.*({key})", change, words)


def add_changes(kind, command, path, rows, words=()):
    """Cases in which something happens to one file: (name, function of its path, key)."""
    for name, change, key in rows:
        add(
            f"{kind} {name}",
            command,
            rf"\b{re.escape(path.split('/')[-1].partition('.')[0])}\b.*({key})",
            lambda root, change=change: change(root / path),
            words,
        )


def remove(path):
    path.unlink()


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_link_outside(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


def grown(size):
    return lambda path: os.truncate(path, size)


def flipped(at):
    """Change one bit, where ``at`` finds it."""

    def change(path):
        data = bytearray(path.read_bytes())
        data[at(data)] ^= 1
        path.write_bytes(data)

    return change


# --- annotations

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
XML = "voc/Annotations/a.xml"
# more of them, and of lists and images, are in tests/data/test_hostile.py
ANNOTATIONS = [
    ("empty", "", "XML"),
    ("binary", b"\x89PNG\r\n\x1a\n\x00", "XML"),
    ("entities", f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>', "DOCTYPE"),
    ("width huge", xml(width="9" * 4000), "size/width is '999"),
    ("name of two lines", xml(obj("a\nb")), "its name"),
    ("no box", xml("<object><name>cup</name></object>"), "bndbox"),
    ("corner in words", xml(obj("cup", (1, "two", 9, 9))), "bndbox/ymin is 'two'"),
]
add_contents("annotation", "evaluate", XML, ANNOTATIONS)
FILE_CHANGES = [
    ("missing", remove, "no such annotation"),
    ("of a gigabyte", grown(1 << 30), "4194304"),
    ("a folder", as_folder, "not a regular file"),
    ("a link to the outside", as_link_outside, "outside"),
]
add_changes("annotation", "evaluate", XML, FILE_CHANGES)

# --- images


def png(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of(width, height):
    data = bytearray(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


IMAGE = "voc/JPEGImages/a.jpg"
TWO_STEPS = ["SOLVER.MAX_ITER", "2"]
IMAGES = [
    ("empty", b"", "empty"),
    ("text", b"this is no image", "no JPEG"),
    ("cut off", jpeg_of(40, 30)[:200], "decoded"),
    ("a gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "a GIF"),
    ("an svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
    ("a png of 100,000 x 100,000", png(100_000, 100_000), "80000000 pixels"),
    ("a jpeg of 65,500 x 65,500", jpeg_of(65_500, 65_500), "80000000 pixels"),
    ("of another size", png(39, 30), "39x30|decoded"),
]
IMAGE_CHANGES = [
    ("missing", remove, "no image with this name"),
    ("of 200 MB", grown(200 << 20), "134217728"),
    ("a pipe", as_pipe, "not a regular file"),
]
add_contents("image", "detect", IMAGE, IMAGES, TWO_STEPS)
add_changes("image", "detect", IMAGE, IMAGE_CHANGES)
PICTURES = [("empty", b"", "empty"), ("a png of 100,000 x 100,000", png(100_000, 100_000), "80000000 pixels")]
add_contents("picture", "distill", "images/train/x/0.jpg", PICTURES)

# --- lists and detections

LIST = "voc/ImageSets/Main/train.txt"
LISTS = [
    ("empty", "", "no image"),
    ("not UTF-8", b"a\n\xff\xfe\n", "line 2"),
    ("with a path out of the folder", "a\n../../etc/passwd\n", "line 2: '../../etc/passwd'"),
    ("with a control character", "a\x1b[31m\n", "line 1"),
]
add_contents("list", "evaluate", LIST, LISTS)
add_changes("list", "evaluate", LIST, [("missing", remove, "no such list")])
add("list with an image that is not there", "evaluate", "zz", lambda root: (root / LIST).write_text("a\nzz\n"))
RESULTS = "results/comp4_det_train_cup.txt"
LINES = [
    ("of words", "hello world\n", "line 1: 'hello world'"),
    ("an unknown image", "z 0.5 1 1 5 5\n", "line 1: image z"),
    ("not UTF-8", b"\xff\xfe\x00", "UTF-8"),
]
add_contents("results", "results", RESULTS, LINES)
add_changes("results", "results", RESULTS, [("without a class", remove, "add it")])


DETECTIONS = [
    ("empty", "", "JSON"),
    ("cut off", "[{", "JSON"),
    ("not UTF-8", b"\xff\xfe[]", "JSON"),
    ("deep", "[" * 100_000, "JSON"),
    ("a mapping", "{}", "a list"),
    ("a list of numbers", "[1]", "detection 0: image_id"),
    ("score NaN", '[{"image_id": "a", "category": "cup", "bbox": [1, 1, 5, 5], "score": NaN}]', "detection 0: score"),
]
add_contents("detections", "evaluate", "detections.json", DETECTIONS)
add_changes("detections", "evaluate", "detections.json", [("missing", remove, "no such file")])
add_contents(
    "names", "evaluate", "names.json", [("of numbers", "[]", "'categories'")], ["--coco-names", "TREE/names.json"]
)

# --- configs

DISTILL = [
    ("a list", "- a\n", ""),
    ("binary", b"\x00\xff\xfe", ""),
    ("a Python object", "NAME: !!python/object/apply:os.system ['touch PWNED']", ""),
    ("an unknown key", "SOLVR: {MAX_ITER: 3}", "SOLVR"),
    ("a group that is empty", "DATA:", "DATA"),
    ("a number that is empty", "DATA: {ROOT: x}\nSOLVER: {MAX_ITER: }", "SOLVER.MAX_ITER"),
]
add_contents("stage one's config", "distill", "distill.yaml", DISTILL)
COMPARE = [("without stages", "NAME: t\n", "CONFIG"), ("with an unknown key", "NAME: t\nNIX: 1\n", "NIX")]
add_contents("comparison", "compare", "compare.yaml", COMPARE)
SETTINGS = [
    ("distill", "NAME", "../x", r"\.\./x"),
    ("distill", "DATA.ROOT", "/nowhere", "/nowhere"),
    ("distill", "DATA.ROOT", "$NO_SUCH_NAME", "NO_SUCH_NAME"),
    ("distill", "SEED", None, "SEED"),
    ("distill", "STUDENT.ARCH", "nix", "STUDENT.ARCH.*nix"),
    ("distill", "SOLVER.NON_FINITE.POLICY", "pray", "NON_FINITE.POLICY.*pray"),
    ("detect", "MODEL.NIX", "1", "MODEL.NIX"),
    ("detect", "DATASETS.TRAIN", "[nix]", "'nix'"),
    ("detect", "MODEL.ROI_HEADS.NUM_CLASSES", "7", "NUM_CLASSES.* 7"),
    ("detect", "METHOD", "nst-poly", "(?i)teacher"),
    ("detect", "MODEL.WEIGHTS", "/nowhere.pth", "/nowhere.pth"),
    ("detect", "MODEL.WEIGHTS", "backbone://nix", "backbone://nix"),
    ("detect", "MODEL.WEIGHTS", "backbone://../../x", r"\.\./x"),
    ("detect", "MODEL.WEIGHTS", "backbone:///etc/passwd", "/etc/passwd"),
    ("detect", "MODEL.WEIGHTS", "backbone://a/../../b", r"a/\.\./\.\./b"),
    ("compare", "METHODS", "[nix]", "METHODS.*nix"),
    ("compare", "METHODS", "[kd, kd]", "METHODS .*kd"),
    ("compare", "SEEDS", "[]", "SEEDS"),
]
for command, key, value, match in SETTINGS:
    add(f"{command} {key} {value}", command, match, words=[key] if value is None else [key, value])

# --- cards and backbone files

CARD, WEIGHTS = "backbones/b.json", "backbones/b.safetensors"
# more of them, and of backbone files, are in tests/models/test_backbone_files.py
CARDS = [
    ("of a path", {"arch": "../../etc/passwd"}, "'arch'"),
    ("of less than no classes", {"num_classes": -1}, "'num_classes'.* -1"),
    ("of no classes, with a head", {"num_classes": 0}, "fc.weight"),
    ("of other classes", {"num_classes": 3}, "fc.weight"),
    ("without an input", {"input": "left out"}, "'input'"),
    ("with a checksum of numbers", {"sha256": 7}, "'sha256'"),
    ("with levels as a list", {"levels": []}, "'levels'"),
]


def rewritten(changes):
    def change(path):
        # without the checksum, as somebody who edits a card must leave it
        value = {**json.loads(path.read_text()), "content_sha256": "left out", **changes}
        path.write_text(json.dumps({key: item for key, item in value.items() if item != "left out"}))

    return change


def edited(path):
    content = path.read_bytes()
    assert content.count(b'"seed": null') == 1
    path.write_bytes(content.replace(b'"seed": null', b'"seed": 1234'))


add_changes("card", "check", CARD, [(name, rewritten(changes), key) for name, changes, key in CARDS])
add_contents("card", "check", CARD, [("cut off", "{", "JSON")])
add_changes(
    "card",
    "check",
    CARD,
    [("edited", edited, "damaged"), ("of 100 MB", grown(100 << 20), "bytes"), ("gone", remove, "card")],
)
SAFETENSORS = [
    ("text", b"hello hello hello", "damaged"),
    ("a header of 2^60 bytes", struct.pack("<Q", 1 << 60) + b"{}", "damaged"),
    ("a header that is no JSON", struct.pack("<Q", 4) + b"nope", "damaged"),
    ("other names", struct.pack("<Q", 2) + b"{}", "62 missing"),
]
SAFETENSORS_CHANGES = [
    ("with one bit changed", flipped(lambda data: -5), "card"),
    ("missing", remove, "not found"),
]
add_contents("safetensors", "check", WEIGHTS, SAFETENSORS)
add_changes("safetensors", "check", WEIGHTS, SAFETENSORS_CHANGES)
for name in ("nix", "../b", "a b"):
    add(f"registry {name}", "registry", re.escape(name), words=[name])
add("registry with a control character", "registry", r"a\\x1bb", words=["a\x1bb"])
add("registry a folder that is not there", "root", "nowhere: ")

# --- checkpoints and pickles


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")


POINT = "checkpoints/step-00000003.pt"
CHECKPOINTS = [
    ("empty", b"", "damaged"),
    ("text", b"hello", "damaged"),
    ("a plain pickle", pickle.dumps({"step": 3}), "damaged"),
]
CHECKPOINT_CHANGES = [
    ("of something else", lambda path: None, "not a step"),
    ("cut off", lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
    ("with one bit changed", flipped(lambda data: data.index(struct.pack("<f", 1.0))), "damaged"),
    ("that would run code", lambda path: torch.save({"step": 3, "x": Evil()}, path), "damaged"),
    ("a zip of something else", zipped, "damaged"),
]
add_contents("checkpoint", "replay", POINT, CHECKPOINTS)
add_changes("checkpoint", "replay", POINT, CHECKPOINT_CHANGES)
ZOO = pickle.dumps({"model": {"a": np.zeros(3)}, "__author__": "x"})
STATE_DICTS = [
    ("that would run code", lambda path: torch.save({"x": Evil()}, path), "pickle"),
    ("that are a list", lambda path: torch.save([torch.ones(3)], path), "not a state dict"),
    ("of nobody", lambda path: torch.save({"nix": torch.ones(3)}, path), ""),
    ("that are not there", lambda path: None, "no such file or folder"),
]
PTH = [
    ("in an old pickle that would run code", pickle.dumps(Evil()), "pickle"),
    ("that are text", "not weights", "not a weights file"),
    ("that are an image", png(4, 4), "not a weights file"),
]
add_changes("weights", "convert", "w.pth", STATE_DICTS)
add_contents("weights", "convert", "w.pth", PTH)
add_contents("weights", "zoo", "w.pkl", [("of Detectron2's model zoo", ZOO, "--trust-pickle")])

# --- reports and projects

REPORTS = [
    ("cut off", "{", "JSON"),
    ("a list", "[]", "ComparisonResult"),
    ("of nothing", "{}", ""),
    ("with rows of text", '{"rows": ["x"]}', ""),
]
add_contents("report", "report", "report/results.json", REPORTS)
add("report missing", "report", r"results\.json: no such file")
add("project of too few images", "init", "nst_det_train")


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_changed(name, tree, refused, monkeypatch, tmp_path):
    command, words, change, match = CASES[name]
    monkeypatch.chdir(tmp_path)
    change(tree)
    line = refused(tree, command, *(word.replace("TREE", str(tree)) for word in words))
    assert re.search(match, line), line
    assert not (tmp_path / "PWNED").exists()
