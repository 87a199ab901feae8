"""Everything that is wrong with a data set, in one go."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nst_det.data.annotation import (
    MAX_XML_BYTES,
    VocAnnotation,
    box_fault,
    declared_filename,
    describe,
    parse_annotation,
)
from nst_det.data.folders import EXTENSIONS, class_folders
from nst_det.data.images import MAX_IMAGE_BYTES, decode_image
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, read_names, shown, shown_path
from nst_det.data.voc import IMAGE_EXTENSIONS, image_names, is_class_list, split_path
from nst_det.errors import UserError

# lists that must not share an image: what is tested on must not be trained on
DISJOINT = (("train", "val"), ("train", "test"), ("val", "test"), ("trainval", "test"))
FAULTS = {
    "no area": "has no area",
    "outside": "lies outside the image",
    "reaches outside": "reaches outside the image",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: what sort of thing, the same words for all of its sort.
        file: path relative to the data set's root.
        text: what is wrong, on one line.
    """

    kind: str
    file: str
    text: str

    def line(self) -> str:
        """``file: text``."""
        return f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What was looked at, and what is wrong with it.

    Attributes:
        root: the folder that holds the data.
        layout: ``VOC folder`` or ``image folder``.
        counts: how many images, annotations, objects and so on were looked at.
        problems: sorted by kind, then by file.
    """

    root: Path
    layout: str
    counts: dict[str, int]
    problems: tuple[Problem, ...]

    def by_kind(self) -> dict[str, int]:
        """How many problems of each kind."""
        return dict(Counter(problem.kind for problem in self.problems))

    def summary(self) -> str:
        """One line: what was found, and how many problems."""
        what = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.by_kind().items())
        return f"{self.layout}, {what}: {kinds or 'no problem'}"


@dataclass
class Findings:
    """Problems as they are found, and what was counted on the way."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, path: Path, text: str) -> None:
        """Note a problem of ``path``."""
        relative = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.problems.append(Problem(kind, shown_path(relative), text))

    def add_error(self, kind: str, path: Path, error: UserError) -> None:
        """Note an error, without the file's name that its message begins with."""
        self.add(kind, path, str(error).removeprefix(f"{shown_path(path)}: "))

    def report(self, layout: str) -> Report:
        """The finished report."""
        problems = sorted(self.problems, key=lambda problem: (problem.kind, problem.file))
        return Report(self.root, layout, dict(self.counts), tuple(problems))


def check_data(
    path: str | Path, splits: Sequence[str] | None = None, classes: Sequence[str] | None = None, workers: int = 0
) -> Report:
    """Look at every file of a VOC folder or an image folder; images are decoded.

    Args:
        path: a VOC folder (see :func:`nst_det.data.voc.find_voc_root`) or an image folder.
        splits: VOC lists to look at, with the images in them; None takes all lists and all files.
        classes: the only names that objects (or class folders) may have; None allows any.
        workers: threads that decode; 0 takes the cores of this process.

    Raises:
        UserError: ``path`` is neither of the two, or there is no such list.
    """
    from nst_det.data.voc import find_voc_root

    root = Path(path).expanduser()
    workers = workers or len(os.sched_getaffinity(0))
    if not root.is_dir():
        raise UserError(f"{shown_path(root)}: no such folder; name a VOC folder or an image folder")
    try:
        voc = find_voc_root(root)
    except UserError as not_voc:
        if (root / "ImageSets").exists() or (root / "JPEGImages").exists() or "several" in str(not_voc):
            raise
        if splits:
            raise UserError(f"{shown_path(root)}: lists are for VOC folders, and this is none") from None
        return check_folders(root.resolve(), classes, workers)
    return check_voc(voc, splits, classes, workers)


def check_images(
    findings: Findings, paths: Sequence[Path], workers: int
) -> dict[Path, tuple[tuple[int, int] | None, str]]:
    """Decode images side by side and note those that can't be.

    Returns:
        (width, height) of each image (None if it can't be decoded) and the SHA-256 of its bytes.
    """

    def look(path: Path) -> tuple[tuple[int, int] | None, str, UserError | None]:
        digest = ""
        try:
            data = read_bytes(path, MAX_IMAGE_BYTES, "image")
            digest = hashlib.sha256(data).hexdigest()
            pixels = decode_image(data, shown_path(path))
        except UserError as error:
            return None, digest, error
        return (pixels.shape[1], pixels.shape[0]), digest, None

    found = {}
    with ThreadPoolExecutor(workers) as pool:
        for path, (size, digest, error) in zip(paths, pool.map(look, paths)):
            if error is not None:
                findings.add_error("unreadable image", path, error)
            found[path] = size, digest
    findings.counts["images"] += len(paths)
    return found


