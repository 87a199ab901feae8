"""Everything that is wrong with a data set, in one go."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from nst_det.data.annotation import MAX_XML_BYTES, VocAnnotation, annotation_from, parse_xml
from nst_det.data.coco import SPLITS, CocoImage, CocoSource, read_coco
from nst_det.data.folders import class_folders
from nst_det.data.images import EXTENSIONS, MAX_IMAGE_BYTES, EncodedImage
from nst_det.data.layouts import Layout, find_layout
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, read_text, shown, shown_path
from nst_det.data.splits import original
from nst_det.data.voc import composed, find_voc_root, scan_list
from nst_det.data.yolo import MAX_LABEL_BYTES, YoloClasses, parse_yolo
from nst_det.engine.machine import core_count
from nst_det.errors import UserError

SIZE_MISSING = "size missing"
# lists that must not share an image: what is tested on must not be trained on
DISJOINT = (("train", "val"), ("train", "test"), ("val", "test"), ("trainval", "test"))
SUBSETS = (("train", "trainval"), ("trainval", "train"), ("val", "trainval"), ("trainval", "val"))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # the same words for all problems of its sort
    file: str  # relative to the data set's root
    text: str  # one line

    def line(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass
class Report:
    """What was looked at, and what is wrong with it."""

    root: Path
    layout: str  # what was recognized, such as VOC folder or image folder
    counts: dict[str, int] = field(default_factory=dict)  # of images, annotations, objects and so on
    problems: list[Problem] = field(default_factory=list)  # in the end by kind, then by file
    notes: list[str] = field(default_factory=list)  # lines on the whole set, of what may be meant as it is

    def add(self, kind: str, path: Path, text: str | UserError) -> None:
        """Note a problem of ``path``; an error begins with its name, which is not repeated."""
        relative = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.problems.append(Problem(kind, shown_path(relative), str(text).removeprefix(f"{shown_path(path)}: ")))

    def by_kind(self) -> dict[str, int]:
        """Return how many problems of each kind there are."""
        return dict(Counter(problem.kind for problem in self.problems))

    def summary(self) -> str:
        """Return one line: what was looked at, and how many problems there are."""
        what = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.by_kind().items())
        return f"{self.layout}, {what}: {kinds or 'no problem'}"


def check_data(
    path: str | Path | CocoSource,
    splits: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    workers: int = 0,
) -> Report:
    """Look at every file of a folder with boxes (any that :func:`find_layout` knows) or an image folder.

    Images are decoded, by ``workers`` threads (0: all cores).  ``splits`` are lists to look at, with the images in
    them; None takes all lists and all files.  ``classes`` are the only names that objects (or class folders) may have;
    None allows any.  COCO's JSON is looked at by :func:`check_coco`.
    """
    workers = workers or core_count()
    if isinstance(path, CocoSource):
        return check_coco(path, classes, workers)[0]
    root = Path(path).expanduser()
    if root.suffix.lower() == ".json":
        raise UserError(f"{shown_path(root)}: COCO's JSON needs the folder of its images too; name it by --images")
    layout = find_layout(root)
    if layout:
        report = _check_layout(layout, splits, classes, workers)
    else:
        if (root / "ImageSets").exists() or (root / "JPEGImages").exists():
            find_voc_root(root)
        if splits:
            raise UserError(f"{shown_path(root)}: lists are for folders with boxes, and this has none")
        report = _check_folders(root.resolve(), classes, workers)
    report.problems.sort(key=lambda problem: (problem.kind, problem.file))
    return report


def check_coco(
    source: CocoSource, classes: Sequence[str] | None = None, workers: int = 0
) -> tuple[Report, list[CocoImage]]:
    """Look at everything in COCO's JSON, and at the images in it; return what can be used of it, too."""
    report = Report(source.files[0].parent.absolute(), "COCO JSON")
    found = read_coco(source, report.add)
    images = {image.annotation.id: image.path for image in found}
    decoded = _check_images(report, list(images.values()), workers or core_count())
    annotations = {image.annotation.id: (image.where, image.annotation) for image in found}
    unsized = [image for image in found if not image.annotation.width and image.path in decoded]
    for image in unsized:
        width, height = decoded[image.path].size
        annotations[image.annotation.id] = image.where, replace(image.annotation, width=width, height=height)
    if unsized:
        text = f"has no size of {len(unsized)} of {len(found)} images; the images' own are taken"
        report.add(SIZE_MISSING, source.files[0], text)
    _check_annotations(report, source.files[0], annotations, images, decoded, classes)
    parts = [[image.path for image in found if image.split == split] for split in SPLITS]
    _check_twins(report, [shown_path(file) for file in source.files], parts, decoded)
    report.problems.sort(key=lambda problem: (problem.kind, problem.file))
    return report, found


