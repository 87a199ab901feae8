"""How near two sets of channel maps are: MMD, CKA, the nearest channel, and a plane to see them in.

Shapes: I images, C channels, N positions of all images together, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nst_det.detection.predict import find_sources, is_video, read_sources
from nst_det.errors import UserError
from nst_det.losses import nst_loss
from nst_det.losses.mmd import KERNELS
from nst_det.losses.ops import pooled
from nst_det.models import Card, bottomup_from_file, load_card

# a channel whose norm is below this says nothing about where it is active
DEAD_NORM = 1e-3
MOST_IMAGES = 64
BATCH = 8
SHOWN_CHANNELS = 8


def mmd(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """MMD^2 of the normalized channel maps, mean over the images, by kernel: the unweighted NST losses.

    Args:
        student: (I, C_S, H, W).
        teacher: (I, C_T, H', W').

    Returns:
        Values >= 0 for ``linear``, ``poly`` and ``gaussian``.

    Source: Huang & Wang 2017 (arXiv 1707.01219), equations 4 to 7.
    """
    return {kernel: float(nst_loss(student, teacher, kernel)) for kernel in KERNELS}


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centered kernel alignment of two representations of the same P points.

    With columns centered, ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms.  It needs many more points than channels:
    with fewer, any two representations are near 1.

    Args:
        first: (P, C).
        second: (P, D).

    Returns:
        0..1; NaN where one is the same at all points.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 3 and section 3.

    Example:
        >>> points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(points, 3 * points.flip(1) + 1), 6)
        1.0
    """
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    cross = torch.linalg.matrix_norm(y.T @ x).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def positions(maps: Tensor) -> Tensor:
    """Maps (I, C, H, W) as one point a position: (I * H * W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def unit_channels(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel over all images as a unit vector.

    Args:
        maps: (I, C, H, W).

    Returns:
        (C, I * H * W) of norm 1, zeros for a dead channel; and (C,) whether it is alive.
    """
    rows = maps.transpose(0, 1).flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    alive = norms >= DEAD_NORM
    return torch.where(alive[:, None], rows / norms.clamp_min(DEAD_NORM)[:, None], 0.0), alive


def nearest_channels(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """For each channel of the teacher the student's channel that is active at the most similar places.

    Args:
        teacher: (C_T, N) unit vectors.
        student: (C_S, N) unit vectors.

    Returns:
        (C_T,) index, and (C_T,) cosine -1..1.
    """
    cosine, index = (teacher @ student.T).max(dim=1)
    return index, cosine


def principal_plane(points: Tensor) -> tuple[Tensor, float]:
    """Points on the plane in which they spread most.

    Args:
        points: (P, N), at least two.

    Returns:
        (P, 2) coordinates, the longer axis first, each axis turned so that its farthest point is positive; and the part
        of the variance that lies in the plane, 0..1.
    """
    centered = points.double() - points.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centered, full_matrices=False)
    plane = torch.zeros(len(points), 2, dtype=torch.float64)
    found = (left * sizes)[:, :2]
    plane[:, : found.shape[1]] = found
    farthest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    share = sizes[:2].square().sum() / sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return plane * torch.where(farthest < 0, -1.0, 1.0), float(share)


def tsne_plane(points: Tensor, seed: int = 0) -> Tensor:
    """Points on a plane that keeps neighbors together (t-SNE), by scikit-learn.

    Args:
        points: (P, N), at least five.
        seed: of its random start.

    Returns:
        (P, 2).

    Raises:
        UserError: scikit-learn is not installed.

    Source: van der Maaten & Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("--tsne: scikit-learn is not installed; pip install 'nst_det[look]'") from error
    perplexity = min(30.0, (len(points) - 1) / 4)
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.float().numpy())
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Looked:
    """A network and its maps on the images.

    Attributes:
        name: for people.
        card: of its backbone file.
        maps: by level, (I, C, H, W) float32.
    """

    name: str
    card: Card
    maps: dict[str, Tensor]


def read_squares(paths: Sequence[str], size: int) -> tuple[list[str], Tensor]:
    """Names and pixels of images, each one's central square.

    Args:
        paths: images, and folders of images.
        size: side of the squares, pixels.

    Returns:
        I names, and (I, 3, size, size) uint8, RGB.

    Raises:
        UserError: one can't be read, or there are more than :data:`MOST_IMAGES`.
    """
    sources = find_sources(paths)
    if len(sources) > MOST_IMAGES or any(map(is_video, sources)):
        raise UserError(f"--image: {len(sources)} files; name at most {MOST_IMAGES}, and no video")
    names, squares = [], []
    for id_, _, pixels in read_sources(sources):
        names.append(id_)
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True)
        squares.append(F.center_crop(image, [size, size]))
    return names, torch.stack(squares)


@torch.no_grad()
def look_at(weights: str, images: Tensor) -> Looked:
    """Run a backbone file's network on images, normalized as its card says.

    Args:
        weights: ``backbone://NAME`` or a backbone file.
        images: (I, 3, S, S) uint8, RGB.

    Raises:
        UserError: it can't be read.
    """
    card = load_card(weights)
    model = bottomup_from_file(weights, list(card.levels)).eval()
    pixels = card.input
    mean, std = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    parts: list[dict[str, Tensor]] = []
    for batch in images.split(BATCH):
        ordered = batch.flip(1) if pixels["channel_order"] == "BGR" else batch
        parts.append(model((ordered / 255 - mean) / std))
    maps = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
    method = f" ({card.method})" if card.method else ""
    return Looked(f"{weights.rpartition('/')[2].removesuffix('.safetensors')}{method}", card, maps)


def common_levels(networks: Sequence[Looked], wanted: Sequence[str]) -> list[str]:
    """The levels to look at: those that all networks have, or the wanted ones.

    Raises:
        UserError: a wanted level that one lacks, or none in common.
    """
    for level in wanted:
        for network in networks:
            if level not in network.maps:
                raise UserError(f"--levels: {network.name} has no {level}; it has {', '.join(network.maps)}")
    levels = list(wanted) or [level for level in networks[0].maps if all(level in n.maps for n in networks)]
    if not levels:
        raise UserError("--weights: these networks have no level in common")
    return levels


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
