"""PASCAL VOC folders: ``Annotations/ID.xml``, ``JPEGImages/ID.jpg``, ``ImageSets/Main/SPLIT.txt``.

Files may be in folders of their own (``JPEGImages/cam1/a.jpg``), whose names are part of the id (``cam1_a``).
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np

from nst_det.data.annotation import MAX_XML_BYTES, VocAnnotation, read_annotation
from nst_det.data.images import EXTENSIONS, MAX_IMAGE_BYTES, image_size, read_image
from nst_det.data.safe_io import leads_outside, name_problem, read_bytes, read_text, shown, shown_path
from nst_det.engine.io import write_text
from nst_det.errors import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MAX_LIST_BYTES = 64 << 20
_FLAGGED = re.compile(r"(.*\S)\s+(-1|0|1)")


class VocDataset:
    """One split of a VOC folder.

    The image list is read and checked at once, annotations on first use (and kept).  An image's files are found
    by its id alone, inside ``root``; nothing that is written in an annotation names a file.

    Args:
        root: see :func:`find_voc_root`.
        split: a list in ``ImageSets/Main``, such as ``trainval``.
        classes: class names in the order of their labels; None takes those of this split's annotations by
            :func:`class_names`.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[str] | None = None) -> None:
        self.root = find_voc_root(root)
        self.split = split
        self.ids = read_split(self.root, split)
        self._annotations: dict[str, VocAnnotation] = {}
        if classes is None:
            classes = class_names(item.name for id_ in self.ids for item in self.annotation(id_).objects)
            if not classes:
                raise UserError(f"{shown_path(split_path(self.root, split))}: no image of this split has an object")
        if len(set(classes)) != len(classes) or not classes:
            raise UserError(f"classes: {', '.join(map(shown, classes)) or 'none'}; give each name once")
        self.classes = tuple(classes)
        self._label_of = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, ids: Iterable[str]) -> VocDataset:
        """Return some of its images, in the order given; what was read of them already is not read again."""
        part = copy.copy(self)
        part.ids = tuple(ids)
        return part

    def annotation(self, id_: str) -> VocAnnotation:
        """Return the annotation of one image; a size that it doesn't say is the image's own."""
        if id_ not in self._annotations:
            found = read_annotation(self.annotation_path(id_), id_)
            self._annotations[id_] = found if found.width else with_size_of(self.image_path(id_), found)
        return self._annotations[id_]

    def annotations(self) -> list[VocAnnotation]:
        """Return all annotations in the order of ``ids``."""
        return [self.annotation(id_) for id_ in self.ids]

    def labels(self, annotation: VocAnnotation) -> np.ndarray:
        """Return (N,) int64 indices into ``classes``; an object of a class that isn't among them is an error."""
        unknown = [name for name in annotation.names if name not in self._label_of]
        if unknown:
            path, known = shown_path(self.annotation_path(annotation.id)), ", ".join(map(shown, self.classes))
            raise UserError(f"{path}: object name '{shown(unknown[0])}' is not among the classes {known}; correct it")
        return np.array([self._label_of[name] for name in annotation.names], dtype=np.int64)

    def annotation_path(self, id_: str) -> Path:
        """Return ``root/Annotations/ID.xml``, which may not exist; a link that leads outside ``root`` is an error."""
        return self._file("Annotations", self._annotation_names.get(id_, f"{id_}.xml"))

    def image_path(self, id_: str) -> Path:
        """Return the image file of an id, with one of :data:`EXTENSIONS` in small or capital letters."""
        name = self._image_names.get(id_)
        if name is None:
            image, known = shown_path(self.root / "JPEGImages" / id_), " or ".join(EXTENSIONS)
            raise UserError(f"{image}: no image with this name and {known}; add it or take it out of {self.split}.txt")
        return self._file("JPEGImages", name)

    def image(self, id_: str) -> np.ndarray:
        """Read the pixels of an image, (H, W, 3) uint8, RGB; another size than its annotation's is an error."""
        annotation, path = self.annotation(id_), self.image_path(id_)
        image = read_image(path)
        if image.shape[:2] != (annotation.height, annotation.width):
            found, declared = f"{image.shape[1]}x{image.shape[0]}", f"{annotation.width}x{annotation.height}"
            raise UserError(f"{shown_path(path)}: the image is {found}, but its annotation has {declared}; correct it")
        return image

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of classes and, for every image: id, annotation's bytes, image's size.

        Two data sets with the same fingerprint train the same detector, unless an image was replaced by another
        one of the same number of bytes: pixels are not read.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for id_ in self.ids:
            xml = read_bytes(self.annotation_path(id_), MAX_XML_BYTES, "annotation")
            size = self.image_path(id_).stat().st_size
            digest.update(f"\n{id_}\0{size}\0{hashlib.sha256(xml).hexdigest()}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        return {name: _inside(self.root / name, self.root) for name in ("Annotations", "JPEGImages")}

    @cached_property
    def _image_names(self) -> dict[str, str]:
        return image_names(self._folders["JPEGImages"])

    @cached_property
    def _annotation_names(self) -> dict[str, str]:
        return dict(files_by_id(self._folders["Annotations"], (".xml",)))

    def _file(self, folder: str, name: str) -> Path:
        path = self._folders[folder] / name
        return _inside(path, self.root) if path.is_symlink() else path


def with_size_of(image: Path, annotation: VocAnnotation) -> VocAnnotation:
    """Return an annotation with the width and height in the header of an image file."""
    width, height = image_size(read_bytes(image, MAX_IMAGE_BYTES, "image"), shown_path(image))
    return replace(annotation, width=width, height=height)


def _inside(path: Path, root: Path) -> Path:
    if leads_outside(path, root):
        raise UserError(f"{shown_path(path)}: leads outside {shown_path(root)}; put the file itself there, not a link")
    return path


def find_voc_root(root: str | Path) -> Path:
    """Return the folder with ``Annotations``: ``root``, or the only one in ``root/*`` and ``root/VOCdevkit/*``."""
    root = Path(root).expanduser()
    if (root / "Annotations").is_dir():
        return root.resolve()
    if not root.is_dir():
        raise UserError(f"{shown_path(root)}: no such folder; name the folder that holds Annotations and ImageSets")
    found = sorted(path.parent for pattern in ("*", "VOCdevkit/*") for path in root.glob(f"{pattern}/Annotations"))
    if len(found) > 1:
        names = ", ".join(shown_path(path) for path in found)
        raise UserError(f"{shown_path(root)}: several VOC folders inside; name one of {names}")
    if not found:
        needed = "Annotations/ID.xml, JPEGImages/ID.jpg and ImageSets/Main/SPLIT.txt"
        raise UserError(
            f"{shown_path(root)}: not a VOC folder; it needs {needed} (nst-det init makes one of other layouts)"
        )
    return found[0].resolve()


def make_voc_folders(root: Path) -> Path:
    """Make an empty VOC folder and return it."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return root


def split_path(root: Path, split: str) -> Path:
    """Return ``root/ImageSets/Main/SPLIT.txt``; a split's name that could lead to another folder is an error."""
    problem = name_problem(split)
    if problem:
        raise UserError(f"split '{shown(split)}' {problem}; name a list in ImageSets/Main such as trainval")
    return root / "ImageSets" / "Main" / f"{split}.txt"


def existing_split_path(root: Path, split: str) -> Path:
    """Return :func:`split_path` of a list that is there; the error names those there are."""
    path = split_path(root, split)
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(path.parent.glob("*.txt"))[:20])
        raise UserError(f"{shown_path(path)}: no such list; there are {shown(known, 400) or 'no lists at all'}")
    return path


