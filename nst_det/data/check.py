"""Everything that is wrong with a data set, in one go."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nst_det.data.folders import EXTENSIONS, class_folders
from nst_det.data.images import MAX_IMAGE_BYTES, decode_image
from nst_det.data.reading import read_bytes, shown, shown_path
from nst_det.errors import UserError


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
    from nst_det.data.check_voc import check_voc
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
