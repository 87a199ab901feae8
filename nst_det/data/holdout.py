"""Images kept from training, to validate on: the same ones on every machine, some of each class."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nst_det.data.annotation import VocAnnotation
from nst_det.data.reading import shown, shown_path
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError


def held_out(groups: Iterable[Sequence[str]], fraction: float, seed: int = 0) -> set[str]:
    """The names that are kept from training: ``fraction`` of each group, at least one, never a whole group.

    Which ones depends on the seed and on each name alone, so that a name added later moves hardly any other.

    Args:
        groups: names, each in one group.
        fraction: 0..1; 0 keeps none.
        seed: another seed, other names.

    Raises:
        UserError: ``fraction`` is out of range.

    Example:
        >>> sorted(held_out([["a", "b", "c", "d"], ["e", "f"], ["g"]], fraction=0.25))
        ['d', 'f']
    """
    if not 0 <= fraction < 1:
        raise UserError(f"val_fraction: {fraction} is not in [0, 1); give the share of images to validate on")
    kept: set[str] = set()
    for names in groups if fraction else ():
        count = min(max(round(fraction * len(names)), 1), len(names) - 1)
        kept |= set(sorted(names, key=lambda name: _draw(name, seed))[:count])
    return kept


def _draw(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def hold_out(data: VocDataset, fraction: float, seed: int = 0) -> tuple[VocDataset, VocDataset]:
    """A split in two: what is left to train on, and what is kept to validate on, both in the order of the list.

    An image counts for the rarest class in it (by images, in this split), so that rare classes are in both.  Images
    without an object are a group of their own.

    Args:
        data: the split; nothing outside it is read.
        fraction: 0..1, of each class's images.
        seed: of the cut.

    Raises:
        UserError: ``fraction`` is out of range, it leaves nothing to validate on, or a bad annotation.
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


@dataclass(frozen=True)
class JoinedVoc:
    """Splits of several folders as one set to evaluate on.

    Attributes:
        sets: the splits; all have the same classes.

    Raises:
        UserError: two of them have an image of the same id.
    """

    sets: tuple[VocDataset, ...]

    def __post_init__(self) -> None:
        twice = [id_ for id_, count in Counter(id_ for part in self.sets for id_ in part.ids).items() if count > 1]
        if twice:
            where = " and ".join(shown_path(part.root) for part in self.sets if twice[0] in part.ids)
            raise UserError(f"image '{shown(twice[0])}' is in {where}; detections are told apart by id, so rename one")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.sets[0].classes

    def __len__(self) -> int:
        return sum(len(part) for part in self.sets)

    def annotations(self) -> list[VocAnnotation]:
        """All annotations, set after set."""
        return [annotation for part in self.sets for annotation in part.annotations()]
