"""Images kept from training: the same ones on every machine, some of each class.

Which ones depends on a hash of their names, so that an image added later moves hardly any other.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nst_det.data.annotation import VocAnnotation
from nst_det.data.safe_io import shown, shown_path
from nst_det.data.voc import VocDataset, annotation_files, image_names, read_split, split_names, write_split
from nst_det.errors import UserError

# lists to train and to test on that belong together, the best first
PAIRS = (("trainval", "test"), ("train", "test"), ("train", "val"), ("nst_det_train", "nst_det_test"))
OWN_PAIR = PAIRS[-1]
TEST_FRACTION = 0.2


def held_out(groups: Iterable[Sequence[str]], fraction: float, seed: int = 0) -> set[str]:
    """Return ``fraction`` (0..1) of the names of each group: at least one, never a whole group; 0 keeps none."""
    if not 0 <= fraction < 1:
        raise UserError(f"val_fraction: {fraction} is not in [0, 1); give the share of images to validate on")
    kept: set[str] = set()
    for names in groups if fraction else ():
        count = min(max(round(fraction * len(names)), 1), len(names) - 1)
        kept |= set(_shuffled(names, f"{seed}\0")[:count])
    return kept


def hold_out(data: VocDataset, fraction: float, seed: int = 0) -> tuple[VocDataset, VocDataset]:
    """Cut a split in two by :func:`held_out`: what is left to train on, and what is kept to validate on.

    An image counts for the rarest class in it (by images, in this split), so that rare classes are in both.  Images
    without an object are a group of their own.  Nothing outside the split is read.
    """
    in_image = {annotation.id: sorted(set(annotation.names)) for annotation in data.annotations()}
    images = Counter(name for names in in_image.values() for name in names)
    groups: dict[str | None, list[str]] = defaultdict(list)
    for id_, names in in_image.items():
        groups[min(names, key=lambda name: (images[name], name)) if names else None].append(id_)
    kept = held_out(groups.values(), fraction, seed)
    if fraction and not kept:
        raise UserError(f"{shown_path(data.root)}: {shown(data.split)} has too few images to keep some for validation")
    return data.subset(id_ for id_ in data.ids if id_ not in kept), data.subset(id_ for id_ in data.ids if id_ in kept)


def cut_test_ids(classes_of: Mapping[str, Iterable[str]], fraction: float) -> list[str]:
    """Return ``fraction`` (0..1, at least one) of all ids in order, or fewer where a class would be lost from the rest.

    ``classes_of`` gives the classes on each image.  Unlike :func:`held_out`, which takes a share of each class, this
    cuts lists that are made once and written down.
    """
    wanted = min(max(1, round(fraction * len(classes_of))), len(classes_of) - 1)
    left = Counter(name for names in classes_of.values() for name in set(names))
    chosen: set[str] = set()
    for id_ in _shuffled(classes_of):
        names = set(classes_of[id_])
        if len(chosen) < wanted and all(left[name] > 1 for name in names):
            chosen.add(id_)
            left.subtract(names)
    return [id_ for id_ in classes_of if id_ in chosen]


def _shuffled(names: Iterable[str], salt: str = "") -> list[str]:
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
