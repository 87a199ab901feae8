"""COCO's object detection JSON: read whole, with every fault in it, and written as a VOC folder.

A box [x, y, width, height] in pixels from 0 becomes (x + 1, y + 1, x + width, y + height), counted from 1 with both
ends inside, so that reading it gives back x, y, x + width, y + height.  What is marked ``iscrowd``, ``ignore`` or
``difficult`` becomes ``difficult``: neither trained on nor counted.  Of a box with a ``rotation`` (degrees, about its
middle) the upright box around it is taken.  Segmentations are left out.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from nst_det.data.annotation import MAX_PIXELS, NO_AREA, VocAnnotation, VocObject, is_class_name, voc_xml
from nst_det.data.images import EXTENSIONS
from nst_det.data.safe_io import is_number, leads_outside, name_problem, shown, shown_path
from nst_det.data.voc import composed, make_voc_folders, walk_files, with_size_of, write_split
from nst_det.engine.io import link_or_copy, read_json
from nst_det.errors import UserError

# the lists that two files become; one file becomes none, and the lists are cut later
SPLITS = ("train", "test")
# kinds of faults that a conversion doesn't survive, and others
BAD, MISSING, OTHER_FORM, TURNED = "bad annotation", "missing image", "other form of boxes", "turned box"
MAX_PATH = 1000
DIFFICULT = ("iscrowd", "ignore", "difficult")
KINDS = {int: "a whole number", str: "text", list: "a list"}
# notes a fault: its kind, the file, a line
Note = Callable[[str, Path, str], None]


@dataclass(frozen=True)
class CocoSource:
    """One JSON file, or one to train on and one to test on; and the folder of their images, or one for each file."""

    files: tuple[Path, ...]
    images: tuple[Path, ...]

    def __post_init__(self) -> None:
        if len(self.files) not in (1, 2) or len(self.images) not in (1, len(self.files)):
            raise UserError(
                "COCO: give one JSON file or two (to train and to test on); --images: one folder, or one each"
            )
        for folder in self.images:
            if not folder.is_dir():
                raise UserError(f"--images {shown_path(folder)}: no such folder; name the one that holds the images")

    def __str__(self) -> str:
        return f"{' '.join(map(shown_path, self.files))} --images {' '.join(map(shown_path, self.images))}"


@dataclass(frozen=True)
class CocoImage:
    """An image of a COCO file, and its objects; ``annotation.id`` is the name that it has in a VOC folder."""

    path: Path
    split: str  # one of SPLITS
    where: Path  # file and name, for reports
    annotation: VocAnnotation


def read_coco(source: CocoSource, note: Note) -> list[CocoImage]:
    """Return every image that is listed and there, in the files' order, without the objects that can't be used.

    An image's id is its path below the folder of images, without extension, folders joined by ``_``; where the two
    folders have images of the same name, ``train`` or ``test`` comes first.
    """
    folders = source.images * len(source.files) if len(source.images) == 1 else source.images
    found = []
    for split, file, folder in zip(SPLITS, source.files, map(_ImageFolder, folders)):
        found += [replace(image, split=split) for image in _CocoFile(file, folder, note).read()]
    if len({image.annotation.id for image in found}) < len(found) and len(set(folders)) > 1:
        named = [replace(image.annotation, id=f"{image.split}_{image.annotation.id}") for image in found]
        found = [replace(image, annotation=annotation) for image, annotation in zip(found, named)]
    by_id: dict[str, CocoImage] = {}
    for image in found:
        first = by_id.setdefault(image.annotation.id, image)
        if first.path == image.path and first is not image:
            note(BAD, image.where, f"is in {shown_path(first.where)} too; take it out of one of the two files")
        elif first is not image:
            text = f"would be called {shown(image.annotation.id)} like {shown_path(first.where)}; rename one of them"
            note(BAD, image.where, text)
    return list(by_id.values())


def write_coco_as_voc(images: Sequence[CocoImage], root: Path) -> Path:
    """Write what :func:`read_coco` found as a VOC folder; images are hard links to the files, or copies.

    Images of two files get the lists ``train`` and ``test``.
    """
    make_voc_folders(root)
    for image in images:
        annotation = image.annotation if image.annotation.width else with_size_of(image.path, image.annotation)
        target = root / "JPEGImages" / f"{annotation.id}{image.path.suffix}"
        link_or_copy(image.path, target)
        text = voc_xml(annotation, target.name, root.name)
        (root / "Annotations" / f"{annotation.id}.xml").write_text(text, encoding="utf-8")
    splits = {image.split for image in images}
    for split in splits if len(splits) > 1 else ():
        write_split(root, split, [image.annotation.id for image in images if image.split == split])
    return root


def coco_names(tree: Any, key: str, name: str, where: str) -> dict[int | str, str]:
    """Return the names of COCO's images (``file_name``) or categories (``name``) by id; the first fault is an error."""
    names: dict[int | str, str] = {}
    for at, entry in _entries(tree, key, where):
        try:
            names[_new_id(entry, names)] = _field(entry, name, str)
        except UserError as error:
            raise UserError(f"{where}: {at}: {error}") from error
    return names


