"""Files of detections: ours (JSON in COCO's results style), COCO results, and the devkit's VOC results."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from nst_det.data.coco import coco_names
from nst_det.engine.io import read_json, write_text
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections

MAX_FILE_BYTES = 1 << 30
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class CocoNames:
    """What the numbers in COCO results mean: image numbers to ids, category numbers to class names."""

    images: Mapping[int, str]
    categories: Mapping[int, str]


def write_detections(path: str | Path, found: Detections) -> None:
    """Write detections as JSON, one a line: readable, and a third of the size of indented JSON."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in found.to_json())
    write_text(path, f"[\n{lines}\n]\n")


def read_detections(
    path: str | Path, image_ids: Sequence[str], classes: Sequence[str], split: str, names: CocoNames | None = None
) -> Detections:
    """Read a folder of VOC results files, or a JSON file of ours or in COCO's results format.

    Args:
        path: the folder or file.
        image_ids: of the ground truth; a detection elsewhere is an error.
        classes: of the ground truth.
        split: picks the files ``*_det_SPLIT_CLASS.txt`` of a folder.
        names: of the numbers in COCO results, see :func:`detections_from_json`.
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
    """Read the devkit's results: ``comp3_det_`` or ``comp4_det_SPLIT_CLASS.txt``, lines ``id score x1 y1 x2 y2``.

    Boxes are 1-based inclusive and taken as they stand.  A class without a file is an error; a file of a class that
    isn't in ``classes`` is not read.
    """
    files = [_results_file(folder, split, name) for name in classes]
    known = set(image_ids)
    ids: list[str] = []
    labels, numbers = [], [np.zeros((0, 5))]
    for label, file in enumerate(files):
        # all lines at once, since there may be millions; only where that fails the bad line is looked for
        words = _text(file).split()
        found = words[::6]
        try:
            rows = np.array([words[column::6] for column in range(1, 6)], dtype=np.float64).T
        except ValueError:
            raise _bad_line(file, known) from None
        bounded = np.isfinite(rows).all() and np.abs(rows[:, 1:]).max(initial=0) <= MAX_COORDINATE
        if len(words) % 6 or not bounded or not known.issuperset(found):
            raise _bad_line(file, known)
        ids += found
        labels.append(np.full(len(found), label, dtype=np.int64))
        numbers.append(rows.reshape(-1, 5))
    values = np.concatenate(numbers)
    return Detections(ids, tuple(classes), np.concatenate(labels), values[:, 1:], values[:, 0])


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


def _bad_line(file: Path, known: set[str]) -> UserError:
    """Return the error that names the first line that can't be used."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.split()
        if words and (len(words) != 6 or not all(map(_is_coordinate, words[1:]))):
            return UserError(f"{file}: line {number}: '{line[:80]}' is not 'id score x1 y1 x2 y2' with finite numbers")
        if words and words[0] not in known:
            return UserError(f"{file}: line {number}: image {words[0][:80]} is not in the split; name the right split")
    return UserError(f"{file}: lines must be 'id score x1 y1 x2 y2' with finite numbers")


def _is_coordinate(word: str) -> bool:
    try:
        return abs(float(word)) <= MAX_COORDINATE
    except ValueError:
        return False


def detections_from_json(
    entries: Any, image_ids: Sequence[str], classes: Sequence[str], source: str, names: CocoNames | None = None
) -> Detections:
    """Return detections of a list of ``{image_id, category or category_id, bbox: [x, y, w, h] 0-based, score}``.

    ``image_id`` is an id of the ground truth, or a number; ``category`` is a class name, ``category_id`` a number.
    Numbers are looked up in ``names``.  Without it an image's number is the one that its id's digits make (1 for
    ``000001``, 2008000002 for ``2008_000002``), and categories count from 1 in the order of ``classes``.  The error
    names the entry by its place, counted from 0.
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
        fields = entry if isinstance(entry, dict) else {}
        given = fields.get("image_id")
        id_ = names.images.get(given) if _is_int(given) else given
        if not isinstance(id_, str) or id_ not in known:
            raise UserError(f"{where}: image_id {given!r:.80} is no image of the split; name the right one")
        given = category = fields.get("category")
        if category is None:
            given = fields.get("category_id")
            category = names.categories.get(given) if _is_int(given) else None
        if not isinstance(category, str) or category not in label_of:
            raise UserError(f"{where}: category {given!r:.80} is not one of {', '.join(classes)}; name all classes")
        ids.append(id_)
        labels.append(label_of[category])
        numbers.append(_numbers(fields.get("score"), fields.get("bbox"), where))
    rows = np.array(numbers, dtype=np.float64).reshape(-1, 5)
    box = np.concatenate([rows[:, 1:3] + 1, rows[:, 1:3] + rows[:, 3:5]], axis=1)
    return Detections(ids, tuple(classes), np.array(labels, dtype=np.int64), box, rows[:, 0])


def _numbers(score: Any, bbox: Any, where: str) -> list[float]:
    """Return score, x, y, width and height."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, [*bbox, score])):
        raise UserError(
            f"{where}: needs a finite score and bbox [x, y, width, height], but has {score!r}, {bbox!r:.80}"
        )
    if bbox[2] < 0 or bbox[3] < 0 or max(map(abs, bbox)) > MAX_COORDINATE:
        raise UserError(f"{where}: bbox {bbox!r:.80} has a negative size or lies too far out; write pixels")
    return [float(score), *map(float, bbox)]


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # a whole number may be too large for a float
    return abs(value) < 1e18 if _is_int(value) else isinstance(value, float) and math.isfinite(value)


def _ids_by_number(image_ids: Sequence[str]) -> dict[int, str]:
    """Return ids by the number that their digits make, where that is unique."""
    digits = [id_ for id_ in image_ids if re.fullmatch(r"[0-9_]{1,18}", id_) and id_.strip("_")]
    numbers = [int(id_.replace("_", "")) for id_ in digits]
    counts = Counter(numbers)
    return {number: id_ for number, id_ in zip(numbers, digits) if counts[number] == 1}
