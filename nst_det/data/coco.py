"""COCO's object detection JSON as a VOC folder, the form in which everything else here reads data.

A box [x, y, width, height] in pixels from 0 becomes (x + 1, y + 1, x + width, y + height), counted from 1 with both
ends inside, so that reading it gives back x, y, x + width, y + height.  ``iscrowd`` becomes ``difficult``: neither is
trained on nor counted.  Segmentations are left out.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nst_det.data.annotation import MAX_PIXELS, VocAnnotation, VocObject
from nst_det.data.images import MAX_IMAGE_BYTES, image_size
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, shown, shown_path
from nst_det.data.synthetic import voc_xml
from nst_det.data.voc import IMAGE_EXTENSIONS, split_path
from nst_det.engine.io import read_json
from nst_det.errors import UserError

# the lists that two files become; one file becomes none, and the lists are cut later
SPLITS = ("train", "test")


@dataclass(frozen=True)
class CocoSource:
    """COCO annotations and their images.

    Attributes:
        files: one JSON file, or one to train on and one to test on.
        images: the folder that their ``file_name`` are in; or one for each file.

    Raises:
        UserError: other numbers of files or folders.
    """

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

    Args:
        source: what to convert.
        root: the VOC folder to make.

    Returns:
        ``root``.

    Raises:
        UserError: what is wrong in the JSON, or with an image: the line names file and entry.
    """
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
    folders = source.images * len(source.files) if len(source.images) == 1 else source.images
    seen: dict[str, str] = {}
    for number, (file, folder) in enumerate(zip(source.files, folders)):
        if not folder.is_dir():
            raise UserError(f"--images {shown_path(folder)}: no such folder; name the one that holds the images")
        ids = []
        for name, annotation in read_coco(file):
            if annotation.id in seen:
                raise UserError(
                    f"{shown_path(file)}: images '{shown(seen[annotation.id])}' and '{shown(name)}' would both be "
                    f"called {annotation.id}; rename one, or take it out of one list"
                )
            seen[annotation.id] = name
            ids.append(annotation.id)
            _take_image(folder, name, annotation, root, file)
            (root / "Annotations" / f"{annotation.id}.xml").write_text(voc_xml(annotation, root.name), encoding="utf-8")
        if len(source.files) > 1:
            split_path(root, SPLITS[number]).write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")
    return root


def read_coco(file: Path) -> Iterator[tuple[str, VocAnnotation]]:
    """(``file_name``, annotation) of every image in a COCO JSON file, in its order; those without objects too.

    Raises:
        UserError: not COCO's object detection format, or an entry that can't be used; the line names it.
    """
    tree = read_json(file)
    where = shown_path(file)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: not COCO's object detection format: no object with images, annotations, categories")
    images, annotations, categories = (_entries(tree, key, where) for key in ("images", "annotations", "categories"))
    names = _category_names(categories, where)
    objects: dict[Any, list[VocObject]] = {}
    for number, entry in enumerate(images):
        id_ = _field(entry, "id", (int, str), f"{where}: images[{number}]")
        if id_ in objects:
            raise UserError(f"{where}: images[{number}]: the id {id_!r} stands there twice; give each image its own")
        objects[id_] = []
    for number, entry in enumerate(annotations):
        at = f"{where}: annotations[{number}]"
        image = _field(entry, "image_id", (int, str), at)
        category = _field(entry, "category_id", (int, str), at)
        if image not in objects:
            raise UserError(f"{at}: image_id {image!r} is not among the images; remove it or add the image")
        if category not in names:
            raise UserError(
                f"{at}: category_id {category!r} is not among the categories; remove it or add the category"
            )
        objects[image].append(VocObject(names[category], _box(entry, at), difficult=bool(entry.get("iscrowd", 0))))
    if not images:
        raise UserError(f"{where}: no image in it")
    for number, entry in enumerate(images):
        at = f"{where}: images[{number}]"
        name = _field(entry, "file_name", (str,), at)
        size = [_field(entry, side, (int,), at) for side in ("width", "height")]
        if not all(1 <= side <= MAX_PIXELS for side in size):
            raise UserError(f"{at}: its size is {size[0]}x{size[1]}; write the image's size in pixels")
        yield name, VocAnnotation(_voc_id(name, at), size[0], size[1], tuple(objects[entry["id"]]))


def _entries(tree: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = tree.get(key)
    if not isinstance(value, list):
        raise UserError(f"{where}: not COCO's object detection format: it has no list '{key}'")
    return value


def _field(entry: Any, key: str, types: tuple[type, ...], at: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        said = "is missing" if value is None else f"is {shown(repr(value), 60)}"
        raise UserError(f"{at}: its {key} {said}; COCO's object detection format wants {_article(types)}")
    return value


def _article(types: Sequence[type]) -> str:
    return " or ".join({int: "a whole number", str: "text", list: "a list"}[kind] for kind in types)


def _category_names(categories: Sequence[Any], where: str) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for number, entry in enumerate(categories):
        at = f"{where}: categories[{number}]"
        id_, name = _field(entry, "id", (int, str), at), _field(entry, "name", (str,), at).strip()
        if id_ in names or name in names.values():
            raise UserError(f"{at}: id {id_!r} or name '{shown(name)}' stands there twice; give each category its own")
        if not name or not name.isprintable() or len(name) > 200:
            raise UserError(f"{at}: its name '{shown(name)}' is empty, too long or can't be printed; correct it")
        names[id_] = name
    return names


def _box(entry: Mapping[str, Any], at: str) -> tuple[float, float, float, float]:
    box = _field(entry, "bbox", (list,), at)
    numbers = [v for v in box if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MAX_PIXELS]
    if len(box) != 4 or len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{at}: its bbox is {shown(repr(box), 60)}; write [x, y, width, height] in pixels")
    x, y, width, height = numbers
    return (x + 1, y + 1, x + width, y + height)


def _voc_id(name: str, at: str) -> str:
    path = PurePosixPath(name)
    problem = next(filter(None, map(name_problem, path.parts)), None if path.parts else "is empty")
    if problem or path.is_absolute():
        raise UserError(f"{at}: file_name '{shown(name)}' {problem or 'leads outside the folder'}; correct it")
    if path.suffix.lower() not in IMAGE_EXTENSIONS:
        raise UserError(f"{at}: '{shown(name)}' is not one of {', '.join(IMAGE_EXTENSIONS)}; convert the image")
    id_ = "_".join(path.with_suffix("").parts)
    problem = name_problem(id_)
    if problem:
        raise UserError(f"{at}: file_name '{shown(name)}' {problem}; shorten it")
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
