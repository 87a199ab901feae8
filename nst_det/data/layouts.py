"""Folders of images with boxes as people have them, recognized by what is in them.

A file's *place* is its path without the folders that only say what it is (``images``, ``labels``, ``Annotations``) and
without its split (``train``, ``valid``); an image and an annotation belong together if their places are the same.  That
one rule reads flat folders, ``images/`` beside ``annotations/``, and ``train/ valid/ test/`` above or below either.

What is not a VOC folder already is copied into a project as one (images are hard links where they can be), so that
training, evaluation and both engines read a single form.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nst_det.data.annotation import voc_xml
from nst_det.data.images import EXTENSIONS, MAX_IMAGE_BYTES, image_size
from nst_det.data.safe_io import leads_outside, read_bytes, read_text, shown_path
from nst_det.data.voc import (
    MAX_LIST_BYTES,
    annotation_files,
    composed,
    files_by_id,
    find_voc_root,
    ids_of_path,
    image_names,
    make_voc_folders,
    scan_list,
    walk_files,
    write_split,
)
from nst_det.data.yolo import MAX_LABEL_BYTES, YoloClasses, find_classes, looks_like_yolo, parse_yolo
from nst_det.engine.io import link_or_copy
from nst_det.errors import UserError

IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
LABEL_FOLDERS = ("annotations", "annotation", "labels", "label", "xmls", "xml")
# such as train, valid, trainval, train2017 and obj_train_data
_SPLIT = re.compile(r"(?:obj_)?(trainval|train|val|test)(?:ing|id|idation)?(?:_data)?[-_]?\d*", re.IGNORECASE)
# text that comes with labels and is none
_NO_LABEL = re.compile(r"(classes|trainval|train|valid|val|test|license|readme.*)\.txt", re.IGNORECASE)
_CONVERT = "export or convert it to Pascal VOC, YOLO or COCO's JSON"
_COCO = "nst-det init NAME --coco FILE [TEST_FILE] --images FOLDER [TEST_FOLDER] takes it"
# extension, words near the beginning, what it is, and what to do
_OTHER_FORMATS = (
    (".json", ('"shapes"', '"points"'), "LabelMe's JSON", _CONVERT),
    (".json", ('"shape_attributes"',), "the JSON of VGG's Image Annotator", _CONVERT),
    (".json", ('"coordinates"', '"annotations"'), "CreateML's JSON", _CONVERT),
    (".json", ('"result"', '"data"'), "Label Studio's JSON", _CONVERT),
    (".json", ('"images"', '"file_name"'), "COCO's JSON", _COCO),
    (".json", ('"categories"', '"annotations"'), "COCO's JSON", _COCO),
    (".json", ('"image_id"', '"bbox"'), "COCO's JSON", _COCO),
    (".xml", ("<annotations>",), "CVAT's own XML", _CONVERT),
    (".xml", ("<dataset", "<images>"), "dlib's XML", _CONVERT),
    (".csv", (), "a table of boxes", _CONVERT),
    (".tfrecord", (), "a TFRecord", _CONVERT),
)


@dataclass(frozen=True)
class Layout:
    """Which files of a folder belong together, by the image's id."""

    kind: str
    root: Path
    images: dict[str, Path]
    annotations: dict[str, Path]
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)  # train, val, test or trainval, as the folders say
    classes: YoloClasses | None = None  # for YOLO alone
    unused: dict[Path, str] = field(default_factory=dict)  # images of an id that another one has
    is_voc: bool = False  # read where it is

    @cached_property
    def ids(self) -> set[str]:
        """The ids of all images and annotations."""
        return {*self.images, *self.annotations}

    def list_files(self) -> dict[str, Path]:
        """Return the lists in ``ImageSets/Main`` by name."""
        return {path.stem: path for path in sorted((self.root / "ImageSets" / "Main").glob("*.txt"))}


