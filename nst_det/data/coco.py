"""COCO's object detection JSON as a VOC folder, the form in which everything else here reads data.

A box [x, y, width, height] in pixels from 0 becomes (x + 1, y + 1, x + width, y + height), counted from 1 with both
ends inside, so that reading it gives back x, y, x + width, y + height.  ``iscrowd`` becomes ``difficult``: neither is
trained on nor counted.  Segmentations are left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nst_det.data.annotation import MAX_PIXELS, VocAnnotation, VocObject, voc_xml
from nst_det.data.images import EXTENSIONS, MAX_IMAGE_BYTES, image_size
from nst_det.data.safe_io import is_number, leads_outside, name_problem, read_bytes, shown, shown_path
from nst_det.data.voc import make_voc_folders, write_split
from nst_det.engine.io import read_json
from nst_det.errors import UserError

# the lists that two files become; one file becomes none, and the lists are cut later
SPLITS = ("train", "test")
KINDS = {int: "a whole number", str: "text", list: "a list"}


@dataclass(frozen=True)
class CocoSource:
    """One JSON file, or one to train on and one to test on; and the folder of their images, or one for each file."""

    files: tuple[Path, ...]
    images: tuple[Path, ...]

    def __post_init__(self) -> None:
        if len(self.files) not in (1, 2) or len(self.images) not in (1, len(self.files)):
            raise UserError(
                "--coco: give one JSON file or two (to train and to test on), and by --images one folder, or one each"
            )


def convert_coco(source: CocoSource, root: Path) -> Path:
    """Write a VOC folder; images are hard links to the files, or copies where that can't be.

    An image's id is its ``file_name`` without extension, folders joined by ``_``.
    """
    make_voc_folders(root)
    folders = source.images * len(source.files) if len(source.images) == 1 else source.images
    name_of: dict[str, str] = {}
    for split, file, folder in zip(SPLITS, source.files, folders):
        if not folder.is_dir():
            raise UserError(f"--images {shown_path(folder)}: no such folder; name the one that holds the images")
        ids = []
        for name, annotation in read_coco(file):
            id_ = annotation.id
            if id_ in name_of:
                raise UserError(
                    f"{shown_path(file)}: images '{shown(name_of[id_])}' and '{shown(name)}' would both be called "
                    f"{id_}; rename one, or take it out of one list"
                )
            name_of[id_] = name
            ids.append(id_)
            _take_image(folder, name, annotation, root, file)
            text = voc_xml(annotation, f"{id_}.jpg", root.name)
            (root / "Annotations" / f"{id_}.xml").write_text(text, encoding="utf-8")
        if len(source.files) > 1:
            write_split(root, split, ids)
    return root


def read_coco(file: Path) -> Iterator[tuple[str, VocAnnotation]]:
    """Yield (``file_name``, annotation) of every image in a COCO JSON file, in its order; those without objects too."""
    tree, where = read_json(file), shown_path(file)
    images = coco_names(tree, "images", "file_name", where, int, str)
    categories = {id_: name.strip() for id_, name in coco_names(tree, "categories", "name", where, int, str).items()}
    for number, name in enumerate(categories.values()):
        at = f"{where}: categories[{number}]"
        if not name or not name.isprintable() or len(name) > 200:
            raise UserError(f"{at}: its name '{shown(name)}' is empty, too long or can't be printed; correct it")
        if name in list(categories.values())[:number]:
            raise UserError(f"{at}: the name '{shown(name)}' is taken; give each category its own")
    objects: dict[int | str, list[VocObject]] = {id_: [] for id_ in images}
    for at, entry in _entries(tree, "annotations", where):
        image, category = _field(entry, "image_id", at, int, str), _field(entry, "category_id", at, int, str)
        for key, value, known in (("image_id", image, images), ("category_id", category, categories)):
            if value not in known:
                raise UserError(f"{at}: {key} {value!r} is not in the file; remove the annotation, or correct it")
        box = _field(entry, "bbox", at, list)
        if len(box) != 4 or not all(is_number(value, MAX_PIXELS) for value in box):
            raise UserError(f"{at}: its bbox is {shown(repr(box), 60)}; write [x, y, width, height] in pixels")
        x, y, width, height = box
        corners = (x + 1, y + 1, x + width, y + height)
        objects[image].append(VocObject(categories[category], corners, difficult=bool(entry.get("iscrowd", 0))))
    if not images:
        raise UserError(f"{where}: no image in it")
    for at, entry in _entries(tree, "images", where):
        width, height = (_field(entry, side, at, int) for side in ("width", "height"))
        if not (1 <= width <= MAX_PIXELS and 1 <= height <= MAX_PIXELS):
            raise UserError(f"{at}: its size is {width}x{height}; write the image's size in pixels")
        name = images[entry["id"]]
        yield name, VocAnnotation(_voc_id(name, at), width, height, tuple(objects[entry["id"]]))


def coco_names(tree: Any, key: str, name: str, where: str, *types: type) -> dict[Any, str]:
    """Return the names of COCO's images (``file_name``) or categories (``name``) by id, of one of ``types``."""
    names: dict[Any, str] = {}
    for at, entry in _entries(tree, key, where):
        id_ = _field(entry, "id", at, *types)
        if id_ in names:
            raise UserError(f"{at}: the id {id_!r} is taken; give each its own")
        names[id_] = _field(entry, name, at, str)
    return names


def _entries(tree: Any, key: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield each entry of one of the file's lists, and its place for errors."""
    entries = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{where}: not COCO's object detection format: it has no list '{key}'")
    for number, entry in enumerate(entries):
        yield f"{where}: {key}[{number}]", entry


def _field(entry: Any, key: str, at: str, *types: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        found = "is missing" if value is None else f"is {shown(repr(value), 60)}"
        wanted = " or ".join(KINDS[kind] for kind in types)
        raise UserError(f"{at}: its {key} {found}; COCO's object detection format wants {wanted}")
    return value


def _voc_id(name: str, at: str) -> str:
    path = PurePosixPath(name)
    id_ = "_".join(path.with_suffix("").parts) if path.name else ""
    # neither a part may lead elsewhere, nor may all of them together be too long
    problem = next(filter(None, map(name_problem, (*path.parts, id_))), None)
    if problem:
        raise UserError(f"{at}: file_name '{shown(name)}' {problem}; correct it")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"{at}: '{shown(name)}' is not one of {', '.join(EXTENSIONS)}; convert the image")
    return id_


def _take_image(folder: Path, name: str, annotation: VocAnnotation, root: Path, file: Path) -> None:
    path = folder / name
    if leads_outside(path, folder.resolve()):
        raise UserError(f"{shown_path(path)}: leads outside {shown_path(folder)}; put the image itself there")
    width, height = image_size(
        read_bytes(path, MAX_IMAGE_BYTES, f"image, named by {shown_path(file)}"), shown_path(path)
    )
    if (width, height) != (annotation.width, annotation.height):
        raise UserError(
            f"{shown_path(path)}: the image is {width}x{height}, but {shown_path(file)} says "
            f"{annotation.width}x{annotation.height}; correct width and height there"
        )
    target = root / "JPEGImages" / f"{annotation.id}{path.suffix}"
    try:
        os.link(path.resolve(), target)
    except OSError:
        # another file system, or one without hard links
        shutil.copyfile(path, target)
