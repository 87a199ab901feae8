"""Images kept from training: the same ones on every machine, some of each class.

Which ones depends on a hash of their names, so that an image added later moves hardly any other.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nst_det.data.annotation import VocAnnotation
from nst_det.data.safe_io import shown, shown_path
from nst_det.data.voc import VocDataset, annotation_files, image_names, read_split, split_names, write_split
from nst_det.engine.io import sha256_of_file
from nst_det.errors import UserError

K = TypeVar("K", bound=Hashable)
# lists to train and to test on that belong together, the best first
PAIRS = (("trainval", "test"), ("train", "test"), ("train", "val"), ("nst_det_train", "nst_det_test"))
OWN_PAIR = PAIRS[-1]
TEST_FRACTION = 0.2
# how tools name what they make of one image: Roboflow's hash; copies and augmented versions of an image that is there
_ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z_-]+")
_VERSION = re.compile(
    r"(?:copy[ _]of[ _])?(.+?)"
    r"(?:[ _-]+(?:copy|aug(?:mented)?|[hv]?flip(?:ped)?|rot(?:ated?)?|mirror(?:ed)?)[ _-]?\(?\d*\)?)*",
    re.IGNORECASE,
)


def same_pictures(files: Mapping[str, Path]) -> dict[str, str]:
    """Return for each id the first of all ids, sorted, that show the same picture: files of equal bytes, or versions.

    Versions are told by name: what Roboflow makes of one image (``NAME.rf.HASH``), and copies (``NAME - Copy``) and
    augmented versions (``NAME_aug_3``, ``NAME_flip``) of an image ``NAME`` that is there.
    """
    first = {id_: id_ for id_ in files}

    def leader(id_: str) -> str:
        while first[id_] != id_:
            id_ = first[id_]
        return id_

    versions = defaultdict(list)
    for id_ in files:
        versions[original(id_, files)].append(id_)
    for group in (*versions.values(), *equal_files(files)):
        for id_ in group:
            one, other = sorted((leader(group[0]), leader(id_)))
            first[other] = one
    return {id_: leader(id_) for id_ in files}


def original(id_: str, ids: Collection[str]) -> str:
    """Return the name of the image that ``id_`` is a version of, see :func:`same_pictures`, or ``id_`` itself."""
    match = _ROBOFLOW.fullmatch(id_)
    if match:
        return match[1]
    match = _VERSION.fullmatch(id_)
    return match[1] if match and match[1] in ids else id_


def equal_files(files: Mapping[K, Path]) -> list[list[K]]:
    """Return the groups of two or more files of the same bytes; few are read whole."""

    def middle(path: Path) -> bytes:
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            return file.read(1 << 12)

    steps: tuple[Callable[[Path], Hashable], ...] = (lambda path: path.stat().st_size, middle, sha256_of_file)
    groups = [list(files)]
    for step in steps:
        parts = []
        for group in groups:
            by_value = defaultdict(list)
            for key in group:
                by_value[step(files[key])].append(key)
            parts += [part for part in by_value.values() if len(part) > 1]
        groups = parts
    return groups


def shared_images(train: Sequence[VocDataset], test: Sequence[VocDataset]) -> list[tuple[Path, Path]]:
    """Return an image of ``train`` and the image of ``test`` that is the same file or has the same bytes, for each."""
    files = {
        (part, index, id_): data.image_path(id_)
        for part, sets in enumerate((train, test))
        for index, data in enumerate(sets)
        for id_ in data.ids
    }
    found = []
    for group in equal_files(files):
        learned = [files[key] for key in group if key[0] == 0]
        found += [(learned[0], files[key]) for key in group if key[0] == 1 and learned]
    return found


def held_out(groups: Iterable[Sequence[str]], fraction: float, seed: int = 0) -> set[str]:
    """Return ``fraction`` (0..1) of the names of each group: at least one, never a whole group; 0 keeps none."""
    if not 0 <= fraction < 1:
        raise UserError(f"val_fraction: {fraction} is not in [0, 1); give the share of images to validate on")
    kept: set[str] = set()
    for names in groups if fraction else ():
        count = min(max(round(fraction * len(names)), 1), len(names) - 1)
        kept |= set(shuffled(names, f"{seed}\0")[:count])
    return kept


def hold_out(data: VocDataset, fraction: float, seed: int = 0) -> tuple[VocDataset, VocDataset]:
    """Cut a split in two by :func:`held_out`: what is left to train on, and what is kept to validate on.

    An image counts for the rarest class in it (by images, in this split), so that rare classes are in both.  Images
    without an object are a group of their own.  What shows the same picture (:func:`same_pictures`) counts as one image
    and stays together.  Nothing outside the split is read.
    """
    if not fraction:
        return data, data.subset(())
    picture_of = same_pictures({id_: data.image_path(id_) for id_ in data.ids})
    in_picture = _classes_of_pictures({item.id: item.names for item in data.annotations()}, picture_of)
    images = Counter(name for names in in_picture.values() for name in set(names))
    groups: dict[str | None, list[str]] = defaultdict(list)
    for id_, names in in_picture.items():
        groups[min(set(names), key=lambda name: (images[name], name)) if names else None].append(id_)
    pictures = held_out(groups.values(), fraction, seed)
    kept = {id_ for id_ in data.ids if picture_of[id_] in pictures}
    if fraction and not kept:
        raise UserError(f"{shown_path(data.root)}: {shown(data.split)} has too few images to keep some for validation")
    return data.subset(id_ for id_ in data.ids if id_ not in kept), data.subset(id_ for id_ in data.ids if id_ in kept)


def cut_test_ids(
    classes_of: Mapping[str, Iterable[str]], fraction: float, picture_of: Mapping[str, str] | None = None
) -> list[str]:
    """Return ``fraction`` (0..1, at least one) of all ids in order, or fewer where a class would be lost from the rest.

    ``classes_of`` gives the classes on each image, ``picture_of`` is from :func:`same_pictures`: what shows one picture
    stays together, so that there may be more than asked for.  Unlike :func:`held_out`, which takes a share of each
    class, this cuts lists that are made once and written down.
    """
    picture_of = picture_of or {id_: id_ for id_ in classes_of}
    in_picture = _classes_of_pictures(classes_of, picture_of)
    wanted = min(max(1, round(fraction * len(classes_of))), len(classes_of) - 1)
    left = Counter(name for names in in_picture.values() for name in set(names))
    sizes = Counter(picture_of[id_] for id_ in classes_of)
    chosen: set[str] = set()
    count = 0
    for id_ in shuffled(in_picture):
        names = set(in_picture[id_])
        if count < wanted and count + sizes[id_] < len(classes_of) and all(left[name] > 1 for name in names):
            chosen.add(id_)
            count += sizes[id_]
            left.subtract(names)
    return [id_ for id_ in classes_of if picture_of[id_] in chosen]


def _classes_of_pictures(
    classes_of: Mapping[str, Iterable[str]], picture_of: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the classes on all versions of each picture."""
    found: dict[str, list[str]] = {picture_of[id_]: [] for id_ in classes_of}
    for id_, names in classes_of.items():
        found[picture_of[id_]] += names
    return found


