"""Image folders: one folder a class, with or without ``train`` and ``val`` above them; or images without labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nst_det.data.images import EXTENSIONS, MAX_IMAGE_BYTES, EncodedImage
from nst_det.data.safe_io import name_problem, read_bytes, shown, shown_path
from nst_det.data.splits import held_out, same_pictures, shuffled
from nst_det.errors import UserError


@dataclass(frozen=True)
class ImageSplit:
    """N images with labels; label -1 is an image without one."""

    root: Path
    paths: tuple[str, ...]  # relative to ``root`` (``train/cat/1.jpg``), sorted by class, then by name
    labels: np.ndarray  # (N,) int64 indices into the classes
    sizes: np.ndarray  # (N,) int64, bytes of each file
    held: Sequence[np.ndarray | bytes] = ()  # pixels (H, W, 3) uint8, or files' bytes, of images that are in no folder
    roots: tuple[Path, ...] = ()  # of several folders together; a path begins with its folder's number then

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Return the file of one image."""
        if not self.roots:
            return self.root / self.paths[index]
        number, _, path = self.paths[index].partition("/")
        return self.roots[int(number)] / path

    def source(self, index: int) -> np.ndarray | bytes:
        """Return the pixels (H, W, 3) uint8 of one image, or the bytes of its file."""
        return self.held[index] if self.held else read_bytes(self.path(index), MAX_IMAGE_BYTES, "image")

    def encoded(self, index: int, source: bytes) -> EncodedImage:
        """Return one image as the bytes of its :meth:`source`; errors name its file."""
        return EncodedImage(source, shown_path(self.path(index)))

    def image(self, index: int) -> np.ndarray:
        """Return the pixels (H, W, 3) uint8 of one image, RGB."""
        source = self.source(index)
        return self.encoded(index, source).pixels() if isinstance(source, bytes) else source

    def select(self, indices: np.ndarray) -> ImageSplit:
        """Return the images at ``indices``, in that order."""
        paths = tuple(self.paths[index] for index in indices)
        held = [self.held[index] for index in indices] if self.held else ()
        return replace(self, paths=paths, labels=self.labels[indices], sizes=self.sizes[indices], held=held)

    def with_labels(self, per_class: int, keep_rest: bool, seed: int) -> ImageSplit:
        """Return ``per_class`` labelled images of each class, by ``seed``, and with ``keep_rest`` the others as -1."""
        chosen: set[str] = set()
        for label in np.unique(self.labels):
            paths = [self.paths[index] for index in np.flatnonzero(self.labels == label)]
            if len(paths) < per_class:
                name = Path(paths[0]).parent.name
                raise UserError(
                    f"{shown_path(self.root)}: class '{shown(name)}' has {len(paths)} images to train on; lower "
                    f"DATA.PER_CLASS {per_class}"
                )
            chosen |= set(shuffled(paths, f"labels {seed}\0")[:per_class])
        labelled = np.array([path in chosen for path in self.paths], dtype=bool)
        if not keep_rest:
            return self.select(np.flatnonzero(labelled))
        return replace(self, labels=np.where(labelled, self.labels, -1))

    def unlabelled(self) -> ImageSplit:
        """Return the same images without their labels."""
        return replace(self, labels=np.full(len(self), -1, dtype=np.int64))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of path, label and bytes of every image; files are not read."""
        digest = hashlib.sha256()
        for path, label, size in zip(self.paths, self.labels, self.sizes):
            digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
        for held in self.held:
            digest.update(held if isinstance(held, bytes) else held.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """A classification data set: class names, and images to train and to validate on."""

    root: Path
    classes: tuple[str, ...]
    train: ImageSplit
    val: ImageSplit

    @property
    def name(self) -> str:
        """What cards and reports call it: the names of its folders."""
        return "+".join(root.resolve().name for root in self.train.roots or (self.root,))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of the classes and the fingerprints of both splits."""
        parts = (*self.classes, self.train.fingerprint(), self.val.fingerprint())
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def read_image_folder(
    root: str | Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    always_cut: bool = False,
) -> ImageFolder:
    """List the images of ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or of ``root/CLASS/*``.

    Hidden files and those with another extension than :data:`EXTENSIONS` are skipped; links are followed, since
    many subsets of large sets are made of links.

    Args:
        root: the folder.
        val_fraction: 0..1, share of each class that :func:`~nst_det.data.splits.held_out` cuts off the training
            images, by ``seed``, where there is no ``val``.
        seed: of the cut.
        classes: the class folders to take, in the order of their labels; None takes all, sorted.
        always_cut: cut even where there is a ``val`` folder, which is not read.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{shown_path(root)}: no such folder; name one that holds train/CLASS/*.jpg or CLASS/*.jpg")
    above = root / "train" if (root / "train").is_dir() else root
    names = tuple(class_folders(above) if classes is None else classes)
    if not names:
        raise UserError(f"{shown_path(above)}: no class folders; put the images of each class into a folder of its own")
    train = _read_split(root, above, names, required=True)
    val_root = root / "val"
    if above != root and val_root.is_dir() and not always_cut:
        extra = sorted(set(class_folders(val_root)) - set(names))
        if extra and classes is None:
            raise UserError(
                f"{shown_path(val_root / extra[0])}: a class that {shown_path(above)} doesn't have; rename the "
                "folder as it is there, or remove it"
            )
        return ImageFolder(root, names, train, _read_split(root, val_root, names, required=False))
    return cut_validation(root, names, train, val_fraction, seed)


def read_unlabelled_folder(
    root: str | Path, val_fraction: float = 0.1, seed: int = 0, always_cut: bool = False
) -> ImageFolder:
    """List the images in and below a folder, at any depth, without labels: no classes, and -1 for each image.

    ``root/train`` and ``root/val`` are its splits where they are there; what is skipped and the arguments are as for
    :func:`read_image_folder`.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{shown_path(root)}: no such folder; name one with images in it, at any depth")
    above, val_root = root / "train" if (root / "train").is_dir() else root, root / "val"
    train = _unlabelled_split(root, above)
    if above != root and val_root.is_dir() and not always_cut:
        return ImageFolder(root, (), train, _unlabelled_split(root, val_root))
    return cut_validation(root, (), train, val_fraction, seed)