def check_folders(root: Path, classes: Sequence[str] | None, workers: int) -> Report:
    """Look at an image folder: empty and unknown classes, other files, images that can't be decoded, leaks.

    Raises:
        UserError: there are no class folders, or they can't be listed.
    """
    findings = Findings(root)
    parts = [root / name for name in ("train", "val") if (root / name).is_dir()] or [root]
    names = {part: class_folders(part) for part in parts}
    if not any(names.values()):
        raise UserError(
            f"{shown_path(root)}: neither a VOC folder (Annotations, JPEGImages, ImageSets/Main) nor an image folder "
            "(train/CLASS/*.jpg or CLASS/*.jpg)"
        )
    known = set(classes) if classes is not None else set(names[parts[0]])
    findings.counts["classes"] = len(known)
    images: dict[Path, list[Path]] = {}
    for part in parts:
        for name in sorted(known - set(names[part])):
            findings.add("missing class", part / name, "no such folder; add it, or leave the class out")
        for name in sorted(set(names[part]) - known):
            findings.add("unknown class", part / name, f"not one of the classes ({len(known)}); remove or rename it")
        images[part] = [path for name in names[part] for path in _class_images(findings, part / name)]
    digests = check_images(findings, [path for part in parts for path in images[part]], workers)
    if len(parts) == 2:
        train = {digests[path][1]: path for path in images[parts[0]] if digests[path][1]}
        for path in images[parts[1]]:
            twin = train.get(digests[path][1])
            if twin is not None:
                where = shown_path(twin.relative_to(root))
                findings.add("same image in train and val", path, f"is the same file as {where}; keep one")
    return findings.report("image folder")


def _class_images(findings: Findings, folder: Path) -> list[Path]:
    images = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            findings.add("other file", path, "a folder inside a class folder is not read; move its images up")
        elif not entry.name.lower().endswith(EXTENSIONS):
            findings.add("other file", path, f"is passed over, since it is none of {', '.join(EXTENSIONS)}")
        else:
            images.append(path)
    if not images:
        findings.add("empty class", folder, "no images; add some or remove the folder")
    return images


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, spaces, dashes and underscores."""
    groups = defaultdict(set)
    for name in names:
        groups["".join(c for c in name.casefold() if c not in " -_")].add(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, joined by commas, safe to print."""
    return ", ".join(f"'{shown(name)}'" for name in names)


def check_voc(root: Path, splits: Sequence[str] | None, classes: Sequence[str] | None, workers: int) -> Report:
    """Look at a VOC folder; see :func:`nst_det.data.check.check_data`.

    Raises:
        UserError: there is no such list.
    """
    findings = Findings(root)
    lists = _check_lists(findings, splits)
    images = _image_files(findings)
    listed = {id_ for ids in lists.values() for id_ in ids}
    annotated = {path.stem: path for path in sorted((root / "Annotations").iterdir()) if path.suffix == ".xml"}
    if splits is not None:
        images = {id_: path for id_, path in images.items() if id_ in listed}
        annotated = {id_: path for id_, path in annotated.items() if id_ in listed}
    _check_pairs(findings, lists, images, annotated)
    images = {id_: path for id_, path in images.items() if not _leads_out(findings, path)}
    annotated = {id_: path for id_, path in annotated.items() if not _leads_out(findings, path)}
    read = check_images(findings, list(images.values()), workers)
    names: Counter[str] = Counter()
    for id_, path in annotated.items():
        annotation = _check_xml(findings, path)
        if annotation is None:
            continue
        names.update(annotation.names)
        size = read[images[id_]][0] if id_ in images else None
        if size is not None and size != (annotation.width, annotation.height):
            said = f"{annotation.width}x{annotation.height}"
            findings.add("wrong size", path, f"says {said}, but the image is {size[0]}x{size[1]}; correct size")
        _check_objects(findings, path, annotation, classes)
    findings.counts["annotations"] = len(annotated)
    findings.counts["objects"] = sum(names.values())
    findings.counts["classes"] = len(names)
    for group in similar_names(names):
        counts = ", ".join(f"'{shown(name)}' ({names[name]} objects)" for name in group)
        findings.add("similar class names", root / "Annotations", f"{counts} may be one class; give it one name")
    _check_twins(findings, lists, images, read)
    return findings.report("VOC folder")


def _check_lists(findings: Findings, splits: Sequence[str] | None) -> dict[str, list[str]]:
    """Ids of each list; lists of one class are left out."""
    folder = findings.root / "ImageSets" / "Main"
    paths = sorted(folder.glob("*.txt")) if splits is None else [split_path(findings.root, name) for name in splits]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        known = ", ".join(path.stem for path in sorted(folder.glob("*.txt"))[:20])
        raise UserError(f"{shown_path(missing[0])}: no such list; there are {shown(known, 400) or 'no lists at all'}")
    lists: dict[str, list[str]] = {}
    for path in paths:
        if _leads_out(findings, path):
            continue
        try:
            lines, bad = read_names(path)
        except UserError as error:
            findings.add_error("bad list", path, error)
            continue
        if is_class_list(name for _, name in lines):
            continue
        for text in bad:
            findings.add("bad list", path, text)
        if not lines:
            findings.add("bad list", path, "no image is listed")
        first: dict[str, int] = {}
        for number, id_ in lines:
            if id_ in first:
                findings.add("repeated id", path, f"line {number}: {shown(id_)} stands in line {first[id_]} too")
            first.setdefault(id_, number)
        lists[path.stem] = list(first)
    findings.counts["lists"] = len(lists)
    for one, other in DISJOINT:
        for id_ in sorted(set(lists.get(one, ())) & set(lists.get(other, ()))):
            findings.add("id in two lists", folder / f"{other}.txt", f"{shown(id_)} is in {one} too; keep one")
    return lists