def shuffled(names: Iterable[str], salt: str = "") -> list[str]:
    """Return names in an order that the salt and each name alone decide."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}{name}".encode("utf-8", "surrogateescape")).digest())


@dataclass(frozen=True)
class JoinedVoc:
    """Splits of several folders, with the same classes, as one set to evaluate on; no two images may have one id."""

    sets: tuple[VocDataset, ...]

    def __post_init__(self) -> None:
        twice = [id_ for id_, count in Counter(id_ for part in self.sets for id_ in part.ids).items() if count > 1]
        if twice:
            where = " and ".join(shown_path(part.root) for part in self.sets if twice[0] in part.ids)
            raise UserError(f"image '{shown(twice[0])}' is in {where}; detections are told apart by id, so rename one")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.sets[0].classes

    def __len__(self) -> int:
        return sum(len(part) for part in self.sets)

    def annotations(self) -> list[VocAnnotation]:
        return [annotation for part in self.sets for annotation in part.annotations()]


def known_pair(root: Path, train: str = "", test: str = "") -> tuple[str, str] | None:
    """Return the lists to train and to test on that a VOC folder has, or those named; None where they must be cut."""
    if train or test:
        if train == test or not (train and test):
            raise UserError(f"--train '{shown(train)}' and --test '{shown(test)}': name two different lists, or none")
        read_split(root, train)
        read_split(root, test)
        return train, test
    names = split_names(root)
    return next((pair for pair in PAIRS if set(pair) <= set(names)), None)


def list_to_test(root: Path) -> str:
    """Return the list to test on that a VOC folder has, or its only one."""
    names = split_names(root)
    pair = known_pair(root)
    if pair:
        return pair[1]
    if "test" in names or len(names) == 1:
        return "test" if "test" in names else names[0]
    there = shown(", ".join(names), 400) or "no lists at all"
    raise UserError(f"{shown_path(root / 'ImageSets' / 'Main')}: there are {there}; name one by --split")


def ids_to_cut(root: Path) -> tuple[str, ...]:
    """Return the images of a folder without a pair of lists: those of its only list, or all with an annotation."""
    names = [name for name in split_names(root) if name not in OWN_PAIR]
    known = [name for name in ("trainval", "train") if name in names]
    if len(names) > 1 and not known:
        raise UserError(
            f"{shown_path(root / 'ImageSets' / 'Main')}: lists {', '.join(names)}; name two by --train and --test"
        )
    if names:
        return read_split(root, (known or names)[0])
    ids = tuple(sorted(annotation_files(root).keys() & image_names(root / "JPEGImages").keys()))
    if not ids:
        raise UserError(f"{shown_path(root)}: no image with an annotation of the same name; add some")
    return ids


def write_pair(root: Path, ids: Iterable[str], test: Iterable[str]) -> tuple[str, str]:
    """Write the lists ``nst_det_train`` and ``nst_det_test`` into the VOC folder, and return their names."""
    test, ids = set(test), list(ids)
    for name, part in zip(OWN_PAIR, ([id_ for id_ in ids if id_ not in test], [id_ for id_ in ids if id_ in test])):
        write_split(root, name, part)
    return OWN_PAIR
