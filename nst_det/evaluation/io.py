"""Files of detections: ours (JSON in COCO's results style), COCO results, and the devkit's VOC results."""

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nst_det.data.coco import coco_names, form_problem
from nst_det.data.safe_io import is_number, read_bytes, read_text, shown, shown_path
from nst_det.data.splits import list_to_test
from nst_det.data.voc import VocDataset, annotation_files, composed, find_voc_root, ids_of_path
from nst_det.engine.io import write_text
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections, GroundTruth, to_xywh

MAX_FILE_BYTES = 1 << 30
KIND = "file of detections"
log = logging.getLogger(__name__)
MAX_COORDINATE = 1e6
# where the scores of a file begin at this or above, something was left out that AP counts
SCORES_LEFT_OUT = 0.1


@dataclass(frozen=True)
class CocoNames:
    """What the ids in COCO results mean: those of images the file's name, those of categories the class."""

    images: Mapping[int | str, str]
    categories: Mapping[int | str, str]


def write_detections(path: str | Path, found: Detections, frames: Sequence[int | None] = ()) -> None:
    """Write COCO's results style with image and category by name, one detection a line.

    ``frames``, one for each detection, are the numbers of frames of a video, where the image is one.
    """
    rows = zip(found.image_id, found.label.tolist(), to_xywh(found.box).tolist(), found.score.tolist())
    records = (
        {"image_id": id_, "category": found.classes[label], "bbox": bbox, "score": score}
        | ({} if frame is None else {"frame": frame})
        for (id_, label, bbox, score), frame in zip(rows, frames or itertools.repeat(None))
    )
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def read_detections(
    path: str | Path,
    image_ids: Sequence[str],
    classes: Sequence[str],
    split: str,
    names: CocoNames | None = None,
    numbered: bool = False,
    further: Callable[[set[str]], Iterable[str]] = lambda _: (),
) -> Detections:
    """Read a folder of VOC results files of ``split``, or a JSON file, see :func:`detections_from_json`.

    ``image_ids`` and ``classes`` are those of the ground truth; a detection elsewhere is an error.  Of other names of
    categories in a JSON file ``further`` returns those that are classes, too.
    """
    path = Path(path)
    if path.is_dir():
        return read_comp4(path, image_ids, classes, split)
    entries = _read_json(path)
    categories = [_category(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    unknown = {name for name in categories if isinstance(name, str)} - set(classes)
    known = (*classes, *further(unknown)) if unknown else classes
    return detections_from_json(entries, image_ids, known, shown_path(path), names, numbered)


def read_coco_names(path: str | Path) -> CocoNames:
    """Read names from a COCO annotation file: ``categories`` (id, name), and where they are there ``images``."""
    tree, where = _read_json(Path(path), "COCO file"), shown_path(path)
    categories = coco_names(tree, "categories", "name", where)
    images = coco_names(tree, "images", "file_name", where) if "images" in tree else {}
    return CocoNames(images, {id_: name.strip() for id_, name in categories.items()})


def _read_json(path: Path, kind: str = KIND) -> Any:
    data = read_bytes(path, MAX_FILE_BYTES, kind, "correct the path")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown_path(path)}: not valid JSON ({error}); write it again") from error


def read_comp4(folder: Path, image_ids: Sequence[str], classes: Sequence[str], split: str) -> Detections:
    """Read the devkit's results: ``comp3_det_`` or ``comp4_det_SPLIT_CLASS.txt``, lines ``id score x1 y1 x2 y2``.

    An id may have spaces.  Boxes are 1-based inclusive.  A class without a file is an error; a file of another class
    is not read.
    """
    known, rows = set(image_ids), []
    for label, name in enumerate(classes):
        files = [folder / f"{competition}_det_{split}_{name}.txt" for competition in ("comp4", "comp3")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            missing = shown(f"comp4_det_{split}_{name}.txt")
            raise UserError(f"{shown_path(folder)}: no {missing}; add it (empty if nothing was found), or write JSON")
        for number, line in enumerate(read_text(file, MAX_FILE_BYTES, KIND).splitlines(), 1):
            if not line.strip():
                continue
            at, (id_, *words) = f"{shown_path(file)}: line {number}", composed(line.strip()).rsplit(maxsplit=5)
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
    entries: Any,
    image_ids: Sequence[str],
    classes: Sequence[str],
    source: str,
    names: CocoNames | None = None,
    numbered: bool = False,
) -> Detections:
    """Return detections of a list of ``{image_id, category, bbox: [x, y, w, h] 0-based, score}``.

    ``category`` is a name of ``classes``, or else ``category_name`` or ``category_id`` are: or an id in ``names``, or,
    where ``classes`` are ``numbered``, a place in them, from 0 or from 1 as all numbers together tell.  ``image_id`` is
    one of ``image_ids``, an id in ``names``, a path to the image, or the number that the digits of one id make (1 for
    ``000001``, 2008000002 for ``2008_000002``); else ``file_name`` is looked at.  Scores only order the detections.

    The error names the entry by its place in the list, from 0.
    """
    if not isinstance(entries, list):
        raise UserError(f"{source}: detections must be a list of objects with image_id, category, bbox and score")
    image_names = _ImageNames(image_ids, names.images if names else {})
    label_of = {name: label for label, name in enumerate(classes)}
    found = [entry if isinstance(entry, dict) else {} for entry in entries]
    categories = [_category(entry) for entry in found]
    class_of = names.categories if names else _numbered_classes(categories, classes, source, numbered)
    rows = []
    for place, (entry, category) in enumerate(zip(found, categories)):
        at = f"{source}: detection {place}"
        score, bbox = entry.get("score"), entry.get("bbox")
        id_ = image_names.find(entry.get("image_id")) or image_names.find(entry.get("file_name"))
        name = category if isinstance(category, str) and category in label_of else _lookup(class_of, category)
        if not id_:
            remedy = "name another split, or by --coco-names the COCO file that has this id"
            raise UserError(f"{at}: image_id {entry.get('image_id')!r:.80} is not an image of the split; {remedy}")
        if name not in label_of:
            meant = f" ({shown(name)})" if name else ""
            remedy = "give all by --classes, or name by --coco-names the COCO file whose categories these are"
            raise UserError(f"{at}: category {category!r:.80}{meant} is not one of {', '.join(classes)}; {remedy}")
        if not is_number(score):
            raise UserError(f"{at}: score {score!r:.80} is not a finite number")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_number(value, MAX_COORDINATE) for value in bbox):
            raise UserError(f"{at}: bbox {bbox!r:.80} is not [x, y, width, height] in pixels")
        x, y, width, height = bbox
        if width < 0 or height < 0:
            raise UserError(f"{at}: bbox {bbox!r:.80} has a negative size")
        rows.append((id_, label_of[name], [score, x + 1, y + 1, x + width, y + height]))
    return _detections(rows, classes)


