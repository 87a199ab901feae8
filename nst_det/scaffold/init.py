"""From images with boxes to a project that can be compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nst_det.data.annotation import read_annotation
from nst_det.data.check import Report, check_coco, check_data
from nst_det.data.coco import OTHER_FORM, CocoSource, write_coco_as_voc
from nst_det.data.folders import read_image_folder, read_unlabelled_folder
from nst_det.data.layouts import Layout, convert_layout, find_layout
from nst_det.data.safe_io import shown_path
from nst_det.data.splits import TEST_FRACTION, cut_test_ids, hold_out, ids_to_cut, known_pair, same_pictures, write_pair
from nst_det.data.voc import VocDataset, annotation_files, image_names, read_split, split_names, split_path
from nst_det.engine.io import atomic_folder, write_text
from nst_det.errors import UserError
from nst_det.models import check_name
from nst_det.scaffold.configs import (
    PRESETS,
    VAL_FRACTION,
    Network,
    Values,
    box_sizes,
    choose_networks,
    fit_anchors,
    fit_detection,
    fit_distillation,
    fit_period,
    fit_size,
    render,
)
from nst_det.scaffold.crops import write_crops

# problems with which a run would stop half-way
FATAL = (
    *("unreadable image", "missing image", "missing annotation", "bad annotation", "bad list", "wrong size"),
    "link to outside",
    OTHER_FORM,
)
# the lists that a third is validated beside
OF_THREE, VAL_LIST = ("train", "test"), "val"
CROPS = Path("data") / "crops"
CONVERTED = Path("data") / "voc"


@dataclass(frozen=True)
class Project:
    """What was made, and what was found on the way."""

    values: Values
    report: Report
    images: tuple[int, int]  # to train and to test on
    objects: int  # to train on
    small: float  # part of them, 0..1, that is smaller than 8 pixels after resizing
    cut: bool  # whether lists were written into the VOC folder
    to_bring: tuple[str, ...] = ()  # a line for each published network whose weights can't be had here


def init_project(
    folder: str | Path,
    voc: str | Path | CocoSource,
    images: str | Path | None = None,
    train: str = "",
    test: str = "",
    device: str = "cpu",
    unlabelled: str | Path | None = None,
    student: str = "",
    teacher: str = "",
) -> Project:
    """Make a project for a folder of images with boxes, or for COCO annotations.

    What is not in VOC's layout becomes a VOC folder inside the project.

    Where the folder has no lists to train and test on, a fifth of the images is held out and the lists
    ``nst_det_train`` and ``nst_det_test`` are written into its ``ImageSets/Main``; nothing else in it is changed.

    Args:
        folder: the project to make; its last part names the backbone files.
        voc: a folder with a layout that :func:`nst_det.data.layouts.find_layout` knows; or COCO annotations.
        images: an image folder for stage one; None cuts crops out of the images.
        train: list to train on; "" takes those there are, or cuts them.
        test: list to test on.
        device: ``cpu`` or ``cuda``: what the sizes and schedules are made for; "" takes what is here.
        unlabelled: images without labels in place of ``images``, at any depth; a published network teaches.
        student: timm's name of the students' network; see :func:`nst_det.scaffold.configs.choose_networks`.
        teacher: of the teacher's.
    """
    folder = Path(folder).expanduser().resolve()
    check_name(folder.name)
    if images is not None and unlabelled is not None:
        raise UserError("--unlabelled: stage one learns from one folder; leave out --images")
    if device not in ("", *PRESETS):
        raise UserError(f"--device: '{device}'; choose {' or '.join(PRESETS)}")
    if folder.exists():
        raise UserError(f"{folder}: is there already; name another project, or remove it")
    # before torch is imported
    layout = None if isinstance(voc, CocoSource) else _layout(voc)
    if layout is not None and not layout.is_voc and layout.root in folder.parents:
        raise UserError(
            f"{folder}: would be inside {shown_path(layout.root)}, and its copies of the images be found beside them; "
            "name a project outside"
        )
    device = device or _device_here()
    networks = choose_networks(student, teacher, device, unlabelled is None)
    cut: list[Path] = []
    try:
        with atomic_folder(folder, "name another project") as made:
            if layout is None:
                assert isinstance(voc, CocoSource)
                report, coco = check_coco(voc)
                _refuse_broken(report, f"nst-det check-data {voc} lists all")
                root = write_coco_as_voc(coco, made / CONVERTED)
                # where it will be
                report = replace(report, root=folder / CONVERTED)
            else:
                root = layout.root
                report = check_data(root, _checked_lists(layout, train, test))
                _refuse_broken(report, f"nst-det check-data {shown_path(root)} lists all")
                if not layout.is_voc:
                    root = convert_layout(layout, made / CONVERTED)
            lists = known_pair(root, train, test)
            if lists is None:
                lists = _cut_lists(root)
                cut = [split_path(root, name) for name in lists]
            stage_one = (images, unlabelled)
            return _write_project(folder, made, root, report, lists, bool(cut), stage_one, device, networks)
    except BaseException:
        for path in cut:
            path.unlink(missing_ok=True)
        raise


def _checked_lists(layout: Layout, train: str, test: str) -> list[str] | None:
    """Return the lists that a project uses; None for all there are."""
    if not (train and test):
        return None
    val = [VAL_LIST] if (train, test) == OF_THREE and VAL_LIST in layout.list_files() else []
    return [train, test, *val]


def _write_project(
    folder: Path,
    made: Path,
    root: Path,
    report: Report,
    lists: tuple[str, str],
    cut: bool,
    stage_one: tuple[str | Path | None, str | Path | None],
    device: str,
    networks: tuple[Network, Network],
) -> Project:
    """Write the project into ``made``, which becomes ``folder``; ``root`` is where the data is now."""
    (train, test), (images, unlabelled) = lists, stage_one
    learned, tested = (VocDataset(root, name).annotations() for name in lists)
    of_three = lists == OF_THREE and VAL_LIST in split_names(root)
    files = annotation_files(root)
    validated = [
        read_annotation(files.get(id_, root / "Annotations" / f"{id_}.xml"), id_)
        for id_ in (read_split(root, VAL_LIST) if of_three else ())
    ]
    val = VAL_LIST if any(item.objects for item in validated) else ""
    # those of all lists; VOC's own are in this order, too
    classes = tuple(sorted({name for item in (*learned, *validated, *tested) for name in item.names}))
    size = fit_size(learned, PRESETS[device].longest)
    sizes, names = box_sizes(learned, *size)
    if not len(sizes):
        raise UserError(f"{root}: no object in {train} to train on; see nst-det check-data {root}")
    if unlabelled is not None:
        bare = read_unlabelled_folder(unlabelled)
        image_root, count = bare.root.resolve(), len(bare.train)
        note = f"{count + len(bare.val)} images without labels, {len(bare.val)} of them held out"
        pictures = image_names(root / "JPEGImages")
        within = [(root / "JPEGImages" / pictures[item.id]).resolve().is_relative_to(image_root) for item in tested]
        if any(within):
            note += f"; {sum(within)} images of {test} are in it: better name a folder without them"
    elif images is None:
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
    left, val_fraction = (
        (VocDataset(root, train, classes), 0.0) if val else _validated(VocDataset(root, train, classes))
    )
    detection = fit_detection(sum(bool(item.objects) for item in left.annotations()), device)
    values = Values(
        name=folder.name,
        folder=folder,
        voc=folder / root.relative_to(made) if root.is_relative_to(made) else root,
        train=train,
        test=test,
        classes=classes,
        student_network=networks[0],
        teacher_network=networks[1],
        small=PRESETS[device].small,
        images=image_root,
        images_note=note,
        image_size=PRESETS[device].square,
        size=size,
        anchors=fit_anchors(sizes, names),
        median=max(1, round(float(np.median(sizes)))),
        most_objects=max(len(item.objects) for item in [*learned, *validated, *tested]),
        teacher=teacher,
        student=student,
        detection=detection,
        period=fit_period(detection.iterations),
        val=val,
        val_fraction=val_fraction,
        labels=unlabelled is None,
    )
    for file, text in render(values).items():
        write_text(made / file, text)
    small = float((sizes < 8).mean())
    return Project(values, report, (len(learned), len(tested)), len(sizes), small, cut, _to_bring(networks))


def _to_bring(networks: Sequence[Network]) -> tuple[str, ...]:
    wanted = dict.fromkeys(network.arch for network in networks if network.published)
    if not wanted:
        return ()
    # timm takes seconds to import
    from nst_det.models.hub import to_bring

    return tuple(line for arch in wanted if (line := to_bring(arch)))


def _validated(data: VocDataset) -> tuple[VocDataset, float]:
    """Return what is left to train on, and the share that is validated on; all and 0 where the images are too few."""
    try:
        left, _ = hold_out(data, VAL_FRACTION)
    except UserError:
        return data, 0.0
    return (left, VAL_FRACTION) if {name for item in left.annotations() for name in item.names} else (data, 0.0)


def _refuse_broken(report: Report, remedy: str) -> None:
    broken = [problem for problem in report.problems if problem.kind in FATAL]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{shown_path(report.root)}: {broken[0].kind}: {broken[0].line()}{more}; {remedy}")


def _cut_lists(root: Path) -> tuple[str, str]:
    ids, files = ids_to_cut(root), annotation_files(root)
    classes_of = {id_: read_annotation(files[id_], id_).names for id_ in ids}
    images = image_names(root / "JPEGImages")
    held = cut_test_ids(
        classes_of, TEST_FRACTION, same_pictures({id_: root / "JPEGImages" / images[id_] for id_ in ids})
    )
    if not held or len(held) == len(ids):
        raise UserError(
            f"{shown_path(root)}: {len(ids)} images are too few to hold some out for the test; add images, so that "
            "every class is on two at least"
        )
    return write_pair(root, ids, held)


def _layout(folder: str | Path) -> Layout:
    found = find_layout(folder)
    if found is None:
        raise UserError(
            f"{shown_path(folder)}: no VOC annotations (XML) and no YOLO labels (txt) for images in it; name "
            "the folder that holds both, and classification data by --images"
        )
    return found


def _device_here() -> str:
    # torch takes seconds to import
    from nst_det.engine.device import default_device

    return default_device().type
