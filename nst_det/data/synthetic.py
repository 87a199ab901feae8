"""The generated data set behind the demo: an image folder and a VOC folder of textured shapes on cluttered ground.

Only the outline tells the classes apart: color, texture, size and place are drawn from the same distributions for all
of them.  The classes to detect are a subset of the classes to classify, as VOC's are nearly one of ImageNet's.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from nst_det.data.annotation import VocAnnotation, VocObject, voc_xml
from nst_det.data.safe_io import is_number, shown_path
from nst_det.data.voc import make_voc_folders, write_split
from nst_det.engine.io import atomic_folder, cannot_write, read_json, write_json
from nst_det.engine.machine import core_count
from nst_det.engine.progress import progress
from nst_det.engine.seeds import derive_seed
from nst_det.engine.signals import end_with_parent
from nst_det.errors import UserError

CLASSIFICATION = "shapes_cls"
DETECTION = "shapes_voc"
SETTINGS_FILE = "settings.json"
CHUNK = 100
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
# bits of a pixel's fraction in the coordinates that cv2 takes
SHIFT = 4


@dataclass(frozen=True)
class GenerateSettings:
    """What decides every byte of the data set."""

    seed: int = 0
    classification_images: int = 9600  # to train on, in all classes together
    classification_val_images: int = 1200
    detection_images: int = 300  # in trainval; the last sixth of them is val, the others train
    detection_test_images: int = 200
    classification_classes: int = 10
    detection_classes: int = 8  # the first ones of these
    rotation: float = 30.0  # largest turn of an object to either side, degrees
    contrast: float = 100.0  # smallest RGB distance between an object's color and the ground's
    texture: float = 20.0  # amplitude of the textures, grey levels
    noise: float = 9.0  # largest standard deviation of the pixel noise, grey levels
    clutter: float = 0.5  # number of distractors, relative to a dense ground
    shift: float = 11.0  # largest distance of an object to classify from the middle, pixels along either axis

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "seed": (0, 2**63 - 1),
            "classification_images": (self.classification_classes, 1_000_000),
            "classification_val_images": (self.classification_classes, 1_000_000),
            "detection_images": (2, 1_000_000),
            "detection_test_images": (1, 1_000_000),
            "classification_classes": (2, len(CLASSES)),
            "detection_classes": (1, self.classification_classes),
            "rotation": (0, 180),
            # no color is more than 200 away from all others, and few are almost as far
            "contrast": (0, 180),
            "texture": (0, 100),
            "noise": (0, 100),
            "clutter": (0, 10),
            "shift": (0, 32),
        }
        for name, (low, high) in limits.items():
            value, kind = getattr(self, name), type(getattr(type(self), name))
            if not is_number(value) or not low <= value <= high or (kind is int and not isinstance(value, int)):
                raise UserError(f"generate-data: {name} is {value!r}; give a number from {low} to {high}")


def settings_from(values: Mapping[str, Any]) -> GenerateSettings:
    """Return settings from plain values by field name."""
    known = [item.name for item in fields(GenerateSettings)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UserError(f"generate-data: unknown setting {unknown[0]}; known are {', '.join(known)}")
    return GenerateSettings(**values)


def _directions(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _circle(start: float = 0.0, stop: float = 360.0, points: int = 40) -> np.ndarray:
    return _directions(np.radians(np.linspace(start, stop, points, endpoint=stop - start < 360)))


def _regular(corners: int) -> np.ndarray:
    return _directions(np.arange(corners) * 2 * np.pi / corners - np.pi / 2)


def _crescent() -> np.ndarray:
    # the inner arc goes back from the outer one's end to its start
    tip = np.cos(np.radians(55)), np.sin(np.radians(55))
    center = 0.45
    angle = np.arctan2(tip[1], tip[0] - center)
    radius = np.hypot(tip[0] - center, tip[1])
    back = np.linspace(2 * np.pi - angle, angle, 30)
    inner = np.stack([center + radius * np.cos(back), radius * np.sin(back)], axis=1)
    return np.concatenate([_circle(55, 305), inner])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - y.mean()], axis=1) / 17


_THIRD = 0.34
_CROSS = [(_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD), (_THIRD, _THIRD), (_THIRD, 1)]
_ARROW = [(1, 0), (0.1, 0.8), (0.1, 0.32), (-1, 0.32), (-1, -0.32), (0.1, -0.32), (0.1, -0.8)]
_BOLT = [(0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25)]

# outer contour first, holes after it; all inside the unit circle or nearly
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "ellipse": (_circle() * (1.0, 0.66),),
    "square": (_circle(45, 405, 4) * 1.1,),
    "triangle": (_regular(3),),
    "star": (_regular(10) * np.array([1, 0.45] * 5)[:, None],),
    "cross": (np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),),
    "ring": (_circle(), _circle() * 0.55),
    "hexagon": (_regular(6),),
    "crescent": (_crescent(),),
    "arrow": (np.array(_ARROW),),
    "heart": (_heart(),),
    "bolt": (np.array(_BOLT),),
    "halfmoon": (_circle(0, 180, 24) - (0, 0.4),),
}
CLASSES = tuple(OUTLINES)


@dataclass(frozen=True)
class Placed:
    """An outline in an image: contours of (N, 2) float64 pixels x, y; its area in pixels, outside parts included."""

    name: str
    contours: tuple[np.ndarray, ...]
    area: float
    small: bool = False

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        points = self.contours[0]
        return (*points.min(axis=0), *points.max(axis=0))


def place(rng: Generator, name: str, center: tuple[float, float], radius: float, rotation: float) -> Placed:
    """Turn, stretch and shear an outline at random, about ``radius`` pixels around ``center``."""
    angle = np.radians(rng.uniform(-rotation, rotation))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    warp = turn @ np.array([[stretch, rng.uniform(-0.12, 0.12)], [0.0, 1 / stretch]])
    contours = tuple(radius * points @ warp.T + center for points in OUTLINES[name])
    corners = [points.T for points in contours]
    areas = [abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2 for x, y in corners]
    return Placed(name, contours, areas[0] - sum(areas[1:]))


def fill(placed: Placed, height: int, width: int) -> np.ndarray:
    """Return (H, W) uint8 coverage, 0..255, edges smoothed."""
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [_fixed_point(contour) for contour in placed.contours], 255, lineType=cv2.LINE_AA, shift=SHIFT)
    return mask


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << SHIFT)).astype(np.int32)


def texture(rng: Generator, height: int, width: int, color: np.ndarray, amplitude: float) -> np.ndarray:
    """Return (H, W, 3) float32: a color modulated by soft blobs, stripes and a slope of brightness."""
    cells = rng.standard_normal((int(rng.integers(3, 10)), int(rng.integers(3, 10)))).astype(np.float32)
    pattern = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC) * rng.uniform(0.2, 0.8)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 18)
    x = np.arange(width, dtype=np.float32) * np.float32(2 * np.pi * np.cos(angle) / period)
    y = np.arange(height, dtype=np.float32) * np.float32(2 * np.pi * np.sin(angle) / period)
    phase = x[None, :] + y[:, None] + np.float32(rng.uniform(0, 2 * np.pi))
    pattern += np.sin(phase) * np.float32(rng.uniform(0, 1))
    slope = rng.uniform(-0.7, 0.7, 2).astype(np.float32)
    pattern += slope[0] * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    pattern += slope[1] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    tint = rng.uniform(0.6, 1.2, 3).astype(np.float32) * np.float32(amplitude)
    return color.astype(np.float32) + pattern[..., None] * tint


def ground(rng: Generator, height: int, width: int, settings: GenerateSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return a cluttered ground, (H, W, 3) float32, and its main color, (3,)."""
    color = rng.uniform(30, 225, 3)
    image = texture(rng, height, width, color, settings.texture)
    dense = 18 * height * width / 64**2
    for _ in range(rng.poisson(settings.clutter * dense)):
        shade = tuple((color + rng.normal(0, 32, 3)).clip(0, 255).tolist())
        spot = rng.uniform((0, 0), (width, height))
        if rng.random() < 0.5:
            end = spot + rng.uniform(-0.6, 0.6, 2) * 48
            ends = _fixed_point(np.stack([spot, end])).tolist()
            cv2.line(image, ends[0], ends[1], shade, int(rng.integers(1, 4)), cv2.LINE_8, SHIFT)
        else:
            corners = int(rng.integers(3, 8))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radii = rng.uniform(2, 9, corners)
            blob = spot + radii[:, None] * _directions(angles)
            cv2.fillPoly(image, [_fixed_point(blob)], shade, cv2.LINE_8, SHIFT)
    return image, color


