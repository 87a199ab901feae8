"""YOLO's labels: a text file an image, and in it a line an object: class number, then numbers in shares of the sides.

Five numbers are ``class cx cy w h``; a polygon (``class x1 y1 x2 y2 x3 y3 ...``, of a segmentation or a turned box)
becomes the box around it; of an object with key points the box is taken.  An empty file, or none, is an image without
objects.  Class names stand in ``data.yaml``, or one a line in ``classes.txt`` or ``obj.names``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from nst_det.data.annotation import NUMBER, VocAnnotation, VocObject, is_class_name
from nst_det.data.safe_io import read_text, shown, shown_path
from nst_det.errors import UserError

MAX_LABEL_BYTES = 4 << 20
# shares outside 0..1 that labelling and rounding leave, and pixels by which a box may then reach outside the image
SHARE_SLACK, PIXEL_SLACK = 0.01, 0.5


@dataclass(frozen=True)
class YoloClasses:
    """Class names in the order of their numbers, and how many numbers of key points follow a box (0: none)."""

    names: tuple[str, ...]
    key_points: int = 0


def find_classes(root: Path, files: Iterable[str]) -> YoloClasses | None:
    """Return the classes out of the uppermost file that names some; ``files`` are relative to ``root``."""
    for file in sorted(files, key=lambda file: (file.count("/"), not file.endswith((".yaml", ".yml")), file)):
        path = root / file
        if path.suffix in (".yaml", ".yml"):
            found = _from_yaml(path)
            if found:
                return found
        elif path.suffix == ".names" or path.name == "classes.txt":
            lines = read_text(path, MAX_LABEL_BYTES, "list of classes").splitlines()
            return YoloClasses(_checked([line.strip() for line in lines if line.strip()], path))
    return None


def _from_yaml(path: Path) -> YoloClasses | None:
    try:
        tree = yaml.safe_load(read_text(path, MAX_LABEL_BYTES, "YAML"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{shown_path(path)}: not valid YAML ({shown(str(error))}); correct it") from error
    names = tree.get("names") if isinstance(tree, dict) else None
    if not isinstance(names, list | dict):
        return None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise UserError(f"{shown_path(path)}: names are numbered otherwise than 0, 1, 2, ...; correct it")
        names = [name for _, name in sorted((int(number), name) for number, name in names.items())]
    if not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"{shown_path(path)}: names: not all are text; correct it")
    shape = tree.get("kpt_shape")
    pairs = isinstance(shape, list) and len(shape) == 2 and all(isinstance(size, int) for size in shape)
    return YoloClasses(_checked([str(name).strip() for name in names], path), shape[0] * shape[1] if pairs else 0)


def _checked(names: list[str], path: Path) -> tuple[str, ...]:
    odd = next((name for name in names if not is_class_name(name)), None)
    twice = next((name for name in names if names.count(name) > 1), None)
    if odd is not None or twice is not None or not names:
        why = "no class" if not names else "a name that is empty or can't be printed" if odd is not None else "twice"
        raise UserError(f"{shown_path(path)}: names: {why}{f' ({shown(twice)})' if twice else ''}; correct it")
    return tuple(names)


def looks_like_yolo(text: str) -> bool:
    """Return whether the first line is one of a class number and at least four numbers."""
    words = next((line.split() for line in text.splitlines() if line.strip()), [])
    return len(words) >= 5 and all(map(NUMBER.fullmatch, words))


def parse_yolo(text: str, name: str, size: tuple[int, int], classes: YoloClasses) -> tuple[VocAnnotation, list[str]]:
    """Return the annotation ``name`` of an image of (width, height) pixels, and a line for all that is wrong."""
    problems: list[str] = []
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                objects.append(_object(line.split(), size, classes))
            except UserError as error:
                problems.append(f"line {number}: {error}")
    return VocAnnotation(name, *size, tuple(objects)), problems


def _object(words: list[str], size: tuple[int, int], classes: YoloClasses) -> VocObject:
    if not all(map(NUMBER.fullmatch, words)):
        word = next(word for word in words if not NUMBER.fullmatch(word))
        raise UserError(f"'{shown(word, 40)}' is not a number; write class, cx, cy, w, h as shares of the sides")
    label, *values = map(float, words)
    if not label.is_integer() or not 0 <= label < len(classes.names):
        raise UserError(
            f"class {shown(words[0], 40)} is none of 0 to {len(classes.names) - 1}; correct it, or add its name"
        )
    count, key_points = len(values), classes.key_points
    if key_points and count in (4, 4 + key_points):
        values, count = values[:4], 4
    if count != 4 and (count < 6 or count % 2):
        hint = "; five may be a prediction with its score" if count == 5 else ""
        raise UserError(f"{count} numbers after the class; a box has 4 and a polygon pairs{hint}")
    if not all(-SHARE_SLACK <= value <= 1 + SHARE_SLACK for value in values):
        raise UserError("numbers outside 0 to 1; they are shares of the image's sides, not pixels")
    if count == 4:
        cx, cy, w, h = values
        x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        x0, y0, x1, y1 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    left, right = (_snapped(share * size[0], size[0]) for share in (x0, x1))
    top, bottom = (_snapped(share * size[1], size[1]) for share in (y0, y1))
    return VocObject(classes.names[int(label)], (left + 1, top + 1, right, bottom))


def _snapped(value: float, side: int) -> float:
    """Return a coordinate, in thousandths; one that is just outside the image is moved to its border."""
    inside = min(max(value, 0.0), float(side))
    return round(inside if abs(inside - value) <= PIXEL_SLACK else value, 3)