def find_layout(root: str | Path) -> Layout | None:
    """Return the layout of a folder with images and boxes; None where it has no boxes.

    A format that is recognized but not read is an error, which says what to do.
    """
    root = Path(root).expanduser()
    if root.is_file():
        remedy = {".json": _COCO, ".zip": "unpack it and name the folder"}.get(root.suffix.lower(), "name its folder")
        raise UserError(f"{shown_path(root)}: a file, not a folder; {remedy}")
    try:
        voc = find_voc_root(root)
    except UserError as error:
        if not root.is_dir():
            raise
        other = _other_layout(root.resolve())
        # VOC2007 and VOC2012 are two data sets; train and test are parts of one
        if str(error).startswith(f"{shown_path(root)}: several ") and not (other and other.splits):
            raise
        if other is None:
            _refuse_other_format(root)
        return other
    folder = voc / "JPEGImages"
    if not folder.is_dir():
        return _other_layout(root.resolve()) or Layout("VOC folder", voc, {}, annotation_files(voc), is_voc=True)
    if not any((voc / "ImageSets" / "Main").glob("*.txt")):
        other = _other_layout(voc)
        if other and other.splits:
            return other
    images = {id_: folder / name for id_, name in image_names(folder).items()}
    unused = {folder / name: id_ for id_, name in files_by_id(folder, EXTENSIONS) if images[id_] != folder / name}
    return Layout("VOC folder", voc, images, annotation_files(voc), unused=unused, is_voc=True)