def split_names(root: Path) -> list[str]:
    """Return the lists in ``ImageSets/Main``, sorted; lists of one class are left out."""
    paths = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    known = cache(partial(known_ids, root))
    return [path.stem for path in paths if scan_list(path, known) is not None]


def write_split(root: Path, split: str, ids: Iterable[str]) -> None:
    """Write a list of image ids."""
    write_text(split_path(root, split), "".join(f"{id_}\n" for id_ in ids))


def read_split(root: Path, split: str) -> tuple[str, ...]:
    """Return the ids of a split, in the order of its list; the error names the first thing that is wrong with it."""
    path = existing_split_path(root, split)
    found = scan_list(_inside(path, root), cache(partial(known_ids, root)))
    if found is None:
        raise UserError(f"{shown_path(path)}: a list of one class (id and flag a line), or empty; name a list of ids")
    ids, problems = found
    if problems:
        raise UserError(f"{shown_path(path)}: {problems[0][1]}")
    return ids


def scan_list(path: Path, known: Callable[[], Collection[str]]) -> tuple[tuple[str, ...], list[tuple[str, str]]] | None:
    """Return the ids in a list, and kind and text of everything that is wrong with it.

    None is a list of one class (``cat_trainval``): lines of an id and -1, 0 or 1, or none.  ``known`` gives the ids
    there are; it is asked at each line that may be read in more than one way.
    """
    lines = [line.strip(" \t\r\f\v") for line in read_text(path, MAX_LIST_BYTES, "list").split("\n")]
    if _of_one_class(path.stem, [line for line in lines if line], known):
        return None
    line_of: dict[str, int] = {}
    problems: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        name = id_of_line(line, known) if line else ""
        problem = name_problem(name) if name else None
        if problem:
            text = f"line {number}: '{shown(name)}' {problem}; a line is the name of one image, without extension"
            problems.append(("bad list", text))
        elif name in line_of:
            problems.append(("repeated id", f"line {number}: {shown(name)} is in line {line_of[name]} too"))
        elif name:
            line_of[name] = number
    if not line_of:
        problems.append(("bad list", "no image is listed; add one id a line"))
    return tuple(line_of), problems


