"""Everything that is wrong with a data set, in one go."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from nst_det.data.annotation import MAX_XML_BYTES, VocAnnotation, annotation_from, parse_xml
from nst_det.data.coco import SPLITS, CocoImage, CocoSource, read_coco
from nst_det.data.folders import EXTENSIONS, class_folders
from nst_det.data.images import MAX_IMAGE_BYTES, decode_oriented
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, shown, shown_path
from nst_det.data.voc import (
    IMAGE_EXTENSIONS,
    annotation_files,
    existing_split_path,
    find_voc_root,
    image_names,
    scan_list,
)
from nst_det.engine.device import core_count
from nst_det.errors import UserError

SIZE_MISSING = "size missing"
# lists that must not share an image: what is tested on must not be trained on
DISJOINT = (("train", "val"), ("train", "test"), ("val", "test"), ("trainval", "test"))


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
    layout: str  # VOC folder or image folder
    counts: dict[str, int] = field(default_factory=dict)  # of images, annotations, objects and so on
    problems: list[Problem] = field(default_factory=list)  # in the end by kind, then by file

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
    """Look at every file of a VOC folder or an image folder; images are decoded, by ``workers`` threads (0: all cores).

    ``splits`` are VOC lists to look at, with the images in them; None takes all lists and all files.  ``classes`` are
    the only names that objects (or class folders) may have; None allows any.  COCO's JSON is looked at by
    :func:`check_coco`.
    """
    workers = workers or core_count()
    if isinstance(path, CocoSource):
        return check_coco(path, classes, workers)[0]
    root = Path(path).expanduser()
    if root.suffix.lower() == ".json":
        raise UserError(f"{shown_path(root)}: COCO's JSON needs the folder of its images too; name it by --images")
    if not root.is_dir():
        raise UserError(f"{shown_path(root)}: no such folder; name a VOC folder or an image folder")
    try:
        voc = find_voc_root(root)
    except UserError as not_voc:
        if (root / "ImageSets").exists() or (root / "JPEGImages").exists() or "several" in str(not_voc):
            raise
        if splits:
            raise UserError(f"{shown_path(root)}: lists are for VOC folders, and this is none") from None
        report = _check_folders(root.resolve(), classes, workers)
    else:
        report = _check_voc(voc, splits, classes, workers)
    report.problems.sort(key=lambda problem: (problem.kind, problem.file))
    return report


def check_coco(
    source: CocoSource, classes: Sequence[str] | None = None, workers: int = 0
) -> tuple[Report, list[CocoImage]]:
    """Look at everything in COCO's JSON, and at the images in it; return what can be used of it, too."""
    report = Report(source.files[0].parent, "COCO JSON")
    found = read_coco(source, report.add)
    images = {image.annotation.id: image.path for image in found}
    decoded = _check_images(report, list(images.values()), workers or core_count())
    annotations = {image.annotation.id: (image.where, image.annotation) for image in found}
    unsized = [image for image in found if not image.annotation.width and image.path in decoded]
    for image in unsized:
        width, height = decoded[image.path][:2]
        annotations[image.annotation.id] = image.where, replace(image.annotation, width=width, height=height)
    if unsized:
        text = f"has no size of {len(unsized)} of {len(found)} images; the images' own are taken"
        report.add(SIZE_MISSING, source.files[0], text)
    _check_objects(report, source.files[0], annotations, images, decoded, classes)
    parts = [[image.path for image in found if image.split == split] for split in SPLITS]
    _check_twins(report, [shown_path(file) for file in source.files], parts, decoded)
    report.problems.sort(key=lambda problem: (problem.kind, problem.file))
    return report, found


class _Decoded(NamedTuple):
    width: int  # upright
    height: int
    sha256: str
    orientation: int  # of EXIF, 1 where it is upright


