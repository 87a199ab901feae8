"""Readers of detections: VOC results files, our ``detections.json``, and COCO results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nst_det.data.coco import coco_names
from nst_det.engine.io import read_json
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections

MAX_FILE_BYTES = 1 << 30
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class CocoNames:
    """What the numbers in COCO results mean: image numbers to ids, category numbers to class names."""

    images: Mapping[int, str]
    categories: Mapping[int, str]


def read_detections(
    path: str | Path, image_ids: Sequence[str], classes: Sequence[str], split: str, names: CocoNames | None = None
) -> Detections:
    """A folder of VOC results files, or a JSON file of ours or in COCO's results format.

    Args:
        path: the folder or file.
        image_ids: of the ground truth; a detection elsewhere is an error.
        classes: of the ground truth.
        split: picks the files ``*_det_SPLIT_CLASS.txt`` of a folder.
        names: of the numbers in COCO results, see :func:`detections_from_json`.

    Raises:
        UserError: nothing there, or a line or entry that can't be used.
    """
    path = Path(path)
    if path.is_dir():
        return read_comp4(path, image_ids, classes, split)
    return detections_from_json(read_json(_bounded(path)), image_ids, classes, str(path), names)


def read_coco_names(path: str | Path) -> CocoNames:
    """Read names from an annotation file in COCO's format: ``images`` (id, file_name) and ``categories`` (id, name)."""
    tree = read_json(_bounded(Path(path)))
    images = coco_names(tree, "images", "file_name", str(path), int)
    stems = {number: PurePosixPath(file).stem for number, file in images.items()}
    return CocoNames(stems, coco_names(tree, "categories", "name", str(path), int))


def _bounded(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; name the file with the detections")
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path}: more than {MAX_FILE_BYTES} bytes; keep at most 100 detections an image")
    return path


def read_comp4(folder: Path, image_ids: Sequence[str], classes: Sequence[str], split: str) -> Detections:
    """The devkit's results: ``comp3_det_`` or ``comp4_det_SPLIT_CLASS.txt`` with lines ``id score x1 y1 x2 y2``.

    Boxes are 1-based inclusive and taken as they stand.  A class without a file is an error; a file of a class that
    isn't in ``classes`` is not read.

    Raises:
        UserError: a missing file, or a line that can't be used.
    """
    files = [_results_file(folder, split, name) for name in classes]
    known = set(image_ids)
    ids: list[str] = []
    labels, numbers = [], [np.zeros((0, 5))]
    for label, file in enumerate(files):
        tokens = _text(file).split()
        found = tokens[::6]
        try:
            if len(tokens) % 6:
                raise ValueError
            values = np.array([tokens[column::6] for column in range(1, 6)], dtype=np.float64).T
        except ValueError:
            raise _bad_line(file) from None
        unusable = not np.isfinite(values).all() or np.abs(values[:, 1:]).max(initial=0) > MAX_COORDINATE
        if unusable or not known.issuperset(found):
            raise _bad_line(file, known)
        ids += found
        labels.append(np.full(len(found), label, dtype=np.int64))
        numbers.append(values.reshape(-1, 5))
    rows = np.concatenate(numbers)
    return Detections(ids, tuple(classes), np.concatenate(labels), rows[:, 1:], rows[:, 0])


def _results_file(folder: Path, split: str, name: str) -> Path:
    if "/" in name or "\0" in name:
        raise UserError(f"{folder}: class {name!r} can't be part of a file name; give detections as JSON instead")
    for prefix in ("comp4", "comp3"):
        file = folder / f"{prefix}_det_{split}_{name}.txt"
        if file.is_file():
            return _bounded(file)
    raise UserError(f"{folder}: no comp4_det_{split}_{name}.txt; add it (empty if nothing was found)")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text; write it as lines 'id score x1 y1 x2 y2'") from error
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); correct its permissions") from error


