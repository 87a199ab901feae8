"""Which lists of a VOC folder are trained and tested on, and lists for a folder that has none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from nst_det.data.reading import shown_path
from nst_det.data.voc import image_names, read_split, split_names, split_path
from nst_det.errors import UserError
from nst_det.runtime.files import write_text

# lists that belong together, the best first
PAIRS = (("trainval", "test"), ("train", "test"), ("train", "val"), ("nst_det_train", "nst_det_test"))
OWN_PAIR = PAIRS[-1]
TEST_FRACTION = 0.2


def hold_out(classes_of: Mapping[str, Iterable[str]], fraction: float) -> list[str]:
    """Images to keep apart, so that every class stays among the others.

    Which ones is decided by a hash of their ids: the same on every machine, and hardly changed by an image that is
    added later.

    Args:
        classes_of: the classes on each image, by id.
        fraction: 0..1, of all images; at least one is asked for.

    Returns:
        Ids, in the order of ``classes_of``; fewer than asked for where a class would be lost otherwise.
    """
    wanted = max(1, round(fraction * len(classes_of)))
    left = Counter(name for names in classes_of.values() for name in set(names))
    chosen: set[str] = set()
    for id_ in sorted(classes_of, key=lambda id_: hashlib.sha256(id_.encode("utf-8", "surrogateescape")).digest()):
        names = set(classes_of[id_])
        if len(chosen) < min(wanted, len(classes_of) - 1) and all(left[name] > 1 for name in names):
            chosen.add(id_)
            left.subtract(names)
    return [id_ for id_ in classes_of if id_ in chosen]


def known_pair(root: Path, train: str = "", test: str = "") -> tuple[str, str] | None:
    """The lists to train and to test on that a VOC folder has already; None where they must be cut.

    Args:
        root: the folder that holds ``Annotations``.
        train: a list that the user names.
        test: likewise; both or neither.

    Raises:
        UserError: one is named alone, or a named list isn't there.
    """
    if bool(train) != bool(test):
        raise UserError("--train and --test: name both lists, or neither")
    if train:
        for name in (train, test):
            read_split(root, name)
        if train == test:
            raise UserError(f"--train and --test: both are {train}; what is tested on must not be trained on")
        return train, test
    names = split_names(root)
    return next((pair for pair in PAIRS if set(pair) <= set(names)), None)


def ids_to_cut(root: Path) -> tuple[str, ...]:
    """All images of a folder that has no pair of lists: those of its only list, or all with an annotation.

    Raises:
        UserError: several lists whose names don't say what they are for, or no image at all.
    """
    names = [name for name in split_names(root) if name not in OWN_PAIR]
    for name in ("trainval", "train"):
        if name in names:
            return read_split(root, name)
    if len(names) > 1:
        raise UserError(
            f"{shown_path(root / 'ImageSets' / 'Main')}: lists {', '.join(names)}, and none of them says what it is "
            "for; name two by --train and --test"
        )
    if names:
        return read_split(root, names[0])
    annotated = {path.stem for path in (root / "Annotations").glob("*.xml")}
    ids = tuple(sorted(annotated & set(image_names(root / "JPEGImages"))))
    if not ids:
        raise UserError(f"{shown_path(root)}: no image with an annotation of the same name; add some")
    return ids


def write_pair(root: Path, ids: Iterable[str], test: Iterable[str]) -> tuple[str, str]:
    """Write the lists ``nst_det_train`` and ``nst_det_test`` into the VOC folder, and give their names."""
    test = set(test)
    members = [id_ for id_ in ids if id_ not in test], [id_ for id_ in ids if id_ in test]
    for name, part in zip(OWN_PAIR, members):
        write_text(split_path(root, name), "".join(f"{id_}\n" for id_ in part))
    return OWN_PAIR
