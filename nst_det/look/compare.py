"""A teacher beside students: everything that is measured of their maps, before any of it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nst_det.look.measures import (
    linear_cka,
    mmd,
    nearest_channels,
    positions,
    principal_plane,
    tsne_plane,
    unit_channels,
)
from nst_det.look.networks import Looked
from nst_det.transfer.tensors import pooled

SHOWN_CHANNELS = 8


@dataclass(frozen=True)
class Cka:
    """Linear CKA of a student's levels with the teacher's.

    Attributes:
        values: (L, L), 0..1; a row a level of the student, a column a level of the teacher.
        few: (L, L), whether there were fewer positions than channels, so that the value says nothing.
    """

    values: Tensor
    few: Tensor


@dataclass(frozen=True)
class Plane:
    """The live channels of all networks at one level on one plane.

    Attributes:
        points: (C, 2) of each network, in their order.
        share: part of the variance that lies in the plane, 0..1; None for t-SNE.
    """

    points: list[Tensor]
    share: float | None


@dataclass(frozen=True)
class Level:
    """What one level gave.

    Attributes:
        name: ``res2`` .. ``res5``.
        mmd: by kernel, of each student.
        nearest: mean cosine, 0..1, of the teacher's live channels with the nearest of each student.
        dead: channels without activity, of each network.
        shown: (M, K) channels of M networks in K columns: the teacher's with most activity, and of each student the
            nearest to it.
        cosine: (M, K) of these with the teacher's, -1..1; 1 for the teacher.
        pca: the plane of most variance.
        tsne: None where it was not asked for.
    """

    name: str
    mmd: list[dict[str, float]]
    nearest: list[float]
    dead: list[int]
    shown: Tensor
    cosine: Tensor
    pca: Plane
    tsne: Plane | None


def compare_level(networks: Sequence[Looked], name: str, with_tsne: bool = False) -> Level:
    """Measure one level.

    Args:
        networks: the teacher first.
        name: a level that all have.
        with_tsne: embed by t-SNE too.

    Raises:
        UserError: scikit-learn is not installed.
    """
    maps = [network.maps[name] for network in networks]
    height, width = (min(map_.shape[side] for map_ in maps) for side in (2, 3))
    maps = [pooled(map_, (height, width)) for map_ in maps]
    units, alive = zip(*(unit_channels(map_) for map_ in maps))
    teacher = units[0]
    order = torch.linalg.vector_norm(maps[0].transpose(0, 1).flatten(1), dim=1).argsort(descending=True, stable=True)
    columns = order[alive[0][order]][:SHOWN_CHANNELS]
    shown, cosine, near = [columns], [torch.ones(len(columns), dtype=torch.float64)], []
    for student in units[1:]:
        index, cosines = nearest_channels(teacher, student)
        shown.append(index[columns])
        cosine.append(cosines[columns])
        near.append(float(cosines[alive[0]].mean()))
    live = [unit[mask] for unit, mask in zip(units, alive)]
    counts = [len(part) for part in live]
    joint = torch.cat(live)
    plane, share = principal_plane(joint)
    return Level(
        name=name,
        mmd=[mmd(student, maps[0]) for student in maps[1:]],
        nearest=near,
        dead=[int((~mask).sum()) for mask in alive],
        shown=torch.stack(shown),
        cosine=torch.stack(cosine),
        pca=Plane(list(plane.split(counts)), share),
        tsne=Plane(list(tsne_plane(joint).split(counts)), None) if with_tsne and len(joint) > 4 else None,
    )


def compare_levels(student: Looked, teacher: Looked, levels: Sequence[str]) -> Cka:
    """Linear CKA of each level of a student with each of the teacher; the larger map is averaged down."""
    values = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    few = torch.zeros(len(levels), len(levels), dtype=torch.bool)
    for row, mine in enumerate(levels):
        for column, theirs in enumerate(levels):
            first, second = student.maps[mine], teacher.maps[theirs]
            height, width = (min(first.shape[side], second.shape[side]) for side in (2, 3))
            x, y = (positions(pooled(map_, (height, width))) for map_ in (first, second))
            values[row, column] = linear_cka(x, y)
            few[row, column] = len(x) <= max(x.shape[1], y.shape[1])
    return Cka(values, few)