class _Decoded(NamedTuple):
    size: tuple[int, int]  # width and height, upright
    sha256: str
    orientation: int  # of EXIF, 1 where it is upright


def _check_images(report: Report, paths: Sequence[Path], workers: int) -> dict[Path, _Decoded]:
    """Return what is known of each image that can be decoded."""

    def decode(path: Path) -> _Decoded | UserError:
        try:
            data = read_bytes(path, MAX_IMAGE_BYTES, "image")
            image = EncodedImage(data, shown_path(path))
            image.pixels()
        except UserError as error:
            return error
        return _Decoded((image.width, image.height), hashlib.sha256(data).hexdigest(), image.orientation)

    report.counts["images"] = len(paths)
    decoded = {}
    with ThreadPoolExecutor(workers) as pool:
        for path, found in zip(paths, pool.map(decode, paths)):
            if isinstance(found, UserError):
                report.add("unreadable image", path, found)
            else:
                decoded[path] = found
    return decoded


def _check_twins(
    report: Report, names: Sequence[str], parts: Sequence[Sequence[Path]], decoded: dict[Path, _Decoded]
) -> None:
    """Report the images of the second part that are the same file as one of the first, or another version of one."""
    stems = {path.stem for part in parts for path in part}
    first = {decoded[path].sha256: path for path in parts[0] if path in decoded}
    versions = {original(path.stem, stems): path for path in parts[0]}
    for path in parts[1]:
        picture = original(path.stem, stems)
        twin = first.get(decoded[path].sha256) if path in decoded else None
        version = versions.get(picture)
        # two images of one name, in two folders, are no versions
        if version and version.stem == path.stem == picture:
            version = None
        kind, what, remedy = "same image in two lists", "is the same file as", "keep one"
        if twin is None:
            kind, what, remedy = "same picture in two lists", "shows the same as", "keep all versions in one list"
        other = twin or version
        if other not in (None, path):
            same = other.relative_to(report.root) if other.is_relative_to(report.root) else other
            where = f"{shown_path(same)} in {names[0]}"
            report.add(kind, path, f"in {names[1]}, {what} {where}; {remedy}")


def _check_folders(root: Path, classes: Sequence[str] | None, workers: int) -> Report:
    report = Report(root, "image folder")
    parts = [root / name for name in ("train", "val") if (root / name).is_dir()] or [root]
    names = [set(class_folders(part)) for part in parts]
    if not any(names):
        raise UserError(
            f"{shown_path(root)}: neither a VOC folder (Annotations, JPEGImages, ImageSets/Main) nor an image folder "
            "(train/CLASS/*.jpg or CLASS/*.jpg)"
        )
    known = set(classes) if classes is not None else names[0]
    report.counts["classes"] = len(known)
    images = []
    for part, found in zip(parts, names):
        for name in sorted(known - found):
            report.add("missing class", part / name, "no such folder; add it, or leave the class out")
        for name in sorted(found - known):
            report.add("unknown class", part / name, f"not one of the classes ({len(known)}); remove or rename it")
        images.append([path for name in sorted(found) for path in _class_images(report, part / name)])
    decoded = _check_images(report, [path for paths in images for path in paths], workers)
    if len(parts) == 2:
        _check_twins(report, ("train", "val"), images, decoded)
    return report