def _category(entry: dict[str, Any]) -> Any:
    keys = ("category", "category_name", "category_id")
    category = next((entry[key] for key in keys if entry.get(key) is not None), None)
    return category.strip() if isinstance(category, str) else category


def _numbered_classes(
    categories: Sequence[Any], classes: Sequence[str], source: str, numbered: bool
) -> Mapping[int | str, str]:
    """Return the class of each number in a file without names; one that may be another class is an error."""
    numbers = {category for category in categories if isinstance(category, int) and not isinstance(category, bool)}
    starts = [start for start in (0, 1) if numbers <= set(range(start, start + len(classes)))]
    if not numbers or not starts:
        # what is not a number, and numbers that are too large, are named where they stand
        return {}
    if len(starts) > 1:
        why = f"may count from 0 or from 1, and the {len(classes)} classes in any order"
    elif len(classes) > 1 and not numbered:
        why = f"count from {starts[0]}, in an order that the file doesn't say"
    else:
        found: dict[int | str, str] = {number: classes[number - starts[0]] for number in sorted(numbers)}
        log.warning("%s: categories are %s", source, ", ".join(f"{n} {shown(name)}" for n, name in found.items()))
        return found
    remedy = "name by --coco-names a COCO file with these categories (id and name)"
    order = ", or give the classes in the file's order by --classes" if len(starts) == 1 else ""
    shortest = ", ".join(map(str, sorted(numbers)[:5]))
    raise UserError(f"{source}: the numbers of its categories ({shortest}) {why}; {remedy}{order}")