def _check_images(report: Report, paths: Sequence[Path], workers: int) -> dict[Path, _Decoded]:
    """Return what is known of each image that can be decoded."""

    def decode(path: Path) -> _Decoded | UserError:
        try:
            data = read_bytes(path, MAX_IMAGE_BYTES, "image")
            image, orientation = decode_oriented(data, shown_path(path))
        except UserError as error:
            return error
        height, width = image.shape[:2]
        return _Decoded(width, height, hashlib.sha256(data).hexdigest(), orientation)

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
    """Report the images of the second part that are the same file as an image of the first one."""
    first = {decoded[path].sha256: path for path in parts[0] if path in decoded}
    for path in parts[1]:
        twin = first.get(decoded[path].sha256, path) if path in decoded else path
        if twin != path:
            same = twin.relative_to(report.root) if twin.is_relative_to(report.root) else twin
            text = f"in {names[1]}, is the same file as {shown_path(same)} in {names[0]}; keep one"
            report.add("same image in two lists", path, text)


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


def _check_voc(root: Path, splits: Sequence[str] | None, classes: Sequence[str] | None, workers: int) -> Report:
    report = Report(root, "VOC folder")
    lists = _check_lists(report, splits)
    images = _image_files(report)
    annotated = annotation_files(root)
    if splits is not None:
        listed = {id_ for ids in lists.values() for id_ in ids}
        images, annotated = ({id_: files[id_] for id_ in files if id_ in listed} for files in (images, annotated))
    _check_pairs(report, lists, images, annotated)
    images, annotated = (
        {id_: path for id_, path in files.items() if not _leads_out(report, path)} for files in (images, annotated)
    )
    decoded = _check_images(report, list(images.values()), workers)
    annotations = {id_: (path, _check_annotation(report, path, images)) for id_, path in annotated.items()}
    report.counts["annotations"] = len(annotated)
    _check_objects(report, root / "Annotations", annotations, images, decoded, classes)
    for pair in DISJOINT:
        parts = [[images[id_] for id_ in lists.get(name, ()) if id_ in images] for name in pair]
        _check_twins(report, pair, parts, decoded)
    return report


def _check_objects(
    report: Report,
    whole: Path,
    annotations: Mapping[str, tuple[Path, VocAnnotation | None]],
    images: Mapping[str, Path],
    decoded: Mapping[Path, _Decoded],
    classes: Sequence[str] | None,
) -> None:
    """Compare annotations (by id, each with its place in ``whole``) with the images; look at every object in them."""
    names: Counter[str] = Counter()
    for id_, (path, annotation) in annotations.items():
        if annotation is None:
            continue
        names.update(annotation.names)
        if images.get(id_) in decoded:
            annotation = _check_size(report, path, annotation, images[id_], decoded[images[id_]])
        first: dict[tuple[str, tuple[float, ...]], int] = {}
        for index, item in enumerate(annotation.objects):
            fault = annotation.box_fault(index)
            if fault:
                report.add(fault[0], path, fault[1])
            if classes is not None and item.name not in classes:
                known = ", ".join(f"'{shown(name)}'" for name in classes)
                report.add("unknown class", path, f"{annotation.describe(index)} is not one of {known}")
            twin = first.setdefault((item.name, item.box), index)
            if twin != index:
                report.add("repeated object", path, f"{annotation.describe(index)} is the same as object {twin + 1}")
    report.counts |= {"objects": names.total(), "classes": len(names)}
    similar = defaultdict(list)
    for name in sorted(names):
        similar["".join(c for c in name.casefold() if c not in " -_")].append(name)
    for group in similar.values():
        if len(group) > 1:
            counts = ", ".join(f"'{shown(name)}' ({names[name]} objects)" for name in group)
            report.add("similar class names", whole, f"{counts} may be one class; give it one name")


def _check_size(report: Report, path: Path, annotation: VocAnnotation, image: Path, decoded: _Decoded) -> VocAnnotation:
    """Compare an annotation's size with its image's; return it with the latter where it has none."""
    size, orientation = (decoded.width, decoded.height), decoded.orientation
    if orientation != 1:
        turned = f"its EXIF orientation is {orientation}, and it is turned upright when it is read"
        report.add("turned image", image, f"{turned}; see that the boxes are too, and drop the EXIF")
    if not annotation.width:
        report.add(SIZE_MISSING, path, f"its size is missing or 0; the image's own is taken, {size[0]}x{size[1]}")
        return replace(annotation, width=size[0], height=size[1])
    if size != (annotation.width, annotation.height):
        declared, found = f"{annotation.width}x{annotation.height}", f"{size[0]}x{size[1]}"
        sides = ", whose sides are exchanged by EXIF" if orientation >= 5 else ""
        report.add("wrong size", path, f"size is {declared}, but the image is {found}{sides}; correct it")
    return annotation