def _other_layout(root: Path) -> Layout | None:
    files = [file for file in walk_files(root) if "imagesets" not in file.lower().split("/")]
    images = _inside(files, EXTENSIONS, IMAGE_FOLDERS)
    xmls, texts = (_inside(files, (kind,), LABEL_FOLDERS) for kind in (".xml", ".txt"))
    for labels in (xmls, texts):
        places = _places([*images, *labels])
        # of two images at one place that with the first extension is taken, as in a VOC folder
        order = sorted(images, key=lambda file: EXTENSIONS.index(_extension(file)), reverse=True)
        image_at, label_at = ({places[file]: file for file in part} for part in (order, labels))
        common = [place for place in label_at if place in image_at]
        if common and (labels is xmls or _is_yolo(root, [label_at[place] for place in common], files)):
            break
    else:
        return None
    classes = None
    if labels is texts:
        classes = find_classes(root, files)
        if classes is None:
            raise UserError(
                f"{shown_path(root)}: labels as YOLO's, but no class names; add data.yaml with names, or classes.txt"
            )
        label_at = {place: file for place, file in label_at.items() if place in image_at or not _NO_LABEL.search(file)}
    splits_of = defaultdict(set)
    for split, name in {*image_at, *label_at}:
        splits_of[name].add(split)
    id_of = {
        (split, name): f"{split}_{name}" if split and len(splits_of[name]) > 1 else name
        for split, name in {*image_at, *label_at}
    }
    # an image of YOLO's without a label is one without objects
    usable = image_at if classes else common
    splits: dict[str, list[str]] = defaultdict(list)
    for place in sorted(usable):
        if place[0]:
            splits[place[0]].append(id_of[place])
    listed = {split: tuple(ids) for split, ids in splits.items()}
    return Layout(
        "YOLO folder" if classes else "folder of VOC annotations",
        root,
        {id_of[place]: root / file for place, file in sorted(image_at.items())},
        {id_of[place]: root / file for place, file in sorted(label_at.items())},
        listed or _listed_at_top(root, files, [id_of[place] for place in usable]),
        classes,
        {root / file: id_of[places[file]] for file in images if image_at[places[file]] != file},
    )


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _inside(files: Sequence[str], extensions: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return the files of a kind inside one of these folders, or all where none is: masks may be beside ``images``."""
    kind = [file for file in files if _extension(file) in extensions]
    return [file for file in kind if not set(file.lower().split("/")[:-1]).isdisjoint(folders)] or kind


def _places(files: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return split (such as ``train``, or "") and name of each file, without the folders above all."""
    folders = {
        file: [name for name in file.split("/")[:-1] if name.lower() not in (*IMAGE_FOLDERS, *LABEL_FOLDERS)]
        for file in files
    }
    above = 0
    for level in zip(*folders.values()):
        if len(set(level)) > 1 or _SPLIT.fullmatch(level[0]):
            break
        above += 1
    places = {}
    for file, names in folders.items():
        left = names[above:]
        split = _SPLIT.fullmatch(left[0]) if left else None
        stem = os.path.splitext(file.rpartition("/")[2])[0]
        name = composed("_".join([*(left[1:] if split else left), stem]))
        places[file] = (split[1].lower() if split else "", name)
    return places


def _is_yolo(root: Path, labels: Sequence[str], files: Sequence[str]) -> bool:
    """Return whether the first label that isn't empty has numbers, or all are and there are class names."""
    for file in labels:
        text = read_text(root / file, MAX_LABEL_BYTES, "label")
        if text.strip():
            return looks_like_yolo(text)
    return find_classes(root, files) is not None


def _listed_at_top(root: Path, files: Sequence[str], ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the lists of image files (``train.txt``) that Darknet and YOLO have beside the folders."""
    splits, known = {}, set(ids)
    for file in files:
        match = _SPLIT.fullmatch(file.removesuffix(".txt"))
        if match and file.endswith(".txt"):
            lines = read_text(root / file, MAX_LIST_BYTES, "list").splitlines()
            # the end of its path says which image is meant, wherever the data was when the list was made
            paths = (line.strip("\"' \t") for line in lines)
            found = (next((id_ for id_ in ids_of_path(path) if id_ in known), None) for path in paths)
            splits[match[1].lower()] = tuple(dict.fromkeys(id_ for id_ in found if id_))
    return {split: part for split, part in splits.items() if part}


def convert_layout(layout: Layout, root: Path) -> Path:
    """Write a VOC folder of the images that have annotations; XML is copied as it is."""
    make_voc_folders(root)
    taken = {}
    for id_, image in layout.images.items():
        annotation = layout.annotations.get(id_)
        if (annotation is None and not layout.classes) or any(
            path is not None and leads_outside(path, layout.root) for path in (image, annotation)
        ):
            continue
        taken[id_] = image
        target = root / "Annotations" / f"{id_}.xml"
        if layout.classes:
            size = image_size(read_bytes(image, MAX_IMAGE_BYTES, "image"), shown_path(image))
            text = read_text(annotation, MAX_LABEL_BYTES, "label") if annotation else ""
            parsed, _ = parse_yolo(text, id_, size, layout.classes)
            target.write_text(voc_xml(parsed, image.name, root.name), encoding="utf-8")
        elif annotation:
            shutil.copyfile(annotation, target)
        link_or_copy(image, root / "JPEGImages" / f"{id_}{image.suffix}")
    lists = dict(layout.splits)
    scanned = {name: scan_list(path, lambda: layout.ids) for name, path in layout.list_files().items()}
    lists |= {name: found[0] for name, found in scanned.items() if found}
    for name, ids in lists.items():
        write_split(root, name, (id_ for id_ in ids if id_ in taken))
    return root


def _refuse_other_format(root: Path) -> None:
    """Refuse a folder whose boxes are in a form that isn't read."""
    files = [file for file in walk_files(root) if file.count("/") <= 2]
    with_images = {file.rpartition("/")[0] for file in files if _extension(file) in EXTENSIONS}
    for file in files:
        head = ""
        if _extension(file) in (".json", ".xml"):
            with open(root / file, "rb") as stream:
                head = stream.read(1 << 20).decode("utf-8", "replace")
        for extension, keys, what, remedy in _OTHER_FORMATS:
            # a table may be beside class folders, too
            fits = all(key in head for key in keys) and (keys or file.rpartition("/")[0] in with_images)
            if _extension(file) == extension and fits:
                raise UserError(f"{shown_path(root / file)}: looks like {what}; {remedy}")