def _class_images(report: Report, folder: Path) -> list[Path]:
    images = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            report.add("other file", path, "a folder inside a class folder is not read; move its images up")
        elif not path.name.lower().endswith(EXTENSIONS):
            report.add("other file", path, f"is not read, since it is none of {', '.join(EXTENSIONS)}")
        else:
            images.append(path)
    if not images:
        report.add("empty class", folder, "no images; add some or remove the folder")
    return images


@dataclass
class _Corners:
    """Whether corners seem to be counted from 0, where VOC counts from 1."""

    at_zero: int = 0
    at_end: int = 0  # on the right or lower border, where a box that was counted from 0 ends one pixel after its last
    first: str = ""

    def add(self, annotation: VocAnnotation, path: Path) -> None:
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            self.at_zero += 0 in (xmin, ymin)
            self.at_end += xmax == annotation.width or ymax == annotation.height
            self.first = self.first or (path.name if 0 in (xmin, ymin) else "")

    def notes(self) -> list[str]:
        remedy = "add 1 to xmin and ymin of all boxes"
        if not self.at_end:
            remedy += ", and to xmax and ymax if the tool took both ends as inside"
        found = f"boxes that begin at 0: {self.at_zero}, the first in {shown(self.first)}"
        return (
            [f"counted from 0? VOC counts from 1; {found}; if the tool counted from 0, {remedy}"]
            if self.at_zero
            else []
        )


def _check_layout(layout: Layout, splits: Sequence[str] | None, classes: Sequence[str] | None, workers: int) -> Report:
    report = Report(layout.root, layout.kind)
    lists = _check_lists(report, layout, splits)
    for path, id_ in sorted(layout.unused.items()):
        report.add("repeated id", path, f"{shown(layout.images[id_].name)} has the same name and is used; remove one")
    images, annotated = layout.images, layout.annotations
    if splits is not None:
        listed = {id_ for ids in lists.values() for id_ in ids}
        images, annotated = ({id_: files[id_] for id_ in files if id_ in listed} for files in (images, annotated))
    _check_pairs(report, layout, lists, images, annotated)
    images, annotated = (
        {id_: path for id_, path in files.items() if not _leads_out(report, path)} for files in (images, annotated)
    )
    decoded = _check_images(report, list(images.values()), workers)
    annotations = {}
    tags = 0
    for id_, path in annotated.items():
        seen = decoded.get(images[id_]) if id_ in images else None
        if layout.classes:
            annotation = _check_yolo(report, path, id_, seen.size if seen else (1, 1), layout.classes)
        else:
            annotation, found = _check_xml(report, path, id_, images)
            tags += found
        # boxes of YOLO are known in pixels with the image alone
        if annotation and (seen or not layout.classes):
            annotations[id_] = path, annotation
    report.counts["annotations"] = len(annotated)
    whole = layout.root / "Annotations" if layout.is_voc else layout.root
    _check_annotations(report, whole, annotations, images, decoded, classes)
    if report.counts["objects"] and not tags and not layout.classes:
        report.notes.append(
            "no object has the tag <difficult>, so that none is left out of the AP; some tools drop it (supervision, "
            "globox): if the data had difficult objects, take the original annotations"
        )
    for pair in _disjoint(lists, splits):
        parts = [[images[id_] for id_ in lists[name] if id_ in images] for name in pair]
        _check_twins(report, pair, parts, decoded)
    return report


