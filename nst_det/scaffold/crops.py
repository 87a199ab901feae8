"""An image folder for stage one, cut out of the images to detect on.

Every object of the training list becomes one image of its class, with a tenth of context on each side; the class
``background`` holds squares of the same sizes that (nearly) miss all objects, so that even one class can be learned.
There are no new images: the student sees in stage one what it will see in stage two, so that a gain is likely to be
smaller than with classification data of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from nst_det.data.annotation import usable_boxes
from nst_det.data.safe_io import name_problem, shown
from nst_det.data.splits import cut_test_ids, same_pictures
from nst_det.data.voc import VocDataset
from nst_det.engine.io import atomic_path
from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError

BACKGROUND = "background"
CONTEXT = 1.2
SMALLEST_CROP = 8
# the largest part of a background crop that objects may cover
LARGEST_COVER = 0.1
TRIES = 20
VAL_FRACTION = 0.15


def write_crops(data: VocDataset, folder: Path) -> Counter[str]:
    """Write ``folder/{train,val}/CLASS/ID_NUMBER.jpg``, no image's crops into both; return their number by class."""
    for name in data.classes:
        problem = "begins with a dot" if name.startswith(".") else name_problem(name)
        if problem:
            raise UserError(f"class '{shown(name)}' {problem}; rename it, or give classification data by --images")
    background = BACKGROUND if BACKGROUND not in data.classes else f"no {BACKGROUND}"
    crops = {id_: found for id_ in data.ids if (found := list(object_crops(data, id_)))}
    for id_, found in crops.items():
        wanted = max(1, round(len(found) / len(data.classes)))
        found += [(window, background) for window in background_windows(data, id_, wanted)]
    classes_of = {id_: [name for _, name in found] for id_, found in crops.items()}
    pictures = same_pictures({id_: data.image_path(id_) for id_ in crops})
    val = set(cut_test_ids(classes_of, VAL_FRACTION, pictures)) if len(crops) > 1 else set()
    if not val:
        raise UserError(
            f"{data.root}: too few images in {data.split} to cut training and validation crops from; every class "
            "needs two images, or give classification data by --images"
        )
    if len({name for names in classes_of.values() for name in names}) < 2:
        raise UserError(
            f"{data.root}: objects of one class, and no room for a background beside them; give classification data "
            "of two classes or more by --images"
        )
    counts: Counter[str] = Counter()
    for id_, found in crops.items():
        image = data.image(id_)
        for number, ((left, top, right, bottom), name) in enumerate(found):
            path = folder / ("val" if id_ in val else "train") / name / f"{id_}_{number:03}.jpg"
            crop = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2BGR)
            _, encoded = cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95])
            with atomic_path(path) as temporary:
                temporary.write_bytes(encoded.tobytes())
            counts[name] += 1
    return counts


def object_crops(data: VocDataset, id_: str) -> Iterator[tuple[tuple[int, int, int, int], str]]:
    """Yield window (left, top, right, bottom; whole pixels, the last two exclusive) and class of each usable object.

    A window is the box's longer side times :data:`CONTEXT`, square where the image reaches that far.
    """
    annotation = data.annotation(id_)
    keep, _ = usable_boxes(annotation)
    for box, name, usable in zip(annotation.boxes, annotation.names, keep & ~annotation.difficult):
        x0, y0, x1, y1 = box.tolist()
        if usable and min(x1 - x0, y1 - y0) >= SMALLEST_CROP:
            half = CONTEXT * max(x1 - x0, y1 - y0) / 2
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            left, top = max(round(x - half), 0), max(round(y - half), 0)
            yield (left, top, min(round(x + half), annotation.width), min(round(y + half), annotation.height)), name


def background_windows(data: VocDataset, id_: str, count: int) -> list[tuple[int, int, int, int]]:
    """Return up to ``count`` squares of which all objects, difficult ones too, cover at most a tenth together."""
    annotation = data.annotation(id_)
    rng = np.random.default_rng(derive_seed("background", id_))
    sides = [min(right - left, bottom - top) for (left, top, right, bottom), _ in object_crops(data, id_)]
    found: list[tuple[int, int, int, int]] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        side = min(int(rng.choice(sides)), annotation.width, annotation.height)
        left = int(rng.integers(annotation.width - side + 1))
        top = int(rng.integers(annotation.height - side + 1))
        window = np.array([left, top, left + side, top + side], dtype=np.float64)
        low = np.maximum(window[:2], annotation.boxes[:, :2])
        high = np.minimum(window[2:], annotation.boxes[:, 2:])
        if np.clip(high - low, 0, None).prod(axis=1).sum() <= LARGEST_COVER * side**2:
            found.append((left, top, left + side, top + side))
    return found