def _of_one_class(name: str, lines: Sequence[str], known: Callable[[], Collection[str]]) -> bool:
    """Return whether these are the lines of a list of one class; images may be called ``shelf 0`` and ``shelf 1``."""
    flagged = [_FLAGGED.fullmatch(line) for line in lines]
    named = re.fullmatch(r".+_(train|val|trainval|test)", name) is not None
    if not lines or not all(flagged):
        return named and not lines
    certain = named or any(match and match[2] == "-1" for match in flagged)
    return certain and not any(form in known() for form in _forms(lines[0]))


def id_of_line(line: str, known: Callable[[], Collection[str]]) -> str:
    """Return the id that a line of a list stands for: some tools write quotes, the extension, or folders."""
    forms = _forms(line)
    # the last one is for an image that isn't there
    return next((form for form in forms if form in known()), forms[-1]) if len(set(forms)) > 1 else forms[-1]


def _forms(line: str) -> list[str]:
    """Return what a line may mean, the least changed first: without quotes, with folders joined, without extension."""
    name = composed(line)
    bare = name[1:-1] if len(name) > 2 and name[0] == name[-1] in "\"'" else name
    extension = os.path.splitext(bare)[1]
    extension = extension if extension.lower() in EXTENSIONS else ""
    parts = PurePosixPath(bare.replace("\\", "/")).parts
    joined = "_".join(parts) if len(parts) > 1 and not any(map(name_problem, parts)) else bare
    return [name, bare, joined, joined.removesuffix(extension), bare.removesuffix(extension)]


def class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return distinct class names, sorted; :data:`VOC_CLASSES` in the official order if all names are among them."""
    found = set(names)
    return VOC_CLASSES if found and found <= set(VOC_CLASSES) else tuple(sorted(found))


def annotation_files(root: Path) -> dict[str, Path]:
    """Return the file of every annotation of a VOC folder by its id."""
    folder = root / "Annotations"
    return {id_: folder / name for id_, name in files_by_id(folder, (".xml",))}


def image_names(folder: Path) -> dict[str, str]:
    """Return the file of every image by its id, relative to ``folder``; of several the first extension wins."""
    rank = {extension: place for place, extension in enumerate(EXTENSIONS)}
    files = files_by_id(folder, EXTENSIONS)
    return dict(sorted(files, key=lambda file: rank[os.path.splitext(file[1])[1].lower()], reverse=True))


def known_ids(root: Path) -> set[str]:
    """Return the ids of all images and annotations in a VOC folder."""
    kinds = (("Annotations", (".xml",)), ("JPEGImages", EXTENSIONS))
    return {id_ for name, kind in kinds if (root / name).is_dir() for id_, _ in files_by_id(root / name, kind)}


def files_by_id(folder: Path, extensions: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield id and path relative to ``folder`` of every file with one of ``extensions``, sorted.

    An id is the path without extension, composed (see :func:`composed`), folders joined by ``_``.
    """
    for path in walk_files(folder):
        stem, extension = os.path.splitext(path)
        if extension.lower() in extensions:
            yield composed(stem).replace("/", "_"), path


def ids_of_path(path: str) -> list[str]:
    """Return the ids that a path on any machine may stand for, by all of its parts or the last ones, the longest first.

    Example:
        >>> ids_of_path("val/cam1/a.jpg")
        ['val_cam1_a', 'cam1_a', 'a']
    """
    parts = os.path.splitext(composed(path).replace("\\", "/"))[0].split("/")
    return ["_".join(parts[start:]) for start in range(len(parts))]


def composed(name: str) -> str:
    """Return a name with ``ü`` as one character, where a Mac may store two."""
    return unicodedata.normalize("NFC", name)


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the path relative to ``folder`` (with ``/``) of every file in it, sorted; what is hidden is left out.

    A Mac leaves files named ``._ID.jpg``, which are no images.
    """

    def failed(error: OSError) -> None:
        where = f"{shown_path(error.filename)}: can't be listed ({error.strerror})"
        raise UserError(f"{where}; make it, or correct its permissions") from error

    for at, folders, files in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above = Path(at).relative_to(folder)
        yield from ((above / name).as_posix() for name in sorted(files) if not name.startswith("."))