def _bad_line(file: Path, known: set[str] | None = None) -> UserError:
    """The error that names the first line that can't be used."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 6 or not all(_is_usable(word) for word in words[1:]):
            return UserError(f"{file}: line {number}: '{line[:80]}' is not 'id score x1 y1 x2 y2' with finite numbers")
        if known is not None and words[0] not in known:
            return UserError(f"{file}: line {number}: image {words[0][:80]} is not in the split; name the right split")
    return UserError(f"{file}: lines must be 'id score x1 y1 x2 y2' with finite numbers")


def _is_usable(word: str) -> bool:
    try:
        return abs(float(word)) <= MAX_COORDINATE
    except ValueError:
        return False


def detections_from_json(
    entries: Any, image_ids: Sequence[str], classes: Sequence[str], source: str, names: CocoNames | None = None
) -> Detections:
    """Detections from a list of ``{image_id, category or category_id, bbox: [x, y, w, h] 0-based, score}``.

    ``image_id`` is an id of the ground truth, or a number; ``category`` is a class name, ``category_id`` a number.
    Numbers are looked up in ``names``.  Without it an image's number is the one that its id's digits make (1 for
    ``000001``, 2008000002 for ``2008_000002``), and categories count from 1 in the order of ``classes``.

    Raises:
        UserError: the list or an entry can't be used; the entry is named by its place, counted from 0.
    """
    if not isinstance(entries, list):
        raise UserError(f"{source}: detections must be a list of objects with image_id, category, bbox and score")
    if names is None:
        names = CocoNames(_ids_by_number(image_ids), dict(enumerate(classes, 1)))
    known, label_of = set(image_ids), {name: label for label, name in enumerate(classes)}
    ids: list[str] = []
    labels: list[int] = []
    numbers: list[list[float]] = []
    for place, entry in enumerate(entries):
        where = f"{source}: detection {place}"
        id_ = _get(entry, "image_id")
        id_ = names.images.get(id_) if _is_int(id_) else id_
        if not isinstance(id_, str) or id_ not in known:
            raise UserError(
                f"{where}: image_id {_get(entry, 'image_id')!r:.80} is no image of the split; name the right one"
            )
        category = _get(entry, "category")
        if category is None and _is_int(_get(entry, "category_id")):
            category = names.categories.get(entry["category_id"])
        if not isinstance(category, str) or category not in label_of:
            said = _get(entry, "category") if _get(entry, "category") is not None else _get(entry, "category_id")
            raise UserError(f"{where}: category {said!r:.80} is not one of {', '.join(classes)}; name all classes")
        ids.append(id_)
        labels.append(label_of[category])
        numbers.append(_numbers(entry, where))
    rows = np.array(numbers, dtype=np.float64).reshape(-1, 5)
    box = np.concatenate([rows[:, 1:3] + 1, rows[:, 1:3] + rows[:, 3:5]], axis=1)
    return Detections(ids, tuple(classes), np.array(labels, dtype=np.int64), box, rows[:, 0])


def _numbers(entry: dict[str, Any], where: str) -> list[float]:
    """Score, x, y, width and height."""
    bbox, score = _get(entry, "bbox"), _get(entry, "score")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, [*bbox, score])):
        raise UserError(
            f"{where}: needs a finite score and bbox [x, y, width, height], but has {score!r}, {bbox!r:.80}"
        )
    if bbox[2] < 0 or bbox[3] < 0 or max(map(abs, bbox)) > MAX_COORDINATE:
        raise UserError(f"{where}: bbox {bbox!r:.80} has a negative size or lies too far out; write pixels")
    return [float(score), *map(float, bbox)]


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e18 and math.isfinite(value)


def _ids_by_number(image_ids: Sequence[str]) -> dict[int, str]:
    """Ids by the number that their digits make, where that is unique."""
    found: dict[int, str] = {}
    twice = set()
    for id_ in image_ids:
        if re.fullmatch(r"[0-9_]{1,18}", id_) and id_.strip("_"):
            number = int(id_.replace("_", ""))
            if number in found:
                twice.add(number)
            found[number] = id_
    return {number: id_ for number, id_ in found.items() if number not in twice}
