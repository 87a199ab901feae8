"""What is on a generated picture: one object to classify, or several to detect, with their annotation."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.data.shapes import Look, Placed, encode_jpeg, fill, finish, ground, object_color, paint, place

CROP_SIDE = 64
CROP_RADII = (14.0, 26.0)
# height and width; the longest side is always the same
SCENE_SIZES = ((120, 160), (160, 120), (128, 160), (160, 128), (144, 160), (160, 144))
RADII = (15.0, 36.0)
# so small that a person would call the object difficult
SMALL_RADII = (6.0, 9.0)
# an object that shows less than this is difficult too
DIFFICULT_SHARE = 0.5
LARGEST_OVERLAP = 0.15


@dataclass(frozen=True)
class _Item:
    name: str
    placed: Placed
    small: bool


def draw_crop(rng: np.random.Generator, name: str, look: Look) -> bytes:
    """A JPEG of :data:`CROP_SIDE` squared with one object, most of it inside."""
    image, around = ground(rng, CROP_SIDE, CROP_SIDE, look)
    radius = rng.uniform(*CROP_RADII)
    x, y = CROP_SIDE / 2 + rng.uniform(-look.shift, look.shift, 2)
    mask = fill(place(rng, name, (x, y), radius, look), CROP_SIDE, CROP_SIDE)
    paint(rng, image, mask, object_color(rng, around, look.contrast), look)
    return encode_jpeg(rng, finish(rng, image, look))


def draw_scene(rng: np.random.Generator, id_: str, classes: tuple[str, ...], look: Look) -> tuple[bytes, VocAnnotation]:
    """A JPEG with one to four objects, sometimes a small or a mostly hidden one more, and its annotation."""
    height, width = SCENE_SIZES[rng.integers(len(SCENE_SIZES))]
    image, around = ground(rng, height, width, look)
    items = _compose(rng, height, width, classes, look)
    masks = []
    for item in items:
        masks.append(fill(item.placed, height, width))
        paint(rng, image, masks[-1], object_color(rng, around, look.contrast), look)
    objects = []
    hidden = np.zeros((height, width), bool)
    # from the front to the back
    for item, mask in zip(reversed(items), reversed(masks)):
        seen = (mask > 127) & ~hidden
        hidden |= mask > 127
        found = _annotate(item, seen)
        if found is not None:
            objects.append(found)
    annotation = VocAnnotation(id_, width, height, tuple(reversed(objects)))
    return encode_jpeg(rng, finish(rng, image, look)), annotation


def _compose(rng: np.random.Generator, height: int, width: int, classes: tuple[str, ...], look: Look) -> list[_Item]:
    items: list[_Item] = []
    for _ in range(int(rng.integers(1, 5))):
        _try_to_place(rng, items, height, width, classes, look, RADII, LARGEST_OVERLAP)
    if rng.random() < 0.25:
        _try_to_place(rng, items, height, width, classes, look, SMALL_RADII, 0.0)
    if items and rng.random() < 0.2:
        # lies in front of the first object and hides most of it
        x0, y0, x1, y1 = items[0].placed.bounds
        center = (x0 + x1) / 2 + rng.uniform(-5, 5), (y0 + y1) / 2 + rng.uniform(-5, 5)
        radius = rng.uniform(0.8, 1.0) * max(x1 - x0, y1 - y0) / 2
        name = classes[rng.integers(len(classes))]
        cover = place(rng, name, center, min(radius, RADII[1]), look)
        if all(_overlap(cover.bounds, item.placed.bounds) <= LARGEST_OVERLAP for item in items[1:]):
            items.append(_Item(name, cover, False))
    return items


def _try_to_place(
    rng: np.random.Generator, items: list[_Item], height: int, width: int, classes: tuple[str, ...], look: Look,
    radii: tuple[float, float], overlap: float,
) -> None:  # fmt: skip
    name = classes[rng.integers(len(classes))]
    for _ in range(20):
        radius = rng.uniform(*radii)
        inset = 0.8 * radius
        center = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        placed = place(rng, name, center, radius, look)
        if all(_overlap(placed.bounds, item.placed.bounds) <= overlap for item in items):
            items.append(_Item(name, placed, radii is SMALL_RADII))
            return


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller of two boxes."""
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _annotate(item: _Item, seen: np.ndarray) -> VocObject | None:
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if rows.size < 3 or columns.size < 3:
        return None  # nothing that anybody could see
    height, width = seen.shape
    x0, y0, x1, y1 = item.placed.bounds
    truncated = min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
    difficult = item.small or float(seen.sum()) < DIFFICULT_SHARE * item.placed.area
    # VOC counts pixels from 1, both ends inclusive
    box = (columns[0] + 1, rows[0] + 1, columns[-1] + 1, rows[-1] + 1)
    return VocObject(item.name, box, bool(difficult), bool(truncated))


def voc_xml(annotation: VocAnnotation, folder: str) -> str:
    """An annotation as VOC XML; boxes in pixels as :class:`VocObject` has them, with up to twelve digits."""
    lines = [
        "<annotation>",
        f"\t<folder>{escape(folder)}</folder>",
        f"\t<filename>{escape(annotation.id)}.jpg</filename>",
        "\t<size>",
        f"\t\t<width>{annotation.width}</width>",
        f"\t\t<height>{annotation.height}</height>",
        "\t\t<depth>3</depth>",
        "\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for item in annotation.objects:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), item.box)
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(item.name)}</name>",
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{item.truncated:d}</truncated>",
            f"\t\t<difficult>{item.difficult:d}</difficult>",
            "\t\t<bndbox>",
            *(f"\t\t\t<{corner}>{value:.12g}</{corner}>" for corner, value in corners),
            "\t\t</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