def _unlabelled_split(root: Path, folder: Path) -> ImageSplit:
    paths = list(_images_below(folder, frozenset()))
    if not paths:
        raise UserError(
            f"{shown_path(folder)}: no images ({', '.join(EXTENSIONS)}) in it or below; name another folder"
        )
    names = tuple(path.relative_to(root).as_posix() for path in paths)
    sizes = np.array([path.stat().st_size for path in paths], dtype=np.int64)
    return ImageSplit(root, names, np.full(len(paths), -1, dtype=np.int64), sizes)


def _images_below(folder: Path, around: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    # a link back to a folder that holds it
    for entry in [] if real in around else _entries(folder):
        if entry.is_dir():
            yield from _images_below(folder / entry.name, around | {real})
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            yield folder / entry.name


def joined(folders: Sequence[ImageFolder]) -> ImageFolder:
    """Return the images of several folders as one; classes of the same name are one class."""
    if len(folders) == 1:
        return folders[0]
    classes = tuple(dict.fromkeys(name for folder in folders for name in folder.classes))
    roots = tuple(folder.root for folder in folders)

    def join(parts: Sequence[ImageSplit]) -> ImageSplit:
        paths = [f"{number}/{path}" for number, part in enumerate(parts) for path in part.paths]
        labels = [
            np.array([*map(classes.index, folder.classes), -1], dtype=np.int64)[part.labels]
            for folder, part in zip(folders, parts)
        ]
        apart = any(part.held for part in parts)
        held = [part.source(index) for part in parts for index in range(len(part))] if apart else ()
        sizes = np.concatenate([part.sizes for part in parts])
        return ImageSplit(roots[0], tuple(paths), np.concatenate(labels), sizes, held, roots)

    splits = ([folder.train for folder in folders], [folder.val for folder in folders])
    return ImageFolder(roots[0], classes, *map(join, splits))


def cut_validation(
    root: Path, classes: tuple[str, ...], train: ImageSplit, val_fraction: float, seed: int
) -> ImageFolder:
    """Cut ``val_fraction`` of each class off the training images to validate on.

    Files that show the same picture (:func:`~nst_det.data.splits.same_pictures`) count as one image and stay together.
    """
    ids = [os.path.splitext(path)[0] for path in train.paths]
    files = dict(zip(ids, train.paths))
    # images that are in no folder aren't looked at
    looked_at = {} if train.held or not val_fraction else {id_: root / path for id_, path in files.items()}
    pictures = same_pictures(looked_at)
    first_of = [files[pictures.get(id_, id_)] for id_ in ids]
    # one with copies in several classes counts in the first of them
    by_class: dict[int, set[str]] = {}
    for path, label in dict(zip(first_of[::-1], train.labels.tolist()[::-1])).items():
        by_class.setdefault(label, set()).add(path)
    kept = held_out(map(sorted, by_class.values()), val_fraction, seed)
    is_val = np.array([path in kept for path in first_of], dtype=bool)
    return ImageFolder(root, classes, train.select(np.flatnonzero(~is_val)), train.select(np.flatnonzero(is_val)))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in ``folder``, sorted; hidden ones are left out."""
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{shown_path(folder)}: can't be listed ({error.strerror}); correct its permissions") from error
    return sorted(entries, key=lambda entry: entry.name)


def _read_split(root: Path, folder: Path, classes: Sequence[str], required: bool) -> ImageSplit:
    files: list[tuple[str, int, int]] = []
    prefix = "" if folder == root else f"{folder.name}/"
    for label, name in enumerate(classes):
        problem = name_problem(name)
        if problem:
            raise UserError(f"class '{shown(name)}' {problem}; name a folder in {shown_path(folder)}")
        entries = _entries(folder / name) if (folder / name).is_dir() else []
        images = [entry for entry in entries if entry.name.lower().endswith(EXTENSIONS) and entry.is_file()]
        if required and not images:
            raise UserError(
                f"{shown_path(folder / name)}: a class without images ({', '.join(EXTENSIONS)}); add some or remove it"
            )
        files += [(f"{prefix}{name}/{entry.name}", label, entry.stat().st_size) for entry in images]
    if not files:
        raise UserError(f"{shown_path(folder)}: no images; put them into one folder a class")
    paths, labels, sizes = zip(*files)
    return ImageSplit(root, paths, np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64))
