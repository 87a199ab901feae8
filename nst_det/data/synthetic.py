"""The generated data set behind the demo: a real image folder and a real VOC folder of textured shapes.

The classes to detect are a subset of the classes to classify, as VOC's are nearly one of ImageNet's.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2
import numpy as np

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.data.safe_io import shown_path
from nst_det.data.shapes import OUTLINES, Look, Placed, encode_jpeg, fill, finish, ground, object_color, paint, place
from nst_det.engine.io import read_json, write_json
from nst_det.engine.signals import end_with_parent
from nst_det.errors import UserError

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
CLASSIFICATION = "shapes_cls"
DETECTION = "shapes_voc"
SETTINGS_FILE = "settings.json"
CLASSES = tuple(OUTLINES)
CHUNK = 100
MAX_IMAGES = 1_000_000
# upper ends of the settings of a look; no color is more than 200 away from all others
MOST = {"rotation": 180, "contrast": 200, "texture": 100, "noise": 100, "clutter": 10, "shift": 32}


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


@dataclass(frozen=True)
class GenerateSettings:
    """What decides every byte of the data set.

    Attributes:
        seed: of all draws.
        classification_images: to train on, in all classes together.
        classification_val_images: to validate on.
        detection_images: in ``trainval``; the last sixth of them is ``val``, the others ``train``.
        detection_test_images: in ``test``.
        classification_classes: 2 .. 12 classes of the image folder.
        detection_classes: how many of them the VOC folder has.
        look: how hard the pictures are.
    """

    seed: int = 0
    classification_images: int = 9600
    classification_val_images: int = 1200
    detection_images: int = 300
    detection_test_images: int = 200
    classification_classes: int = 10
    detection_classes: int = 8
    look: Look = field(default_factory=Look)

    def __post_init__(self) -> None:
        for name in ("classification_images", "classification_val_images"):
            _check_range(name, getattr(self, name), self.classification_classes, MAX_IMAGES)
        _check_range("detection_images", self.detection_images, 2, MAX_IMAGES)
        _check_range("detection_test_images", self.detection_test_images, 1, MAX_IMAGES)
        _check_range("classification_classes", self.classification_classes, 2, len(CLASSES))
        _check_range("detection_classes", self.detection_classes, 1, self.classification_classes)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        for name, most in MOST.items():
            _check_range(name, getattr(self.look, name), 0, most)


def _check_range(name: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"generate-data: {name} is {value}; give a number from {low} to {high}")


@dataclass(frozen=True)
class _Task:
    """Images ``start`` .. ``stop`` of one part, written below ``folder``."""

    part: str
    start: int
    stop: int
    seed: int
    folder: str
    settings: GenerateSettings


def generate_data(output: str | Path, settings: GenerateSettings | None = None, workers: int = 0) -> Path:
    """Write the data set: ``output/shapes_cls/{train,val}/CLASS/*.jpg`` and the VOC folder ``output/shapes_voc``.

    It appears under its name only when it is whole.  The same settings give the same bytes (under the same versions
    of cv2 and numpy), whatever the number of workers.  One that is there already with the same settings is kept.

    Args:
        output: the folder to make.
        settings: None takes the defaults.
        workers: processes; 0 takes the cores of this process, at most 8.

    Returns:
        ``output``.

    Raises:
        UserError: ``output`` holds something else, or the disk is full.
    """
    settings = settings or GenerateSettings()
    output = Path(output).expanduser()
    if _is_done(output, settings):
        return output
    try:
        with _hidden_folder(output) as folder:
            _generate(folder, settings, workers or min(len(os.sched_getaffinity(0)), 8))
            write_json(folder / SETTINGS_FILE, asdict(settings))
            try:
                os.rename(folder, output)
            except OSError:
                # another process was faster
                if not _is_done(output, settings):
                    raise
    except OSError as error:
        raise UserError(
            f"{shown_path(output)}: can't be written ({error.strerror}); free some space or name another folder"
        ) from error
    return output


def _is_done(output: Path, settings: GenerateSettings) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not output.is_dir():
        raise UserError(f"{shown_path(output)}: is a file; name another folder")
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


@contextmanager
def _hidden_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that is gone afterwards; those of killed processes of this machine go too."""
    prefix = f".{output.name}.{socket.gethostname()}."
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{prefix}*.tmp"):
        pid = left.name[len(prefix) : -len(".tmp")]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = output.parent / f"{prefix}{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _generate(folder: Path, settings: GenerateSettings, workers: int) -> None:
    from nst_det.engine.progress import progress
    from nst_det.engine.seeds import derive_seed

    names = CLASSES[: settings.classification_classes]
    for split in ("train", "val"):
        for name in names:
            (folder / CLASSIFICATION / split / name).mkdir(parents=True)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / DETECTION / name).mkdir(parents=True)
    _write_lists(folder / DETECTION / "ImageSets" / "Main", settings)
    tasks = []
    for part, count in _counts(settings).items():
        seed = derive_seed(settings.seed, "generate", part)
        for start in range(0, count, CHUNK):
            tasks.append(_Task(part, start, min(start + CHUNK, count), seed, str(folder), settings))
    with progress("generate data (100 images a step)", len(tasks)) as meter:
        for _ in _run(draw_task, tasks, workers):
            meter.step()


def _counts(settings: GenerateSettings) -> dict[str, int]:
    return {
        "detect": settings.detection_images + settings.detection_test_images,
        "train": settings.classification_images,
        "val": settings.classification_val_images,
    }


def _run(function: Callable[[_Task], None], tasks: list[_Task], workers: int) -> Iterator[None]:
    if workers == 1 or len(tasks) == 1:
        yield from map(function, tasks)
        return
    # spawn: a fork of a process that has run torch or cv2 threads can hang
    context = multiprocessing.get_context("spawn")
    # a worker whose parent was killed would wait for its next task forever
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=end_with_parent, initargs=(os.getpid(),)
    )
    with pool:
        for done in as_completed([pool.submit(function, task) for task in tasks]):
            yield done.result()


def draw_task(task: _Task) -> None:
    """Draw and write the images of one task; each has a generator of its own."""
    threads = cv2.getNumThreads()
    # the pictures are too small to share among threads
    cv2.setNumThreads(1)
    try:
        for index in range(task.start, task.stop):
            _draw_one(task, index, np.random.default_rng([task.seed, index]))
    finally:
        cv2.setNumThreads(threads)


def _draw_one(task: _Task, index: int, rng: np.random.Generator) -> None:
    look, root = task.settings.look, Path(task.folder)
    if task.part == "detect":
        id_ = _id(index)
        image, annotation = draw_scene(rng, id_, CLASSES[: task.settings.detection_classes], look)
        (root / DETECTION / "JPEGImages" / f"{id_}.jpg").write_bytes(image)
        (root / DETECTION / "Annotations" / f"{id_}.xml").write_text(voc_xml(annotation, DETECTION))
        return
    # classes take turns, so that they have the same number of images
    count = task.settings.classification_classes
    name = CLASSES[index % count]
    path = root / CLASSIFICATION / task.part / name / f"{index // count + 1:06}.jpg"
    path.write_bytes(draw_crop(rng, name, look))


def _id(index: int) -> str:
    return f"{index + 1:06}"


def _write_lists(folder: Path, settings: GenerateSettings) -> None:
    ids = [_id(index) for index in range(_counts(settings)["detect"])]
    trainval, test = ids[: settings.detection_images], ids[settings.detection_images :]
    held_out = max(len(trainval) // 6, 1)
    lists = {"trainval": trainval, "train": trainval[:-held_out], "val": trainval[-held_out:], "test": test}
    for name, members in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{id_}\n" for id_ in members))


def settings_from(values: dict[str, Any]) -> GenerateSettings:
    """Settings from plain values by field name; those of ``look`` by their own names (``contrast``).

    Raises:
        UserError: an unknown name, or a value that is no number.
    """
    own = {name for name in GenerateSettings.__dataclass_fields__ if name != "look"}
    looks = set(Look.__dataclass_fields__)
    for name, value in values.items():
        if name not in own | looks:
            raise UserError(f"generate-data: unknown setting {name}; known are {', '.join(sorted(own | looks))}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (name in looks and isinstance(value, float))):
            raise UserError(f"generate-data: {name} must be a number, but is {value!r}")
    look = Look(**{name: float(value) for name, value in values.items() if name in looks})
    return GenerateSettings(look=look, **{name: value for name, value in values.items() if name in own})