def _detections(rows: Sequence[tuple[str, int, Sequence[float]]], classes: Sequence[str]) -> Detections:
    """Join rows of id, label, and score and corners."""
    labels = np.array([label for _, label, _ in rows], dtype=np.int64)
    values = np.array([numbers for _, _, numbers in rows], dtype=np.float64).reshape(-1, 5)
    return Detections([id_ for id_, _, _ in rows], tuple(classes), labels, values[:, 1:], values[:, 0])


def _lookup(names: Mapping[int | str, str], id_: Any) -> str:
    return names.get(id_, "") if isinstance(id_, int | str) and not isinstance(id_, bool) else ""


class _ImageNames:
    """Finds the image of a split that is meant by a name, a path or a number."""

    def __init__(self, image_ids: Sequence[str], names: Mapping[int | str, str]) -> None:
        self.ids, self.names = set(image_ids), names
        digits = [id_ for id_ in image_ids if re.fullmatch(r"[0-9_]{1,18}", id_) and id_.strip("_")]
        numbers = [int(id_.replace("_", "")) for id_ in digits]
        counts = Counter(numbers)
        unique = {number: id_ for number, id_ in zip(numbers, digits) if counts[number] == 1}
        self.by_number: Mapping[int | str, str] = dict(unique.items())

    def find(self, given: Any) -> str:
        """Return an id, or "" where none is meant."""
        named = _lookup(self.names, given)
        text = named or (given if isinstance(given, str) else "")
        found = next((form for form in (composed(text), *ids_of_path(text)) if form in self.ids), "")
        # where a file of names knows the number, that is what counts
        return found or ("" if named else _lookup(self.by_number, given))


def read_voc(
    detections: str | Path,
    voc_root: str | Path,
    split: str,
    classes: Sequence[str] | None,
    names_file: str | Path | None,
) -> tuple[Detections, GroundTruth]:
    """Return detections and the ground truth that they are measured against."""
    root = find_voc_root(voc_root)
    data = VocDataset(root, split or list_to_test(root), classes)
    annotations = data.annotations()
    names = None if names_file is None else read_coco_names(names_file)
    given = classes is not None

    def in_other_lists(unknown: set[str]) -> list[str]:
        # what a detector has learned needn't be on an image of this split
        others = (id_ for id_ in annotation_files(root) if id_ not in data.ids) if not given else ()
        return sorted(unknown & {name for id_ in others for name in data.annotation(id_).names})

    found = read_detections(detections, data.ids, data.classes, data.split, names, given, in_other_lists)
    truth = GroundTruth.from_annotations(annotations, found.classes)
    lowest = found.score.min() if len(found) else None
    if lowest is None or lowest >= SCORES_LEFT_OUT:
        what = "no detections in it" if lowest is None else f"no score is below {lowest:.3g}"
        log.warning(
            "%s: %s; AP counts low scores too: take the run's own detections.json, or nst-det predict --threshold 0.02",
            detections,
            what,
        )
    size_of = {annotation.id: (annotation.width, annotation.height) for annotation in annotations}
    problem = form_problem(to_xywh(found.box), np.reshape([size_of[id_] for id_ in found.image_id], (-1, 2)))
    if problem:
        log.warning("%s: %s", detections, problem)
    return found, truth


def overlap_thresholds(iou: float | Sequence[float]) -> list[float]:
    """Return ``iou`` as a list, checked: each is above 0 and at most 1."""
    values = [float(iou)] if isinstance(iou, int | float) else [float(value) for value in iou]
    if not values or not all(0 < value <= 1 for value in values):
        raise UserError(f"iou {' '.join(map(str, values))}: overlap thresholds lie above 0 and at most at 1")
    return values
