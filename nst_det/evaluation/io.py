"""Files of detections: ours (JSON in COCO's results style), COCO results, and the devkit's VOC results."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nst_det.data.coco import coco_names
from nst_det.data.safe_io import is_number, read_bytes, read_text, shown, shown_path
from nst_det.engine.io import write_text
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections, to_xywh

MAX_FILE_BYTES = 1 << 30
KIND = "file of detections"
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class CocoNames:
    """What the numbers in COCO results mean: image numbers to ids, category numbers to class names."""

    images: Mapping[int, str]
    categories: Mapping[int, str]


def write_detections(path: str | Path, found: Detections) -> None:
    """Write COCO's results style with image and category by name, one detection a line."""
    rows = zip(found.image_id, found.label.tolist(), to_xywh(found.box).tolist(), found.score.tolist())
    records = (
        {"image_id": id_, "category": found.classes[label], "bbox": bbox, "score": score}
        for id_, label, bbox, score in rows
    )
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def read_detections(
    path: str | Path, image_ids: Sequence[str], classes: Sequence[str], split: str, names: CocoNames | None = None
) -> Detections:
    """Read a folder of VOC results files of ``split``, or a JSON file of ours or in COCO's results format.

    ``image_ids`` and ``classes`` are those of the ground truth; a detection elsewhere is an error.
    """
    path = Path(path)
    if path.is_dir():
        return read_comp4(path, image_ids, classes, split)
    return detections_from_json(_read_json(path), image_ids, classes, shown_path(path), names)


def read_coco_names(path: str | Path) -> CocoNames:
    """Read names from an annotation file in COCO's format: ``images`` (id, file_name) and ``categories`` (id, name)."""
    tree = _read_json(Path(path))
    images = coco_names(tree, "images", "file_name", str(path), int)
    stems = {number: PurePosixPath(file).stem for number, file in images.items()}
    return CocoNames(stems, coco_names(tree, "categories", "name", str(path), int))


def _read_json(path: Path) -> Any:
    data = read_bytes(path, MAX_FILE_BYTES, KIND)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown_path(path)}: not valid JSON ({error}); write it again") from error


def read_comp4(folder: Path, image_ids: Sequence[str], classes: Sequence[str], split: str) -> Detections:
    """Read the devkit's results: ``comp3_det_`` or ``comp4_det_SPLIT_CLASS.txt``, lines ``id score x1 y1 x2 y2``.

    Boxes are 1-based inclusive.  A class without a file is an error; a file of another class is not read.
    """
    known, rows = set(image_ids), []
    for label, name in enumerate(classes):
        files = [folder / f"{competition}_det_{split}_{name}.txt" for competition in ("comp4", "comp3")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            missing = shown(f"comp4_det_{split}_{name}.txt")
            raise UserError(f"{shown_path(folder)}: no {missing}; add it (empty if nothing was found)")
        for number, line in enumerate(read_text(file, MAX_FILE_BYTES, KIND).splitlines(), 1):
            if not line.strip():
                continue
            at, (id_, *words) = f"{shown_path(file)}: line {number}", line.split()
            try:
                values = [float(word) for word in words]
            except ValueError:
                values = []
            if (
                len(values) != 5
                or not is_number(values[0])
                or not all(is_number(v, MAX_COORDINATE) for v in values[1:])
            ):
                raise UserError(f"{at}: '{shown(line, 80)}' is not 'id score x1 y1 x2 y2' with finite numbers")
            if id_ not in known:
                raise UserError(f"{at}: image {shown(id_, 80)} is not in the split {shown(split)}")
            rows.append((id_, label, values))
    return _detections(rows, classes)


def detections_from_json(
    entries: Any, image_ids: Sequence[str], classes: Sequence[str], source: str, names: CocoNames | None = None
) -> Detections:
    """Return detections of a list of ``{image_id, category or category_id, bbox: [x, y, w, h] 0-based, score}``.

    Images and categories are names, or numbers that are looked up in ``names``.  Without it an image's number is the
    one that its id's digits make (1 for ``000001``, 2008000002 for ``2008_000002``), and categories count from 1 in
    the order of ``classes``.  The error names the entry by its place in the list, from 0.
    """
    if not isinstance(entries, list):
        raise UserError(f"{source}: detections must be a list of objects with image_id, category, bbox and score")
    names = names or CocoNames(_ids_by_number(image_ids), dict(enumerate(classes, 1)))
    known, label_of = set(image_ids), {name: label for label, name in enumerate(classes)}
    rows = []
    for place, entry in enumerate(entries):
        at, fields = f"{source}: detection {place}", entry if isinstance(entry, dict) else {}
        image, score, bbox = fields.get("image_id"), fields.get("score"), fields.get("bbox")
        category = fields.get("category_id") if fields.get("category") is None else fields["category"]
        id_, name = _name(image, names.images), _name(category, names.categories)
        if id_ not in known:
            raise UserError(f"{at}: image_id {image!r:.80} is no image of the split")
        if name not in label_of:
            raise UserError(f"{at}: category {category!r:.80} is not one of {', '.join(classes)}; name all classes")
        if not is_number(score):
            raise UserError(f"{at}: score {score!r:.80} is not a finite number")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_number(value, MAX_COORDINATE) for value in bbox):
            raise UserError(f"{at}: bbox {bbox!r:.80} is not [x, y, width, height] in pixels")
        x, y, width, height = bbox
        if width < 0 or height < 0:
            raise UserError(f"{at}: bbox {bbox!r:.80} has a negative size")
        rows.append((id_, label_of[name], [score, x + 1, y + 1, x + width, y + height]))
    return _detections(rows, classes)


def _detections(rows: Sequence[tuple[str, int, Sequence[float]]], classes: Sequence[str]) -> Detections:
    """Join rows of id, label, and score and corners."""
    labels = np.array([label for _, label, _ in rows], dtype=np.int64)
    values = np.array([numbers for _, _, numbers in rows], dtype=np.float64).reshape(-1, 5)
    return Detections([id_ for id_, _, _ in rows], tuple(classes), labels, values[:, 1:], values[:, 0])


def _name(given: Any, by_number: Mapping[int, str]) -> str:
    """Return a name, or the one of a number; empty where it is neither."""
    if isinstance(given, int) and not isinstance(given, bool):
        return by_number.get(given, "")
    return given if isinstance(given, str) else ""


def _ids_by_number(image_ids: Sequence[str]) -> dict[int, str]:
    """Return ids by the number that their digits make, where that is unique."""
    digits = [id_ for id_ in image_ids if re.fullmatch(r"[0-9_]{1,18}", id_) and id_.strip("_")]
    numbers = [int(id_.replace("_", "")) for id_ in digits]
    counts = Counter(numbers)
    return {number: id_ for number, id_ in zip(numbers, digits) if counts[number] == 1}