def _image_files(findings: Findings) -> dict[str, Path]:
    folder = findings.root / "JPEGImages"
    try:
        names = image_names(folder)
        files = sorted(path.name for path in folder.iterdir())
    except (UserError, OSError):
        findings.add("missing image", folder, "no such folder; put the images there")
        return {}
    chosen = set(names.values())
    for file in files:
        path = folder / file
        if path.suffix.lower() in IMAGE_EXTENSIONS and file not in chosen:
            findings.add("repeated id", path, f"{shown(names[path.stem])} has the same name and is taken; remove one")
    return {stem: folder / name for stem, name in sorted(names.items())}


def _check_pairs(
    findings: Findings, lists: dict[str, list[str]], images: dict[str, Path], annotated: dict[str, Path]
) -> None:
    wanted = defaultdict(list)
    for name, ids in lists.items():
        for id_ in ids:
            wanted[id_].append(name)
    folder = findings.root / "JPEGImages"
    for id_ in sorted(wanted.keys() | images.keys() | annotated.keys()):
        said = f"listed in {', '.join(wanted[id_])}" if id_ in wanted else "not listed"
        xml = findings.root / "Annotations" / f"{id_}.xml"
        if id_ not in images and id_ not in annotated:
            findings.add("missing image", folder / id_, f"no image and no annotation ({said}); add both")
        elif id_ not in images:
            kind = "missing image" if id_ in wanted else "annotation without image"
            findings.add(kind, xml, f"no image {shown(id_)} with {' or '.join(IMAGE_EXTENSIONS)} ({said})")
        elif id_ not in annotated:
            kind = "missing annotation" if id_ in wanted else "image without annotation"
            findings.add(kind, images[id_], f"no Annotations/{shown(id_)}.xml ({said})")


def _leads_out(findings: Findings, path: Path) -> bool:
    if not leads_outside(path, findings.root):
        return False
    findings.add("leads outside", path, "is a link to outside the data set; put the file itself there")
    return True


def _check_xml(findings: Findings, path: Path) -> VocAnnotation | None:
    problem = name_problem(path.stem)
    if problem:
        findings.add("bad annotation", path, f"its name {problem}; rename it")
    try:
        data = read_bytes(path, MAX_XML_BYTES, "annotation")
    except UserError as error:
        findings.add_error("bad annotation", path, error)
        return None
    annotation, problems = parse_annotation(data, path.stem)
    for text in problems:
        findings.add("bad annotation", path, text)
    filename = declared_filename(data)
    if filename is not None and ("/" in filename or "\\" in filename or filename in (".", "..")):
        findings.add("leads outside", path, f"filename '{shown(filename)}' leads elsewhere (it isn't followed)")
    return annotation


def _check_objects(findings: Findings, path: Path, annotation: VocAnnotation, classes: Sequence[str] | None) -> None:
    seen: dict[tuple[str, tuple[float, ...]], int] = {}
    for index, item in enumerate(annotation.objects):
        who = describe(item, index)
        box = ", ".join(f"{value:g}" for value in item.box)
        fault = box_fault(item.box, annotation.width, annotation.height)
        if fault:
            kind = "box with no area" if fault == "no area" else f"box {fault}"
            size = "" if fault == "no area" else f" of {annotation.width}x{annotation.height}"
            findings.add(kind, path, f"the box ({box}) of {who} {FAULTS[fault]}{size}")
        if classes is not None and item.name not in classes:
            findings.add("unknown class", path, f"{who} is not one of {quoted(classes)}")
        twin = seen.setdefault((item.name, item.box), index)
        if twin != index:
            findings.add("repeated object", path, f"{who} is the same as object {twin + 1}; remove one")


def _check_twins(
    findings: Findings,
    lists: dict[str, list[str]],
    images: dict[str, Path],
    read: dict[Path, tuple[tuple[int, int] | None, str]],
) -> None:
    """Note images of which another copy, under another id, stands in a list that must not share any."""
    digest_of = {id_: read[path][1] for id_, path in images.items()}
    for one, other in DISJOINT:
        there = {digest_of[id_]: id_ for id_ in lists.get(one, ()) if digest_of.get(id_)}
        for id_ in lists.get(other, ()):
            twin = there.get(digest_of.get(id_, ""))
            if twin is not None and twin != id_:
                text = f"in {other}, is the same file as {shown(twin)} in {one}; keep one"
                findings.add("same image in two lists", images[id_], text)