def _check_lists(report: Report, splits: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Return the ids of each list; lists of one class are left out."""
    folder = report.root / "ImageSets" / "Main"
    paths = sorted(folder.glob("*.txt"))
    lists: dict[str, tuple[str, ...]] = {}
    for path in paths if splits is None else [existing_split_path(report.root, name) for name in splits]:
        if _leads_out(report, path):
            continue
        try:
            found = scan_list(path)
        except UserError as error:
            report.add("bad list", path, error)
            continue
        if found is not None:
            lists[path.stem], problems = found
            for kind, text in problems:
                report.add(kind, path, text)
    report.counts["lists"] = len(lists)
    for one, other in DISJOINT:
        for id_ in sorted(set(lists.get(one, ())) & set(lists.get(other, ()))):
            report.add("id in two lists", folder / f"{other}.txt", f"{shown(id_)} is in {one} too; keep one")
    return lists


def _image_files(report: Report) -> dict[str, Path]:
    folder = report.root / "JPEGImages"
    try:
        names = image_names(folder)
    except UserError:
        report.add("missing image", folder, "no such folder; put the images there")
        return {}
    for path in sorted(folder.iterdir()):
        used = names.get(path.stem, path.name)
        if path.suffix.lower() in IMAGE_EXTENSIONS and path.name != used and not path.name.startswith("."):
            report.add("repeated id", path, f"{shown(used)} has the same name and is used; remove one")
    return {stem: folder / name for stem, name in sorted(names.items())}


def _check_pairs(
    report: Report, lists: dict[str, tuple[str, ...]], images: dict[str, Path], annotated: dict[str, Path]
) -> None:
    listed_in = defaultdict(list)
    for name, ids in lists.items():
        for id_ in ids:
            listed_in[id_].append(name)
    for id_ in sorted(listed_in.keys() | images.keys() | annotated.keys()):
        listed = id_ in listed_in
        where = f"listed in {', '.join(listed_in[id_])}" if listed else "not listed"
        if id_ not in images and id_ not in annotated:
            path = report.root / "JPEGImages" / id_
            report.add("missing image", path, f"no image and no annotation ({where}); add both")
        elif id_ not in images:
            kind = "missing image" if listed else "annotation without image"
            report.add(kind, annotated[id_], f"no image {shown(id_)} with {' or '.join(IMAGE_EXTENSIONS)} ({where})")
        elif id_ not in annotated:
            kind = "missing annotation" if listed else "image without annotation"
            report.add(kind, images[id_], f"no Annotations/{shown(id_)}.xml ({where})")


def _leads_out(report: Report, path: Path) -> bool:
    outside = leads_outside(path, report.root)
    if outside:
        report.add("leads outside", path, "is a link to outside the data set; put the file itself there")
    return outside


def _check_annotation(report: Report, path: Path, images: dict[str, Path]) -> VocAnnotation | None:
    problem = name_problem(path.stem)
    if problem:
        report.add("bad annotation", path, f"its name {problem}; rename it")
    try:
        root = parse_xml(read_bytes(path, MAX_XML_BYTES, "annotation"))
    except UserError as error:
        report.add("bad annotation", path, error)
        return None
    annotation, problems = annotation_from(root, path.stem)
    for text in problems:
        report.add("bad annotation", path, text)
    if annotation is None:
        return None
    filename = root.findtext("filename") or ""
    if "/" in filename or "\\" in filename or filename in (".", ".."):
        report.add("leads outside", path, f"filename '{shown(filename)}' leads elsewhere (it isn't followed)")
    elif Path(filename.strip()).stem != path.stem and Path(filename.strip()).stem in images:
        used = shown(images[path.stem].name) if path.stem in images else "none"
        text = f"filename names the image {shown(filename.strip())}, but an annotation's own name counts ({used})"
        report.add("names another image", path, f"{text}; rename one of them, or correct filename")
    return annotation
