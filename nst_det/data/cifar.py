"""CIFAR-10, CIFAR-100 and MNIST as their authors publish them, and image folders in an archive.

What DATA.ROOT names is recognized by what is in it.  Archives, and whatever would be unpickled, are compared with the
published checksums first.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision import datasets

from nst_det.data.download import DAMAGED, unpack
from nst_det.data.folders import ImageFolder, ImageSplit, cut_validation, read_image_folder, read_unlabelled_folder
from nst_det.data.safe_io import shown_path
from nst_det.errors import UserError

REMEDY = "get the authors' file again"


class Binary(NamedTuple):
    """A binary version: bytes before an image, of which the last is its label, and the files and images of each."""

    label_bytes: int
    names: str
    train: tuple[str, ...]
    test: str
    images: tuple[int, int]


BINARY = {
    "cifar-10-batches-bin": Binary(
        1,
        "batches.meta.txt",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        (10_000, 10_000),
    ),
    "cifar-100-binary": Binary(2, "fine_label_names.txt", ("train.bin",), "test.bin", (50_000, 10_000)),
}
PYTHON: dict[str, type[datasets.CIFAR10]] = {kind.base_folder: kind for kind in (datasets.CIFAR10, datasets.CIFAR100)}
# of the archive with this folder in it: torchvision's tables, and https://www.cs.toronto.edu/~kriz/cifar.html
ARCHIVE_MD5 = {
    **{name: kind.tgz_md5 for name, kind in PYTHON.items()},
    "cifar-10-batches-bin": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-binary": "03b5dce01913d631647c71ecec9e9cb8",
}
MNIST_MD5 = {name.removesuffix(".gz"): md5 for name, md5 in datasets.MNIST.resources}
MNIST_FILES = (("train", "train", 60_000), ("val", "t10k", 10_000))


def read_images(
    root: str | Path, val_fraction: float = 0.1, seed: int = 0, always_cut: bool = False, labels: bool = True
) -> ImageFolder:
    """Return the images to train and to validate on of an image folder, of CIFAR or of MNIST, in a folder or archive.

    The authors' test images are the ``val`` of an image folder, see
    :func:`~nst_det.data.folders.read_image_folder` for the arguments.  MNIST becomes RGB.  Without ``labels`` a folder
    may have images at any depth, and there are no classes.

    Raises:
        UserError: nothing of the kind is there, or it is altered or not whole.
    """
    root = Path(root).expanduser()
    if root.is_file():
        return _from_archive(root, val_fraction, seed, always_cut, labels)
    for folder in (root, *(root / name for name in ARCHIVE_MD5), root / "MNIST" / "raw"):
        parts = _read_published(folder)
        if parts is not None:
            found = _folder_of(folder, *parts, val_fraction, seed, always_cut)
            return found if labels else ImageFolder(folder, (), found.train.unlabelled(), found.val.unlabelled())
    if not labels:
        return read_unlabelled_folder(root, val_fraction, seed, always_cut)
    return read_image_folder(root, val_fraction, seed, always_cut=always_cut)


def _from_archive(path: Path, val_fraction: float, seed: int, always_cut: bool, labels: bool) -> ImageFolder:
    try:
        with tarfile.open(path, "r:*") as tar:
            first = tar.next()
    except (*DAMAGED, OSError) as error:
        raise UserError(
            f"{shown_path(path)}: no tar archive, or a damaged one ({error}); get it again, or name a folder"
        ) from error
    top = first.name.removeprefix("./").split("/")[0] if first else ""
    if top in ARCHIVE_MD5:
        _check_md5(path, path.read_bytes(), ARCHIVE_MD5[top])
    with tempfile.TemporaryDirectory(prefix="nst_det-") as made:
        unpack(path, Path(made))
        # one folder around everything, or none
        entries = list(Path(made).iterdir())
        folder = entries[0] if len(entries) == 1 and entries[0].name != "train" else Path(made)
        try:
            found = read_images(folder, val_fraction, seed, always_cut, labels)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), shown_path(path))) from error
        splits = [
            split
            if split.held
            else replace(split, held=[split.path(index).read_bytes() for index in range(len(split))])
            for split in (found.train, found.val)
        ]
    return ImageFolder(path, found.classes, *(replace(split, root=path) for split in splits))


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(f"{shown_path(path)}: altered or not whole (its MD5 is {found}, not {expected}); {REMEDY}")


def _read_published(folder: Path) -> tuple[Sequence[str], list[tuple[np.ndarray, np.ndarray]]] | None:
    """Return class names, and pixels (N, H, W, 3) and labels (N,) of the training and the test images, if it is one."""
    for kind in PYTHON.values():
        if (folder / kind.meta["filename"]).is_file():
            return _read_python(folder, kind)
    for binary in BINARY.values():
        if (folder / binary.test).is_file():
            return _read_binary(folder, binary)
    if any((folder / f"t10k-images-idx3-ubyte{end}").is_file() for end in ("", ".gz")):
        return [str(digit) for digit in range(10)], [_read_idx(folder, *row[1:]) for row in MNIST_FILES]
    return None


def _read_python(
    folder: Path, kind: type[datasets.CIFAR10]
) -> tuple[Sequence[str], list[tuple[np.ndarray, np.ndarray]]]:
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        _check_md5(folder / name, _content(folder / name), md5)

    class Here(kind):
        base_folder = folder.name

    parts = [Here(folder.parent, train=train) for train in (True, False)]
    return parts[0].classes, [(part.data, np.array(part.targets)) for part in parts]


def _read_binary(folder: Path, binary: Binary) -> tuple[Sequence[str], list[tuple[np.ndarray, np.ndarray]]]:
    parts = []
    for names, count in zip((binary.train, (binary.test,)), binary.images):
        rows = []
        for name in names:
            content, size = _content(folder / name), count * (binary.label_bytes + 3072)
            if len(content) != size:
                raise UserError(f"{shown_path(folder / name)}: {len(content)} bytes, not {size}; {REMEDY}")
            rows.append(np.frombuffer(content, np.uint8).reshape(count, -1))
        joined = np.concatenate(rows)
        pixels = joined[:, binary.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((pixels, joined[:, binary.label_bytes - 1].astype(np.int64)))
    names_file = folder / binary.names
    return _content(names_file).decode("utf-8", "replace").split(), parts


def _read_idx(folder: Path, prefix: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
        path = folder / f"{prefix}-{name}-ubyte"
        if path.is_file():
            content = _content(path)
        else:
            path = path.with_name(f"{path.name}.gz")
            packed = _content(path)
            _check_md5(path, packed, MNIST_MD5[path.stem])
            content = gzip.decompress(packed)
        head = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
        if content[: len(head)] != head or len(content) != len(head) + np.prod(shape):
            sides = " x ".join(map(str, shape))
            raise UserError(f"{shown_path(path)}: not an idx file of {sides} bytes, or not whole; {REMEDY}")
        found.append(np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape))
    images, labels = found
    return np.repeat(images[..., None], 3, axis=3), labels.astype(np.int64)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown_path(path)}: can't be read ({error.strerror}); {REMEDY}") from error


def _folder_of(
    root: Path,
    classes: Sequence[str],
    parts: list[tuple[np.ndarray, np.ndarray]],
    val_fraction: float,
    seed: int,
    always_cut: bool,
) -> ImageFolder:
    splits = []
    for name, (pixels, labels) in zip(("train", "val"), parts):
        if labels.max() >= len(classes):
            raise UserError(f"{shown_path(root)}: label {labels.max()}, but {len(classes)} class names; {REMEDY}")
        order = np.argsort(labels, kind="stable")
        paths = tuple(f"{name}/{classes[labels[index]]}/{index:05}" for index in order)
        sizes = np.full(len(order), pixels[0].size, dtype=np.int64)
        splits.append(ImageSplit(root, paths, labels[order].astype(np.int64), sizes, list(pixels[order])))
    train, val = splits
    if always_cut:
        return cut_validation(root, tuple(classes), train, val_fraction, seed)
    return ImageFolder(root, tuple(classes), train, val)
