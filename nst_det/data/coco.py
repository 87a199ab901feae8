"""COCO's object detection JSON as a VOC folder, the form in which everything else here reads data.

A box [x, y, width, height] in pixels from 0 becomes (x + 1, y + 1, x + width, y + height), counted from 1 with both
ends inside, so that reading it gives back x, y, x + width, y + height.  ``iscrowd`` becomes ``difficult``: neither is
trained on nor counted.  Segmentations are left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nst_det.data.annotation import MAX_PIXELS, VocAnnotation, VocObject, voc_xml
from nst_det.data.images import MAX_IMAGE_BYTES, image_size
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, shown, shown_path
from nst_det.data.voc import IMAGE_EXTENSIONS, split_path
from nst_det.engine.io import read_json
from nst_det.errors import UserError

# the lists that two files become; one file becomes none, and the lists are cut later
SPLITS = ("train", "test")


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
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
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
            split_path(root, split).write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")
    return root


def read_coco(file: Path) -> Iterator[tuple[str, VocAnnotation]]:
    """Yield (``file_name``, annotation) of every image in a COCO JSON file, in its order; those without objects too.

    The error names the entry that can't be used.
    """
    tree, where = read_json(file), shown_path(file)
    images = coco_names(tree, "images", "file_name", where, int, str)
    categories = {id_: name.strip() for id_, name in coco_names(tree, "categories", "name", where, int, str).items()}
    for number, name in enumerate(categories.values()):
        at = f"{where}: categories[{number}]"
        if not name or not name.isprintable() or len(name) > 200:
            raise UserError(f"{at}: its name '{shown(name)}' is empty, too long or can't be printed; correct it")
        if name in list(categories.values())[:number]:
            raise UserError(f"{at}: the name '{shown(name)}' stands there twice; give each category its own")
    objects: dict[int | str, list[VocObject]] = {id_: [] for id_ in images}
    for at, entry in coco_entries(tree, "annotations", where):
        image, category = coco_field(entry, "image_id", at, int, str), coco_field(entry, "category_id", at, int, str)
        if image not in images:
            raise UserError(f"{at}: image_id {image!r} is not among the images; remove it, or add that")
        if category not in categories:
            raise UserError(f"{at}: category_id {category!r} is not among the categories; remove it, or add that")
        objects[image].append(VocObject(categories[category], _box(entry, at), difficult=bool(entry.get("iscrowd", 0))))
    if not images:
        raise UserError(f"{where}: no image in it")
    for at, entry in coco_entries(tree, "images", where):
        width, height = (coco_field(entry, side, at, int) for side in ("width", "height"))
        if not (1 <= width <= MAX_PIXELS and 1 <= height <= MAX_PIXELS):
            raise UserError(f"{at}: its size is {width}x{height}; write the image's size in pixels")
        name = images[entry["id"]]
        yield name, VocAnnotation(_voc_id(name, at), width, height, tuple(objects[entry["id"]]))


def coco_names(tree: Any, key: str, name: str, where: str, *types: type) -> dict[Any, str]:
    """Return the names of COCO's images (``file_name``) or categories (``name``) by id, of one of ``types``."""
    names: dict[Any, str] = {}
    for at, entry in coco_entries(tree, key, where):
        id_ = coco_field(entry, "id", at, *types)
        if id_ in names:
            raise UserError(f"{at}: the id {id_!r} stands there twice; give each its own")
        names[id_] = coco_field(entry, name, at, str)
    return names


def coco_entries(tree: Any, key: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield each entry of one of the file's lists, and its place for errors."""
    entries = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{where}: not COCO's object detection format: it has no list '{key}'")
    for number, entry in enumerate(entries):
        yield f"{where}: {key}[{number}]", entry


def coco_field(entry: Any, key: str, at: str, *types: type) -> Any:
    """Return a field that must be of one of ``types``."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        found = "is missing" if value is None else f"is {shown(repr(value), 60)}"
        wanted = " or ".join({int: "a whole number", str: "text", list: "a list"}[kind] for kind in types)
        raise UserError(f"{at}: its {key} {found}; COCO's object detection format wants {wanted}")
    return value


def _box(entry: Mapping[str, Any], at: str) -> tuple[float, float, float, float]:
    box = coco_field(entry, "bbox", at, list)
    # NaN is not smaller than anything
    numbers = [v for v in box if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MAX_PIXELS]
    if len(box) != 4 or len(numbers) != 4:
        raise UserError(f"{at}: its bbox is {shown(repr(box), 60)}; write [x, y, width, height] in pixels")
    x, y, width, height = numbers
    return (x + 1, y + 1, x + width, y + height)


def _voc_id(name: str, at: str) -> str:
    path = PurePosixPath(name)
    id_ = "_".join(path.with_suffix("").parts) if path.name else ""
    # the parts may not lead elsewhere, nor may all of them together be too long
    problem = next(filter(None, map(name_problem, (*path.parts, id_))), None)
    if path.is_absolute() or problem:
        raise UserError(f"{at}: file_name '{shown(name)}' {problem or 'leads outside the folder'}; correct it")
    if path.suffix.lower() not in IMAGE_EXTENSIONS:
        raise UserError(f"{at}: '{shown(name)}' is not one of {', '.join(IMAGE_EXTENSIONS)}; convert the image")
    return id_


def _take_image(folder: Path, name: str, annotation: VocAnnotation, root: Path, file: Path) -> None:
    path = folder / name
    if leads_outside(path, folder.resolve()):
        raise UserError(f"{shown_path(path)}: leads outside {shown_path(folder)}; put the image itself there")
    if not path.is_file():
        raise UserError(f"{shown_path(path)}: no such image, but {shown_path(file)} names it; add it or take it out")
    size = image_size(read_bytes(path, MAX_IMAGE_BYTES, "image"), shown_path(path))
    if size != (annotation.width, annotation.height):
        raise UserError(
            f"{shown_path(path)}: the image is {size[0]}x{size[1]}, but {shown_path(file)} says "
            f"{annotation.width}x{annotation.height}; correct width and height there"
        )
    target = root / "JPEGImages" / f"{annotation.id}{path.suffix}"
    try:
        os.link(path.resolve(), target)
    except OSError:
        # another file system, or one without hard links
        shutil.copyfile(path, target)