def _check_annotations(
    report: Report,
    whole: Path,
    annotations: Mapping[str, tuple[Path, VocAnnotation]],
    images: Mapping[str, Path],
    decoded: Mapping[Path, _Decoded],
    classes: Sequence[str] | None,
) -> None:
    """Compare annotations (by id, each with its place in ``whole``) with the images; look at every object in them."""
    names: Counter[str] = Counter()
    corners = _Corners()
    for id_, (path, annotation) in annotations.items():
        names.update(annotation.names)
        corners.add(annotation, path)
        if images.get(id_) in decoded:
            annotation = _check_size(report, path, annotation, images[id_], decoded[images[id_]])
        _check_objects(report, path, annotation, classes)
    report.notes += corners.notes()
    report.counts |= {"objects": names.total(), "classes": len(names)}
    similar = defaultdict(list)
    for name in sorted(names):
        similar["".join(c for c in name.casefold() if c not in " -_")].append(name)
    for group in similar.values():
        if len(group) > 1:
            counts = ", ".join(f"'{shown(name)}' ({names[name]} objects)" for name in group)
            report.add("similar class names", whole, f"{counts} may be one class; give it one name")


def _check_size(report: Report, path: Path, annotation: VocAnnotation, image: Path, seen: _Decoded) -> VocAnnotation:
    """Compare an annotation's size with its image's; return it with the latter where it has none."""
    if seen.orientation != 1:
        turned = f"its EXIF orientation is {seen.orientation}, and it is turned upright when it is read"
        report.add("turned image", image, f"{turned}; see that the boxes are too, and drop the EXIF")
    width, height = seen.size
    if not annotation.width:
        report.add(SIZE_MISSING, path, f"its size is missing or 0; the image's own is taken, {width}x{height}")
        return replace(annotation, width=width, height=height)
    if seen.size != (annotation.width, annotation.height):
        remedy = "correct it"
        if seen.orientation >= 5:
            remedy = "EXIF exchanges its sides: drop the EXIF if the boxes were drawn without it, or correct the size"
        declared = f"{annotation.width}x{annotation.height}"
        report.add("wrong size", path, f"size is {declared}, but the image is {width}x{height}; {remedy}")
    return annotation