def form_problem(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """Return why boxes (N, 4) seem not to be x, y, width, height in pixels of images of ``sizes`` (N, 2), or None.

    A tenth of the boxes must reach outside their images as they are, and all must fit as corners.
    """
    if not len(boxes):
        return None
    if (np.abs(boxes) <= 1).all():
        return "no value of any bbox is above 1: they seem to be fractions of the image; multiply them by its size"
    left, right = boxes[:, :2], boxes[:, 2:]
    # a pixel may be lost where a tool rounds
    outside = (left + right > sizes + 1).any(axis=1).sum()
    if 10 * outside >= len(boxes) and outside and (right > left).all() and (right <= sizes + 1).all():
        seem = f"{outside} of {len(boxes)} boxes reach outside their images, and none would as [xmin, ymin, xmax, ymax]"
        return f"{seem}; write [x, y, width, height]"
    return None


class _ImageFolder:
    """Finds images by ``file_name``, which may be a path of another machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder.resolve()

    def find(self, name: str) -> Path | None:
        """Return the image: the file of this name, or else the one that shares the most last parts of it.

        Those are the parts of a path with ``/`` or ``\\``, or of an address.  None if there is none; several that match
        equally well are an error.
        """
        address = urlsplit(name) if "://" in name else None
        parts = [part for part in re.split(r"[\\/]+", unquote(address.path) if address else name) if part]
        wrong = [part for part in parts if part not in (".", "..") and name_problem(part)]
        if not parts or parts[-1] in (".", "..") or wrong or len(name) > MAX_PATH:
            raise UserError(f"file_name '{shown(name)}' can't be the name of an image; correct it")
        path: Path | None = self.folder / name
        if name.startswith("/") or ".." in parts or not (path and path.is_file()):
            path = self._alike(name, parts)
        if path and leads_outside(path, self._root):
            raise UserError(f"{shown_path(path)} leads outside {shown_path(self.folder)}; put the file itself there")
        return path

    def _alike(self, name: str, parts: Sequence[str]) -> Path | None:
        named = self._by_name.get(composed(parts[-1]), [])
        shared = [(_shared_end(parts, path.relative_to(self.folder).parts), path) for path in named]
        most = max((count for count, _ in shared), default=0)
        best = [path for count, path in shared if count == most]
        if len(best) > 1:
            where = " and ".join(shown_path(path.relative_to(self.folder)) for path in sorted(best)[:2])
            raise UserError(f"file_name '{shown(name)}' may be {where} in {shown_path(self.folder)}; write which")
        return best[0] if best else None

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in map(Path, walk_files(self.folder)):
            found[composed(path.name)].append(self.folder / path)
        return found


def _shared_end(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(reversed(one), reversed(other)))
    return next((count for count, (a, b) in pairs if a != b), min(len(one), len(other)))


class _CocoFile:
    """One file; what is wrong with it is noted, and the rest is read."""

    def __init__(self, file: Path, folder: _ImageFolder, note: Note) -> None:
        self.file, self.folder, self.note = file, folder, note
        self.tree, self.where = read_json(file), shown_path(file)
        # place, file_name and entry by id, and names; None where there is no file_name
        self.images: dict[int | str, tuple[str, str, Any] | None] = {}
        self.categories: dict[int | str, str] = {}

    @contextmanager
    def noted(self, at: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.note(BAD, self.file, f"{at}: {error}")

    def read(self) -> list[CocoImage]:
        for at, entry in _entries(self.tree, "images", self.where):
            with self.noted(at):
                id_ = _new_id(entry, self.images)
                self.images[id_] = None
                self.images[id_] = at, _field(entry, "file_name", str), entry
        for at, entry in _entries(self.tree, "categories", self.where):
            with self.noted(at):
                self.categories[_new_id(entry, self.categories)] = _field(entry, "name", str).strip()
        objects = self.objects()
        if not self.tree["images"]:
            raise UserError(f"{self.where}: no image in it")
        found: dict[Path, tuple[int | str, CocoImage]] = {}
        for id_, at, name, entry in [(id_, *listed) for id_, listed in self.images.items() if listed]:
            with self.noted(at):
                path = self.folder.find(name)
                if path is None:
                    text = f"{at}: no image '{shown(name)}' in {shown_path(self.folder.folder)}; add it"
                    self.note(MISSING, self.file, text)
                elif path in found:
                    twice = f"'{shown(name)}' is listed twice (ids {found[path][0]!r} and {id_!r})"
                    raise UserError(f"{twice}; give the annotations of one to the other, and remove it")
                else:
                    annotation = VocAnnotation(_voc_id(path, self.folder.folder), *_size(entry), tuple(objects[id_]))
                    place = Path(f"{self.file} ({shown(name)})")
                    found[path] = id_, CocoImage(path, "", place, annotation)
        return [image for _, image in found.values()]

    def objects(self) -> dict[int | str, list[VocObject]]:
        """Return the objects of each image that can be used."""
        objects = defaultdict(list)
        id_of: dict[str, int | str] = {}
        boxes, sizes, small, turned = [], [], [], 0
        for at, entry in _entries(self.tree, "annotations", self.where):
            with self.noted(at):
                image = _known_id(entry, "image_id", self.images)
                category = _known_id(entry, "category_id", self.categories)
                name = self.categories[category]
                if not is_class_name(name):
                    raise UserError(f"the name '{shown(name)}' of its category is empty, too long or can't be printed")
                # one without objects may have any name: Roboflow's first often has that of the only class
                first = id_of.setdefault(name, category)
                if first != category:
                    raise UserError(f"categories {first!r} and {category!r} are both called {shown(name)}; rename one")
                box, angle = _box(entry), _rotation(entry)
                difficult = any(_flag(entry, key) for key in DIFFICULT)
                x, y, width, height = _hull(box, angle) if angle else box
                boxes.append(box)
                listed = self.images[image]
                sizes.append(_size(listed[2]) if listed else (0, 0))
                turned += bool(angle)
                if min(width, height) <= 1:
                    small.append(f"{at}: its bbox {shown(repr(box), 60)} has no area and is left out; correct it")
                else:
                    corners = (x + 1, y + 1, x + width, y + height)
                    objects[image].append(VocObject(name, corners, difficult))
        if turned:
            text = f"{turned} of {len(boxes)} boxes have a rotation; the upright box around each is taken"
            self.note(TURNED, self.file, text)
        problem = form_problem(np.reshape(boxes, (-1, 4)), np.reshape(sizes, (-1, 2)))
        if problem:
            self.note(OTHER_FORM, self.file, problem)
        for text in () if problem else small:
            self.note(NO_AREA, self.file, text)
        return objects


def _entries(tree: Any, key: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the place of each entry in one of the file's lists, for errors, and the entry."""
    entries = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{where}: not COCO's object detection format: it has no list '{key}'")
    for number, entry in enumerate(entries):
        yield f"{key}[{number}]", entry


def _field(entry: Any, key: str, *types: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        found = "is missing" if value is None else f"is {shown(repr(value), 60)}"
        raise UserError(f"its {key} {found}; COCO's format wants {' or '.join(KINDS[kind] for kind in types)}")
    return value


def _new_id(entry: Any, known: dict[int | str, Any]) -> int | str:
    id_: int | str = _field(entry, "id", int, str)
    if id_ in known:
        raise UserError(f"the id {shown(repr(id_), 60)} is taken; give each its own")
    return id_


def _known_id(entry: Any, key: str, known: dict[int | str, Any]) -> int | str:
    id_: int | str = _field(entry, key, int, str)
    if id_ not in known:
        raise UserError(f"{key} {shown(repr(id_), 60)} is not in the file; remove the annotation, or correct it")
    return id_


def _box(entry: Any) -> list[float]:
    box: list[float] = _field(entry, "bbox", list)
    if len(box) != 4 or not all(is_number(value, MAX_PIXELS) for value in box):
        raise UserError(f"its bbox is {shown(repr(box), 60)}; write [x, y, width, height] in pixels")
    return box


def _rotation(entry: dict[str, Any]) -> float:
    """Return the degrees by which a box is turned, as CVAT writes them; 0 is upright."""
    attributes = entry.get("attributes")
    angle = entry.get("rotation", attributes.get("rotation") if isinstance(attributes, dict) else None)
    if not is_number(0 if angle is None else angle, 1e6):
        raise UserError(f"its rotation is {shown(repr(angle), 60)}; write degrees")
    return float(angle or 0) % 360


def _hull(box: Sequence[float], angle: float) -> tuple[float, float, float, float]:
    """Return the upright box around one that is turned about its middle."""
    x, y, width, height = box
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    across, down = width * cos + height * sin, width * sin + height * cos
    return x + (width - across) / 2, y + (height - down) / 2, across, down


def _flag(entry: dict[str, Any], key: str) -> bool:
    """Return a flag of an annotation, or of its ``attributes``, where some tools keep VOC's."""
    attributes = entry.get("attributes")
    value = entry.get(key, attributes.get(key) if isinstance(attributes, dict) else None)
    if value not in (None, 0, 1):
        raise UserError(f"its {key} is {shown(repr(value), 60)}; write 0 or 1")
    return bool(value)


def _size(entry: Any) -> tuple[int, int]:
    """Return an image's width and height as the file says them, or 0 and 0 where it doesn't: the image itself does."""
    width, height = entry.get("width"), entry.get("height")
    if not all(is_number(side, MAX_PIXELS) and side >= 1 and side == int(side) for side in (width, height)):
        return 0, 0
    return int(width), int(height)


def _voc_id(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder)
    id_ = composed("_".join(relative.with_suffix("").parts).replace("\\", "_"))
    problem = name_problem(id_)
    if problem:
        raise UserError(f"file_name '{shown(str(relative))}' {problem}; rename the image")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"'{shown(str(relative))}' is not one of {', '.join(EXTENSIONS)}; convert the image")
    return id_
