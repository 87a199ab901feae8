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

import cv2
import numpy as np

from nst_det.data.reading import shown_path
from nst_det.data.scenes import draw_crop, draw_scene, voc_xml
from nst_det.data.shapes import OUTLINES, Look
from nst_det.errors import UserError
from nst_det.runtime.files import read_json, write_json
from nst_det.runtime.lifetime import end_with_parent

CLASSIFICATION = "shapes_cls"
DETECTION = "shapes_voc"
SETTINGS_FILE = "settings.json"
CLASSES = tuple(OUTLINES)
CHUNK = 100
MAX_IMAGES = 1_000_000
# upper ends of the settings of a look; no color is more than 200 away from all others
MOST = {"rotation": 180, "contrast": 200, "texture": 100, "noise": 100, "clutter": 10, "shift": 32}


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
    from nst_det.runtime.progress import progress
    from nst_det.runtime.seeds import derive_seed

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
