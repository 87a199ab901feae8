"""From a VOC folder to a project that can be compared on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nst_det.data.annotation import read_annotation
from nst_det.data.check import Report, check_data
from nst_det.data.coco import CocoSource, convert_coco
from nst_det.data.folders import read_image_folder
from nst_det.data.safe_io import shown_path
from nst_det.data.splits import TEST_FRACTION, cut_test_ids, ids_to_cut, known_pair, write_pair
from nst_det.data.voc import VOC_CLASSES, VocDataset, find_voc_root, split_path
from nst_det.engine.io import atomic_folder, write_text
from nst_det.errors import UserError
from nst_det.models import check_name
from nst_det.scaffold.configs import (
    PRESETS,
    Values,
    box_sizes,
    fit_anchors,
    fit_detection,
    fit_distillation,
    fit_size,
    render,
)
from nst_det.scaffold.crops import write_crops

# problems with which a run would stop half-way
FATAL = ("unreadable image", "missing image", "missing annotation", "bad annotation", "bad list", "wrong size")
CROPS = Path("data") / "crops"
CONVERTED = Path("data") / "voc"


@dataclass(frozen=True)
class Project:
    """What was made, and what was seen on the way.

    Attributes:
        values: as they stand in the YAMLs.
        report: of the data's check.
        images: to train and to test on.
        objects: to train on.
        small: part of them, 0..1, that is smaller than 8 pixels after resizing.
        cut: whether lists were written into the VOC folder.
    """

    values: Values
    report: Report
    images: tuple[int, int]
    objects: int
    small: float
    cut: bool


def init_project(
    folder: str | Path,
    voc: str | Path | CocoSource,
    images: str | Path | None = None,
    train: str = "",
    test: str = "",
    device: str = "cpu",
) -> Project:
    """Look at a VOC folder (COCO annotations become one inside the project) and make a project for it.

    Where the folder has no lists to train and test on, a fifth of the images is held out and the lists
    ``nst_det_train`` and ``nst_det_test`` are written into its ``ImageSets/Main``; nothing else in it is changed.

    Args:
        folder: the project to make; its last part names the backbone files.
        voc: see :func:`nst_det.data.voc.find_voc_root`; or COCO annotations.
        images: an image folder for stage one; None cuts crops out of the images (see :mod:`nst_det.scaffold.crops`).
        train: list to train on; "" takes those there are, or cuts them.
        test: list to test on.
        device: ``cpu`` or ``cuda``: what the sizes and schedules are made for.

    Raises:
        UserError: the project is there already, or the data can't be used.
    """
    folder = Path(folder).expanduser().resolve()
    check_name(folder.name)
    if folder.exists():
        raise UserError(f"{folder}: is there already; name another project, or remove it")
    if not isinstance(voc, CocoSource):
        root = find_voc_root(voc)
        report = check_data(root, [train, test] if train and test else None)
        _refuse_broken(report, f"nst-det check-data {shown_path(root)} lists all")
        lists, cut = _lists(root, train, test)
        with _taken_back(root, lists if cut else ()), atomic_folder(folder, "name another project") as made:
            return _write_project(folder, made, root, report, lists, cut, images, device)
    with atomic_folder(folder, "name another project") as made:
        converted = convert_coco(voc, made / CONVERTED)
        report = replace(check_data(converted), root=folder / CONVERTED)
        _refuse_broken(report, f"correct {shown_path(voc.files[0])} or the image, and run the same command again")
        lists, cut = _lists(converted, train, test)
        return _write_project(folder, made, converted, report, lists, cut, images, device)


def _write_project(
    folder: Path,
    made: Path,
    root: Path,
    report: Report,
    lists: tuple[str, str],
    cut: bool,
    images: str | Path | None,
    device: str,
) -> Project:
    """Write the project into ``made``, which becomes ``folder``; ``root`` is where the data is now."""
    train, test = lists
    learned, tested = (VocDataset(root, name).annotations() for name in lists)
    names_found = {name for item in (*learned, *tested) for name in item.names}
    classes = VOC_CLASSES if names_found == set(VOC_CLASSES) else tuple(sorted(names_found))
    size = fit_size(learned, PRESETS[device].longest)
    sizes, names = box_sizes(learned, *size)
    if not len(sizes):
        raise UserError(f"{root}: no object in {train} to train on; see nst-det check-data {root}")
    if images is None:
        counts = write_crops(VocDataset(root, train, classes), made / CROPS)
        image_root, count = folder / CROPS, counts.total()
        note = f"{count} crops, cut out of {train}; with classification data of your own, name its folder here"
    else:
        found = read_image_folder(images)
        if len(found.classes) < 2:
            raise UserError(f"{images}: one class of images teaches nothing; stage one needs two or more")
        image_root, count = found.root.resolve(), len(found.train)
        note = f"{len(found.classes)} classes, {count} images to train on"
    teacher, student = fit_distillation(count, device)
    values = Values(
        name=folder.name,
        folder=folder,
        voc=report.root,
        train=train,
        test=test,
        classes=classes,
        images=image_root,
        images_note=note,
        image_size=PRESETS[device].square,
        size=size,
        anchors=fit_anchors(sizes, names),
        median=max(1, round(float(np.median(sizes)))),
        most_objects=max(len(item.objects) for item in [*learned, *tested]),
        teacher=teacher,
        student=student,
        detection=fit_detection(sum(bool(item.objects) for item in learned), device),
    )
    for file, text in render(values).items():
        write_text(made / file, text)
    small = float((sizes < 8).mean())
    return Project(values, report, (len(learned), len(tested)), len(sizes), small, cut)


@contextmanager
def _taken_back(root: Path, lists: Sequence[str]) -> Iterator[None]:
    """Remove the lists that were cut for a project where none comes of it."""
    try:
        yield
    except BaseException:
        for name in lists:
            split_path(root, name).unlink(missing_ok=True)
        raise


def _refuse_broken(report: Report, remedy: str) -> None:
    broken = [problem for problem in report.problems if problem.kind in FATAL]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{shown_path(report.root)}: {broken[0].kind}: {broken[0].line()}{more}; {remedy}")


def _lists(root: Path, train: str, test: str) -> tuple[tuple[str, str], bool]:
    """Return the names of the lists to train and test on, and whether they were written now."""
    pair = known_pair(root, train, test)
    if pair is not None:
        return pair, False
    ids = ids_to_cut(root)
    classes_of = {id_: read_annotation(root / "Annotations" / f"{id_}.xml").names for id_ in ids}
    held = cut_test_ids(classes_of, TEST_FRACTION)
    if not held or len(held) == len(ids):
        raise UserError(
            f"{shown_path(root)}: {len(ids)} images are too few to hold some out for the test; add images, so that "
            "every class is on two at least"
        )
    return write_pair(root, ids, held), True