def _check_lists(report: Report, layout: Layout, splits: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Return the ids of each list; lists of one class are left out."""
    lists = {name: ids for name, ids in layout.splits.items() if splits is None or name in splits}
    files = layout.list_files()
    if splits is not None:
        known = [*layout.splits, *files]
        for name in splits:
            if name not in known:
                there = ", ".join(known[:20]) or "none at all"
                raise UserError(f"{shown_path(layout.root)}: no list '{shown(name)}'; there are {shown(there, 400)}")
        files = {name: files[name] for name in splits if name not in lists}
    for name, path in files.items():
        if _leads_out(report, path):
            continue
        try:
            found = scan_list(path, lambda: layout.ids)
        except UserError as error:
            report.add("bad list", path, error)
            continue
        if found is not None:
            lists[name], problems = found
            for kind, text in problems:
                report.add(kind, path, text)
    report.counts["lists"] = len(lists)
    for one, other in _disjoint(lists, splits):
        for id_ in sorted(set(lists[one]) & set(lists[other])):
            path = files.get(other, layout.images.get(id_, layout.root))
            report.add("id in two lists", path, f"{shown(id_)} is in {one} and in {other}; keep one")
    return lists


def _disjoint(lists: Collection[str], given: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return the pairs of lists that must not share an image: all that are given, or those that names tell."""
    if given:
        return [pair for pair in combinations(given, 2) if pair not in SUBSETS and set(pair) <= set(lists)]
    prefixes = sorted({name.removesuffix(end) for name in lists for pair in DISJOINT for end in pair})
    pairs = [(prefix + one, prefix + other) for prefix in prefixes for one, other in DISJOINT]
    return [pair for pair in pairs if set(pair) <= set(lists)]


def _check_pairs(
    report: Report,
    layout: Layout,
    lists: dict[str, tuple[str, ...]],
    images: dict[str, Path],
    annotated: dict[str, Path],
) -> None:
    if layout.is_voc and not (layout.root / "JPEGImages").is_dir():
        report.add("missing image", layout.root / "JPEGImages", "no such folder; put the images there")
    listed_in = defaultdict(list)
    for name, ids in lists.items():
        for id_ in ids:
            listed_in[id_].append(name)
    for id_ in sorted(listed_in.keys() | images.keys() | annotated.keys()):
        listed = id_ in listed_in
        where = f"listed in {', '.join(listed_in[id_])}" if listed else "not listed"
        if id_ not in images and id_ not in annotated:
            path = layout.root / "JPEGImages" / id_ if layout.is_voc else layout.root / id_
            report.add("missing image", path, f"no image and no annotation ({where}); add both")
        elif id_ not in images:
            kind = "missing image" if listed else "annotation without image"
            report.add(kind, annotated[id_], f"no image {shown(id_)} with {' or '.join(EXTENSIONS)} ({where})")
        elif id_ not in annotated and not layout.classes:
            kind = "missing annotation" if listed else "image without annotation"
            needed = f"Annotations/{shown(id_)}.xml" if layout.is_voc else "annotation of this name"
            report.add(kind, images[id_], f"no {needed} ({where})")


def _leads_out(report: Report, path: Path) -> bool:
    outside = leads_outside(path, report.root)
    if outside:
        report.add("link to outside", path, "is a link to outside the data set; put the file itself there")
    return outside


def _check_yolo(
    report: Report, path: Path, id_: str, size: tuple[int, int], classes: YoloClasses
) -> VocAnnotation | None:
    try:
        annotation, problems = parse_yolo(read_text(path, MAX_LABEL_BYTES, "label"), id_, size, classes)
    except UserError as error:
        report.add("bad annotation", path, error)
        return None
    for text in problems:
        report.add("bad annotation", path, text)
    return annotation


def _check_xml(report: Report, path: Path, id_: str, images: dict[str, Path]) -> tuple[VocAnnotation | None, int]:
    """Return the annotation, and how many of its objects say whether they are difficult."""
    try:
        root = parse_xml(read_bytes(path, MAX_XML_BYTES, "annotation"))
    except UserError as error:
        report.add("bad annotation", path, error)
        return None, 0
    annotation, problems = annotation_from(root, id_)
    for text in problems:
        report.add("bad annotation", path, text)
    filename = (root.findtext("filename") or "").strip()
    stem, image = Path(filename).stem, images.get(id_)
    # a part of the image's own path is right
    below = image is not None and f"{image.as_posix()}".endswith(f"/{filename}")
    if ("/" in filename or "\\" in filename or filename in (".", "..")) and not below:
        report.add("leads outside", path, f"filename '{shown(filename)}' leads elsewhere (it isn't followed)")
    elif not below and composed(stem) != composed(path.stem) and composed(stem) in images:
        used = shown(image.name) if image else "none"
        text = f"filename names the image {shown(filename)}, but an annotation's own name counts ({used})"
        report.add("names another image", path, f"{text}; rename one of them, or correct filename")
    return annotation, len(root.findall("object/difficult"))


def _check_objects(report: Report, path: Path, annotation: VocAnnotation, classes: Sequence[str] | None) -> None:
    problem = name_problem(annotation.id)
    if problem:
        report.add("bad annotation", path, f"its name {problem}; rename it")
    first: dict[tuple[str, tuple[float, ...]], int] = {}
    for index, item in enumerate(annotation.objects):
        fault = annotation.box_fault(index)
        if fault:
            report.add(fault[0], path, fault[1])
        if classes is not None and item.name not in classes:
            names = ", ".join(f"'{shown(name)}'" for name in classes)
            report.add("unknown class", path, f"{annotation.describe(index)} is not one of {names}")
        twin = first.setdefault((item.name, item.box), index)
        if twin != index:
            report.add("repeated object", path, f"{annotation.describe(index)} is the same as object {twin + 1}")