def object_color(rng: Generator, around: np.ndarray, contrast: float) -> np.ndarray:
    """Return a color at least ``contrast`` away from ``around`` in RGB; both (3,), 0..255."""
    for _ in range(1000):
        color = rng.uniform(10, 245, 3)
        if np.linalg.norm(color - around) >= contrast:
            return color
    raise ValueError(f"no color is {contrast} away from {around}; the largest possible contrast is about 200")


def draw(
    rng: Generator, image: np.ndarray, placed: Placed, around: np.ndarray, settings: GenerateSettings
) -> np.ndarray:
    """Blend a textured object into an image (H, W, 3) float32, in place, and return its coverage, (H, W) uint8."""
    mask = fill(placed, *image.shape[:2])
    color = object_color(rng, around, settings.contrast)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size:
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        alpha = mask[window].astype(np.float32)[..., None] / 255
        filled = texture(rng, alpha.shape[0], alpha.shape[1], color, settings.texture)
        image[window] += alpha * (filled - image[window])
    return mask


def finish(rng: Generator, image: np.ndarray, settings: GenerateSettings) -> bytes:
    """Add pixel noise to an RGB image (H, W, 3) float32, 0..255, and encode it as JPEG of a quality that varies."""
    sigma = np.float32(rng.uniform(0.2, 1.0) * settings.noise)
    noisy = (image + sigma * rng.standard_normal(image.shape, dtype=np.float32)).clip(0, 255).astype(np.uint8)
    quality = int(rng.integers(85, 96))
    done, data = cv2.imencode(".jpg", noisy[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "this build of OpenCV can't write JPEG"
    return data.tobytes()


def draw_crop(rng: Generator, name: str, settings: GenerateSettings) -> bytes:
    """Return a JPEG of :data:`CROP_SIDE` squared with one object, most of it inside."""
    image, around = ground(rng, CROP_SIDE, CROP_SIDE, settings)
    radius = rng.uniform(*CROP_RADII)
    x, y = CROP_SIDE / 2 + rng.uniform(-settings.shift, settings.shift, 2)
    draw(rng, image, place(rng, name, (x, y), radius, settings.rotation), around, settings)
    return finish(rng, image, settings)


def draw_scene(
    rng: Generator, id_: str, classes: tuple[str, ...], settings: GenerateSettings
) -> tuple[bytes, VocAnnotation]:
    """Return a JPEG with one to four objects, sometimes a small or a mostly hidden one more, and its annotation."""
    height, width = SCENE_SIZES[rng.integers(len(SCENE_SIZES))]
    image, around = ground(rng, height, width, settings)
    items = _compose(rng, height, width, classes, settings.rotation)
    masks = [draw(rng, image, item, around, settings) > 127 for item in items]
    objects = []
    hidden = np.zeros((height, width), bool)
    # from the front to the back
    for item, mask in zip(reversed(items), reversed(masks)):
        found = annotate(item, mask & ~hidden)
        hidden |= mask
        if found is not None:
            objects.append(found)
    return finish(rng, image, settings), VocAnnotation(id_, width, height, tuple(reversed(objects)))


def _compose(rng: Generator, height: int, width: int, classes: tuple[str, ...], rotation: float) -> list[Placed]:
    items: list[Placed] = []

    def try_to_place(radii: tuple[float, float], overlap: float, small: bool = False) -> None:
        name = classes[rng.integers(len(classes))]
        for _ in range(20):
            radius = rng.uniform(*radii)
            inset = 0.8 * radius
            center = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
            placed = place(rng, name, center, radius, rotation)
            if all(_overlap(placed, item) <= overlap for item in items):
                items.append(replace(placed, small=small))
                return

    for _ in range(int(rng.integers(1, 5))):
        try_to_place(RADII, LARGEST_OVERLAP)
    if rng.random() < 0.25:
        try_to_place(SMALL_RADII, 0.0, small=True)
    if items and rng.random() < 0.2:
        # lies in front of the first object and hides most of it
        x0, y0, x1, y1 = items[0].bounds
        center = (x0 + x1) / 2 + rng.uniform(-5, 5), (y0 + y1) / 2 + rng.uniform(-5, 5)
        radius = rng.uniform(0.8, 1.0) * max(x1 - x0, y1 - y0) / 2
        name = classes[rng.integers(len(classes))]
        cover = place(rng, name, center, min(radius, RADII[1]), rotation)
        if all(_overlap(cover, item) <= LARGEST_OVERLAP for item in items[1:]):
            items.append(cover)
    return items


def _overlap(one: Placed, other: Placed) -> float:
    """Return intersection over the smaller of two boxes."""
    a, b = one.bounds, other.bounds
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def annotate(item: Placed, seen: np.ndarray) -> VocObject | None:
    """Return the object as VOC has it, from the pixels of it that are seen, (H, W) bool; None for hardly any."""
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if rows.size < 3 or columns.size < 3:
        return None
    height, width = seen.shape
    x0, y0, x1, y1 = item.bounds
    truncated = min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
    difficult = item.small or float(seen.sum()) < DIFFICULT_SHARE * item.area
    # VOC counts pixels from 1, both ends inclusive
    box = (columns[0] + 1, rows[0] + 1, columns[-1] + 1, rows[-1] + 1)
    return VocObject(item.name, box, bool(difficult), bool(truncated))


def generate_data(output: str | Path, settings: GenerateSettings | None = None, workers: int = 0) -> Path:
    """Write the data set: ``output/shapes_cls/{train,val}/CLASS/*.jpg`` and the VOC folder ``output/shapes_voc``.

    It appears under its name only when it is whole.  The same settings give the same bytes (under the same versions
    of cv2 and numpy), whatever the number of workers (processes; 0 takes all cores, at most 8).  One that is there
    already with the same settings is kept.
    """
    settings = settings or GenerateSettings()
    output = Path(output).expanduser()
    try:
        if not _is_done(output, settings):
            with atomic_folder(output, "name another folder") as folder:
                _generate(folder, settings, workers or min(core_count(), 8))
                write_json(folder / SETTINGS_FILE, asdict(settings))
    except OSError as error:
        # another process may have been faster
        if not _is_done(output, settings):
            raise cannot_write(shown_path(output), str(error.strerror)) from error
    return output


def _is_done(output: Path, settings: GenerateSettings) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    marker = output / SETTINGS_FILE
    before = read_json(marker) if marker.is_file() else None
    if not isinstance(before, dict):
        raise UserError(f"{shown_path(output)}: holds something else; name another folder or remove this one")
    for key, value in asdict(settings).items():
        if before.get(key) != value:
            raise UserError(
                f"{shown_path(output)}: holds data made with {key} {before.get(key)!r}, not {value!r}; "
                "name another folder or remove this one"
            )
    return True


def _generate(folder: Path, settings: GenerateSettings, workers: int) -> None:
    for split in ("train", "val"):
        for name in CLASSES[: settings.classification_classes]:
            (folder / CLASSIFICATION / split / name).mkdir(parents=True)
    root = make_voc_folders(folder / DETECTION)
    counts = {
        "detect": settings.detection_images + settings.detection_test_images,
        "train": settings.classification_images,
        "val": settings.classification_val_images,
    }
    ids = [f"{number:06}" for number in range(1, counts["detect"] + 1)]
    trainval, test = ids[: settings.detection_images], ids[settings.detection_images :]
    val = max(len(trainval) // 6, 1)
    for name, members in {"trainval": trainval, "train": trainval[:-val], "val": trainval[-val:], "test": test}.items():
        write_split(root, name, members)
    chunks = [
        (folder, settings, part, range(start, min(start + CHUNK, count)))
        for part, count in counts.items()
        for start in range(0, count, CHUNK)
    ]
    with progress("generate data (100 images a step)", len(chunks)) as meter:
        if workers == 1 or len(chunks) == 1:
            for chunk in chunks:
                draw_chunk(*chunk)
                meter.step()
            return
        # spawn: a fork of a process that has run torch or cv2 threads can hang; and a worker whose parent was killed
        # would wait for its next chunk forever
        context, parent = multiprocessing.get_context("spawn"), (os.getpid(),)
        with ProcessPoolExecutor(min(workers, len(chunks)), context, end_with_parent, parent) as pool:
            for done in as_completed([pool.submit(draw_chunk, *chunk) for chunk in chunks]):
                done.result()
                meter.step()


def draw_chunk(folder: Path, settings: GenerateSettings, part: str, indices: range) -> None:
    """Draw and write some images of a part; each has a generator of its own."""
    seed = derive_seed(settings.seed, "generate", part)
    threads = cv2.getNumThreads()
    # the pictures are too small to share among threads
    cv2.setNumThreads(1)
    try:
        for index in indices:
            rng = np.random.default_rng([seed, index])
            if part == "detect":
                id_, root = f"{index + 1:06}", folder / DETECTION
                image, annotation = draw_scene(rng, id_, CLASSES[: settings.detection_classes], settings)
                (root / "JPEGImages" / f"{id_}.jpg").write_bytes(image)
                (root / "Annotations" / f"{id_}.xml").write_text(voc_xml(annotation, f"{id_}.jpg", DETECTION))
            else:
                # classes take turns, so that they have the same number of images
                number, label = divmod(index, settings.classification_classes)
                path = folder / CLASSIFICATION / part / CLASSES[label] / f"{number + 1:06}.jpg"
                path.write_bytes(draw_crop(rng, CLASSES[label], settings))
    finally:
        cv2.setNumThreads(threads)
