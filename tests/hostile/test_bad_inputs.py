"""Inputs that can't be used: for each one clear line, exit code 2, no traceback, and no file changed."""

import json
import os
import pickle
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

CASES = {}


def case(name, command, says, *more):
    """Register a change of the tree, the command that then reads it, and what it must say."""

    def add(change):
        assert name not in CASES, name
        CASES[name] = (change, command, says, more)
        return change

    return add


def put(name, command, path, content, says, *more):
    """A case in which one file has other content."""

    def change(root):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    case(name, command, says, *more)(change)


# --- annotations

XML = "voc/Annotations/a.xml"
SIZE = "<size><width>40</width><height>30</height></size>"


def obj(box="<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>", name="cup", more=""):
    return f"<annotation>{SIZE}<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object></annotation>"


def box(**corners):
    values = {"xmin": "1", "ymin": "1", "xmax": "9", "ymax": "9", **corners}
    return obj("".join(f"<{name}>{value}</{name}>" for name, value in values.items() if value is not None))


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
for name, content, says in (
    ("empty", "", "not well-formed XML"),
    ("cut off", obj()[:60], "not well-formed XML"),
    ("binary", b"\x89PNG\r\n\x1a\n\x00", "not well-formed XML"),
    ("latin-1", obj(name="caf\xe9").encode("latin-1"), "not well-formed XML"),
    ("two roots", obj() * 2, "not well-formed XML"),
    ("unknown encoding", '<?xml version="1.0" encoding="klingon"?><annotation/>', "not well-formed XML"),
    ("entities", f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>', "DOCTYPE or entities"),
    ("external entity", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///x">]><annotation>&x;</annotation>', "DOCTYPE"),
    ("doctype", '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>', "DOCTYPE or entities"),
    ("html", "<html/>", "its root is <html>"),
    ("no size", "<annotation/>", "size/width is missing"),
    ("width zero", obj().replace("40", "0"), "size/width is '0'"),
    ("width huge", obj().replace("40", "9" * 4000), "size/width is '999"),
    ("width a fraction", obj().replace("40", "40.5"), "size/width is '40.5'"),
    ("height negative", obj().replace("30", "-30"), "size/height is '-30'"),
    ("no name", obj(name=""), "object 1: its name is missing"),
    ("name of two lines", obj(name="a\nb"), "its name is not printable"),
    ("name long", obj(name="a" * 999), "not printable or too long"),
    ("no box", f"<annotation>{SIZE}<object><name>cup</name></object></annotation>", "bndbox is missing"),
    ("no corner", box(xmax=None), "bndbox/xmax is missing"),
    ("corner nan", box(xmin="nan"), "bndbox/xmin is 'nan'"),
    ("corner infinite", box(xmax="inf"), "bndbox/xmax is 'inf'"),
    ("corner far out", box(ymax="1e9"), "bndbox/ymax is '1e9'"),
    ("corner in words", box(ymin="two"), "bndbox/ymin is 'two'"),
    ("corner empty", box(ymin=""), "bndbox/ymin is ''"),
    ("difficult maybe", obj(more="<difficult>maybe</difficult>"), "difficult is 'maybe'"),
    ("truncated 7", obj(more="<truncated>7</truncated>"), "truncated is '7'"),
):  # fmt: skip
    put(f"annotation {name}", "evaluate", XML, content, rf"Annotations/a\.xml: .*{re.escape(says)}")


@case("annotation missing", "evaluate", r"Annotations/a\.xml: no such annotation; add the file")
def _(root):
    (root / XML).unlink()


@case("annotation of a gigabyte", "evaluate", r"Annotations/a\.xml: 1073741824 bytes, but an annotation may have")
def _(root):
    os.truncate(root / XML, 1 << 30)


@case("annotation a folder", "evaluate", r"Annotations/a\.xml: not a regular file")
def _(root):
    (root / XML).unlink()
    (root / XML).mkdir()


@case("annotation a link to the outside", "evaluate", r"Annotations/a\.xml: .*outside")
def _(root):
    (root / XML).unlink()
    (root / XML).symlink_to("/etc/passwd")


# --- images


def png(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of(width, height):
    import cv2

    data = bytearray(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


IMAGE = "voc/JPEGImages/a.jpg"
PICTURE = "images/train/x/0.png"
for name, content, says in (
    ("empty", b"", "can't be decoded as an image"),
    ("text", b"this is no image", "can't be decoded as an image"),
    ("cut off", jpeg_of(40, 30)[:200], "can't be decoded as an image|40x30|truncated"),
    ("a gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "can't be decoded as an image"),
    ("an svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be decoded as an image"),
    ("a png of 100,000 x 100,000", png(100_000, 100_000), "more than 80000000 pixels"),
    ("a jpeg of 65,500 x 65,500", jpeg_of(65_500, 65_500), "more than 80000000 pixels"),
    ("of another size", png(39, 30), "39x30|can't be decoded"),
):
    put(f"image {name}", "detect", IMAGE, content, rf"JPEGImages/a\.jpg: .*({says})", "SOLVER.MAX_ITER", "2")
for name, content, says in (
    ("empty", b"", "can't be decoded"),
    ("a png of 100,000 x 100,000", png(100_000, 100_000), "more than 80000000 pixels"),
):
    put(f"picture {name}", "distill", PICTURE, content, rf"train/x/0\.png: .*({says})")


@case("image missing", "detect", r"JPEGImages/a: no image with this name")
def _(root):
    (root / IMAGE).unlink()


@case("image of 200 MB", "detect", r"JPEGImages/a\.jpg: \d+ bytes, but an image may have")
def _(root):
    os.truncate(root / IMAGE, 200 << 20)


@case("image a pipe", "detect", r"JPEGImages/a\.jpg: not a regular file")
def _(root):
    (root / IMAGE).unlink()
    os.mkfifo(root / IMAGE)


# --- lists

LIST = "voc/ImageSets/Main/train.txt"
for name, content, says in (
    ("empty", "", "no image|is empty"),
    ("not UTF-8", b"a\n\xff\xfe\n", "line 2 is not UTF-8"),
    (
        "with a path out of the folder",
        "a\n../../etc/passwd\n",
        "line 2: '../../etc/passwd' could lead to another folder",
    ),
    ("with an absolute path", "/etc/passwd\n", "line 1: '/etc/passwd' could lead to another folder"),
    ("with a control character", "a\x1b[31m\n", "line 1: .* can't be printed"),
    ("with a long name", "a" * 999 + "\n", "line 1: .* is longer than 200 bytes"),
    ("with an image twice", "a\nb\na\n", "line 3: a stands in line 1 too"),
    ("with an image that is not there", "a\nzz\n", "zz"),
):
    put(f"list {name}", "evaluate", LIST, content, rf"{says}")


@case("list missing", "evaluate", r"train\.txt: no such list")
def _(root):
    (root / LIST).unlink()


# --- results files

RESULTS = "results/comp4_det_train_cup.txt"
for name, content, says in (
    ("of words", "hello world\n", "line 1: 'hello world' is not"),
    ("of five numbers", "a 0.5 1 1 5\n", "line 1: .* is not 'id score"),
    ("nan", "a nan 1 1 5 5\n", "line 1"),
    ("infinite", "a 0.5 1 1 inf 5\n", "line 1"),
    ("an unknown image", "z 0.5 1 1 5 5\n", "line 1: image z is not in the split"),
    ("not UTF-8", b"\xff\xfe\x00", "not UTF-8 text"),
    ("far out", "a 0.5 1 1 1e30 5\n", "line 1"),
):
    put(f"results {name}", "results", RESULTS, content, rf"comp4_det_train_cup\.txt: {says}")


@case("results without a class", "results", r"results: no comp4_det_train_cup\.txt; add it")
def _(root):
    (root / RESULTS).unlink()


JSON = "detections.json"


def entry(**changes):
    values = {"image_id": "a", "category": "cup", "bbox": [1, 1, 5, 5], "score": 0.5, **changes}
    return json.dumps([{key: value for key, value in values.items() if value != "left out"}])


for name, content, says in (
    ("empty", "", "not valid JSON"),
    ("cut off", "[{", "not valid JSON"),
    ("not UTF-8", b"\xff\xfe[]", "not valid JSON"),
    ("deep", "[" * 100_000, "not valid JSON"),
    ("a mapping", "{}", "detections must be a list"),
    ("a list of numbers", "[1]", "detection 0: image_id"),
    ("an unknown image", entry(image_id="zz"), "detection 0: image_id 'zz' is no image of the split"),
    ("an image as a list", entry(image_id=["a"]), "detection 0: image_id"),
    ("an unknown class", entry(category="dog"), "detection 0: category 'dog' is not one of cup"),
    ("an unknown category_id", entry(category=None, category_id=99), "detection 0: category 99"),
    ("no box", entry(bbox="left out"), "detection 0: needs a finite score and bbox"),
    ("a box of three", entry(bbox=[1, 2, 3]), "detection 0: needs a finite score and bbox"),
    ("a box of text", entry(bbox=["1", 2, 3, 4]), "detection 0: needs a finite score and bbox"),
    ("a negative box", entry(bbox=[1, 1, -5, 5]), "detection 0: bbox .* has a negative size"),
    ("score NaN", entry(score=float("nan")), "detection 0: needs a finite score"),
    ("score huge", entry(score=10**400), "detection 0|not valid JSON"),
    ("score true", entry(score=True), "detection 0: needs a finite score"),
):
    put(f"detections {name}", "evaluate", JSON, content, rf"detections\.json: {says}")


@case("detections missing", "evaluate", r"detections\.json: no such file")
def _(root):
    (root / JSON).unlink()


put(
    "names of numbers",
    "evaluate",
    "names.json",
    "[]",
    r"names\.json: .*'images'",
    "--coco-names",
    "TREE/names.json",
)

# --- configs

for name, content, says in (
    ("empty key", "NAME: [", "not valid YAML"),
    ("a list", "- a\n", "a config must be a mapping"),
    ("binary", b"\x00\xff\xfe", "can't be read as text|not valid YAML"),
    ("a Python object", "NAME: !!python/object/apply:os.system ['touch PWNED']", "not valid YAML"),
    ("its own base", "_BASE_: distill.yaml", "_BASE_ leads back to itself"),
    ("a base that is not there", "_BASE_: nowhere.yaml", "nowhere.yaml: no such config file"),
    ("a base that is a number", "_BASE_: 3", "_BASE_ must be the path"),
    ("an unknown key", "SOLVR: {MAX_ITER: 3}", "unknown key SOLVR"),
    ("a wrong type", "SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER must be of type int"),
    ("a group that is a number", "SOLVER: 3", "SOLVER is a group of keys"),
    ("a group that is empty", "DATA:", "DATA is a group of keys"),
    ("a number that is empty", "DATA: {ROOT: x}\nSOLVER: {MAX_ITER: }", "SOLVER.MAX_ITER must be of type int"),
    ("a rate below 0", "DATA: {ROOT: x}\nSOLVER: {BASE_LR: -1.0}", "SOLVER.BASE_LR must be above 0"),
    ("a method of nobody", "DATA: {ROOT: x}\nMETHODS: [nix]", "METHODS: .*nix"),
    ("a negative size", "DATA: {ROOT: x, IMAGE_SIZE: -1}", "DATA.IMAGE_SIZE must be"),
    (
        "an unknown policy",
        "DATA: {ROOT: x}\nSOLVER: {NON_FINITE: {POLICY: pray}}",
        "NON_FINITE.POLICY 'pray' is not one",
    ),
    ("a limit of 0", "DATA: {ROOT: x}\nSOLVER: {NON_FINITE: {LIMIT: 0}}", "NON_FINITE.LIMIT is 0"),
):
    put(f"stage one's config {name}", "distill", "distill.yaml", content, says)
for name, more, says in (
    ("a name with a path", ["NAME", "../x"], "can't name a backbone"),
    ("a folder that is not there", ["DATA.ROOT", "/nowhere"], "/nowhere: no such folder"),
    ("an unset variable", ["DATA.ROOT", "$NO_SUCH_NAME"], "NO_SUCH_NAME is not set"),
    ("a word without a value", ["SEED"], "'SEED' has no value"),
    ("an unknown architecture", ["STUDENT.ARCH", "nix"], "STUDENT.ARCH: .*nix"),
):
    case(f"stage one's words {name}", "distill", says, *more)(lambda root: None)
for name, more, says in (
    ("an unknown engine", ["ENGINE", "nix"], "ENGINE 'nix' is not one of"),
    ("an unknown key", ["MODEL.NIX", "1"], "unknown key MODEL.NIX"),
    ("a data set of nobody", ["DATASETS.TRAIN", "[nix]"], "no data set 'nix'"),
    ("an unknown level", ["MODEL.RPN.IN_FEATURES", "[p9]"], "MODEL.RPN.IN_FEATURES: no level 'p9'"),
    ("an std of 0", ["MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"], "PIXEL_STD above 0"),
    ("another number of classes", ["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "NUM_CLASSES is 7, but the data has 1"),
    ("no teacher", ["METHOD", "nst-poly"], "needs a teacher"),
    ("weights that are not there", ["MODEL.WEIGHTS", "/nowhere.pth"], "/nowhere.pth: no such weights file"),
    ("an unknown backbone", ["MODEL.WEIGHTS", "backbone://nix"], "backbone://nix: not found"),
    ("a backbone's name with a path", ["MODEL.WEIGHTS", "backbone://../../x"], "can't name a backbone"),
):
    case(f"stage two's words {name}", "detect", says, *more)(lambda root: None)
for name, content, says in (
    ("without stages", "NAME: t\n", "CONFIG"),
    ("with an unknown key", "NAME: t\nNIX: 1\n", "unknown key NIX"),
    ("with a method of nobody", None, "METHODS.*nix"),
    ("with a method twice", None, "METHODS: kd stands there twice; leave one out"),
    ("with no seed", None, "SEEDS"),
):
    if content is None:
        more = ["SEEDS", "[]"] if "seed" in name else ["METHODS", "[kd, kd]" if "twice" in name else "[nix]"]
        case(f"comparison {name}", "compare", says, *more)(lambda root: None)
    else:
        put(f"comparison {name}", "compare", "compare.yaml", content, says)

# --- cards and backbone files


def card(**changes):
    # without the checksum, as somebody who edits a card must leave it
    changes = {"content_sha256": "left out", **changes}

    def change(root):
        path = root / "backbones" / "b.json"
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: item for key, item in value.items() if item != "left out"}))

    return change


def flip(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


for name, changes, says in (
    ("without an architecture", {"arch": "left out"}, "field 'arch' is missing"),
    ("of an unknown architecture", {"arch": "os.system"}, "field 'arch'"),
    ("of a path", {"arch": "../../etc/passwd"}, "field 'arch'"),
    ("with arguments of nobody", {"arch_kwargs": {"nix": 1}}, "nix|arch"),
    ("of no classes", {"num_classes": 0}, "field 'num_classes' is 0"),
    ("of a billion classes", {"num_classes": 10**9}, "field 'num_classes' is 1000000000"),
    ("of classes in words", {"num_classes": "two"}, "field 'num_classes' has the wrong type"),
    ("of other classes", {"num_classes": 3}, "b.safetensors: "),
    ("without an input", {"input": "left out"}, "field 'input' is missing"),
    ("of another channel order", {"input": {"channel_order": "XYZ"}}, "input.channel_order' must be"),
    (
        "with a mean of two",
        {"input": {"channel_order": "RGB", "mean": [0, 0], "std": [1, 1, 1]}},
        "input.mean' must be",
    ),
    ("with another checksum", {"sha256": "0" * 64}, "sha256 differs"),
    ("with a checksum of numbers", {"sha256": 7}, "field 'sha256' has the wrong type"),
    ("with levels as a list", {"levels": []}, "field 'levels' has the wrong type"),
):
    case(f"card {name}", "check", says)(card(**changes))
case("card edited", "check", r"b\.json: damaged, or edited by hand .*; get it again, or if you edited it, remove")(
    lambda root: flip(root / "backbones" / "b.json", b'"seed": null', b'"seed": 1234')
)
put("card cut off", "check", "backbones/b.json", "{", r"b\.json: not valid JSON")
put("card a list", "check", "backbones/b.json", "[]", r"b\.json: not a backbone card")


@case("card of 100 MB", "check", r"b\.json: \d+ bytes is too large for a card")
def _(root):
    os.truncate(root / "backbones" / "b.json", 100 << 20)


@case("card missing", "check", r"its card b\.json is missing")
def _(root):
    (root / "backbones" / "b.json").unlink()


@case("weights missing", "check", r"not found|the weights are not")
def _(root):
    (root / "backbones" / "b.safetensors").unlink()


FILE = "backbones/b.safetensors"
for name, content, says in (
    ("empty", b"", "damaged, or not a safetensors file"),
    ("text", b"hello hello hello", "damaged, or not a safetensors file"),
    ("a header of 2^60 bytes", struct.pack("<Q", 1 << 60) + b"{}", "damaged, or not a safetensors file"),
    ("a header that is no JSON", struct.pack("<Q", 4) + b"nope", "damaged, or not a safetensors file"),
    ("other names", struct.pack("<Q", 2) + b"{}", "these weights don't fit the model: 62 missing"),
):
    put(f"safetensors {name}", "check", FILE, content, rf"b\.safetensors: .*({says})")


@case("safetensors cut off", "check", r"b\.safetensors: damaged")
def _(root):
    os.truncate(root / FILE, 5000)


@case("safetensors with one bit changed", "check", r"b\.safetensors: the weights are not those of the card")
def _(root):
    data = bytearray((root / FILE).read_bytes())
    data[-5] ^= 1
    (root / FILE).write_bytes(data)


# --- the registry

for name, says in (("nix", "not found"), ("../b", "no such backbone|can't name"), ("a b", "can't name a backbone")):
    case(f"registry {name}", "registry", says, name)(lambda root: None)
case("registry a folder that is not there", "root", "no such folder")(lambda root: None)


# --- checkpoints and pickles


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def zipped(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


POINT = "checkpoints/step-00000003.pt"
for name, content, says in (
    ("empty", b"", "damaged checkpoint, or not one"),
    ("text", b"hello", "damaged checkpoint, or not one"),
    ("a plain pickle", pickle.dumps({"step": 3}), "damaged checkpoint, or not one"),
):
    put(f"checkpoint {name}", "replay", POINT, content, rf"step-00000003\.pt: {says}")
case("checkpoint of something else", "replay", r"step-00000003\.pt: not a step to run again")(lambda root: None)


@case("checkpoint cut off", "replay", r"step-00000003\.pt: damaged checkpoint")
def _(root):
    os.truncate(root / POINT, (root / POINT).stat().st_size // 2)


@case("checkpoint with one bit changed", "replay", r"step-00000003\.pt: damaged checkpoint")
def _(root):
    data = bytearray((root / POINT).read_bytes())
    at = data.index(struct.pack("<f", 1.0))
    data[at] ^= 1
    (root / POINT).write_bytes(data)


@case("checkpoint that would run code", "replay", r"step-00000003\.pt: damaged checkpoint, or not one")
def _(root):
    torch.save({"step": 3, "x": Evil()}, root / POINT)


@case("checkpoint a zip of something else", "replay", r"step-00000003\.pt: damaged checkpoint, or not one")
def _(root):
    zipped(root / POINT, {"a.txt": "b"})


@case("weights that would run code", "convert", r"w\.pth: not opened: it is a pickle that holds more than weights")
def _(root):
    torch.save({"x": Evil()}, root / "w.pth")


@case("weights in an old pickle that would run code", "convert", r"w\.pth: not opened: it is a pickle")
def _(root):
    (root / "w.pth").write_bytes(pickle.dumps(Evil()))


@case("weights of Detectron2's model zoo", "zoo", r"w\.pkl: not opened: .* runs whatever code .* --trust-pickle")
def _(root):
    (root / "w.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(3)}, "__author__": "x"}))


@case("weights that are a list", "convert", r"w\.pth: not a state dict")
def _(root):
    torch.save([torch.ones(3)], root / "w.pth")


@case("weights of nobody", "convert", r"w\.pth: ")
def _(root):
    torch.save({"nix": torch.ones(3)}, root / "w.pth")


put("weights that are text", "convert", "w.pth", "not weights", r"w\.pth: not a weights file")
put("weights that are an image", "convert", "w.pth", png(4, 4), r"w\.pth: not a weights file")
case("weights that are not there", "convert", r"w\.pth: no such weights file")(lambda root: None)


# --- reports and projects

put("report cut off", "report", "report/results.json", "{", r"results\.json: not valid JSON")
put("report a list", "report", "report/results.json", "[]", r"results\.json: not the results of a comparison")
put("report of nothing", "report", "report/results.json", "{}", r"results\.json|results: ")
put("report with rows of text", "report", "report/results.json", '{"rows": ["x"]}', r"rows|results")
case("report missing", "report", r"results\.json: no such file")(lambda root: None)
case("project of too few images", "init", r"too few images in nst_det_train")(lambda root: None)

EXTRA = {
    "registry": lambda root, name: ["backbones", "--check", name],
    "root": lambda root: ["backbones", "--root", root / "nowhere"],
    "zoo": lambda root: ["convert", "--weights", root / "w.pkl", "--to", "detectron2", "--output", root / "c.pth"],
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_changed(name, tree, refused, words, monkeypatch, tmp_path):
    change, command, says, more = CASES[name]
    monkeypatch.chdir(tmp_path)
    change(tree)
    more = [str(word).replace("TREE", str(tree)) for word in more]
    told = EXTRA[command](tree, *more) if command in EXTRA else words(tree, command, *more)
    line = refused(tree, *told)
    assert re.search(says, line), line
    assert not (tmp_path / "PWNED").exists()


def test_there_are_enough_of_them():
    assert len(CASES) >= 120
