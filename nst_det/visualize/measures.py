"""How near two sets of channel maps are: MMD, CKA, the nearest channel, and a plane to see them in.

Shapes: I images, C channels, N positions of all images together, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nst_det.detection.sources import find_sources, is_video, read_sources
from nst_det.distillation.validation import linear_cka
from nst_det.errors import UserError
from nst_det.losses import nst_loss
from nst_det.losses.mmd import KERNELS
from nst_det.losses.ops import pooled
from nst_det.models import Card, classifier_from_file, feature_levels, forward_outputs

# a channel whose norm is below this says nothing about where it is active
DEAD_NORM = 1e-3
MOST_IMAGES = 64
BATCH = 8
SHOWN_CHANNELS = 8


def unit_channels(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, I * H * W) unit vectors of the channels of (I, C, H, W) maps, 0 for a dead one, and (C,) if alive."""
    rows = maps.transpose(0, 1).flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    alive = norms >= DEAD_NORM
    return torch.where(alive[:, None], rows / norms.clamp_min(DEAD_NORM)[:, None], 0.0), alive


def principal_plane(points: Tensor) -> tuple[Tensor, float]:
    """Project (P, N) points, at least two, onto the (P, 2) plane with most variance, and return its share of it, 0..1.

    The longer axis comes first; each axis is turned so that its farthest point is positive.
    """
    centered = points.double() - points.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centered, full_matrices=False)
    plane = torch.zeros(len(points), 2, dtype=torch.float64)
    axes = (left * sizes)[:, :2]
    plane[:, : axes.shape[1]] = axes
    farthest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    share = sizes[:2].square().sum() / sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return plane * torch.where(farthest < 0, -1.0, 1.0), float(share)


def tsne_plane(points: Tensor, seed: int = 0) -> Tensor:
    """Project (P, N) points, at least five, onto a plane (P, 2) by t-SNE (van der Maaten & Hinton 2008)."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("--tsne: scikit-learn is not installed; pip install scikit-learn") from error
    perplexity = min(30.0, (len(points) - 1) / 4)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.float().numpy())
    return torch.from_numpy(plane)


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of a network on the images: by level, (I, C, H, W) float32."""

    name: str
    card: Card
    maps: dict[str, Tensor]


def read_squares(paths: Sequence[str], size: int) -> tuple[list[str], Tensor]:
    """Read the central squares of images and folders of images: I names, and (I, 3, size, size) uint8, RGB."""
    sources = find_sources(paths)
    if len(sources) > MOST_IMAGES or any(map(is_video, sources)):
        raise UserError(f"--image: {len(sources)} files; name at most {MOST_IMAGES}, and no video")
    names, squares = [], []
    for picture in read_sources(sources):
        names.append(picture.id)
        image = F.resize(torch.from_numpy(picture.pixels).permute(2, 0, 1), [size], antialias=True)
        squares.append(F.center_crop(image, [size, size]))
    return names, torch.stack(squares)


@torch.no_grad()
def feature_maps(weights: str, images: Tensor) -> FeatureMaps:
    """Run a backbone file's network on (I, 3, S, S) uint8 RGB images, normalized as its card says."""
    model, card = classifier_from_file(weights)
    levels = {name: info for name, info in feature_levels(model).items() if info.stride}
    mean, std = (torch.tensor(card.input[name]).view(3, 1, 1) for name in ("mean", "std"))
    parts: list[dict[str, Tensor]] = []
    for batch in images.split(BATCH):
        ordered = batch.flip(1) if card.input["channel_order"] == "BGR" else batch
        parts.append(dict(forward_outputs(model, (ordered / 255 - mean) / std, levels).maps))
    maps = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
    method = f" ({card.method})" if card.method else ""
    return FeatureMaps(f"{weights.rpartition('/')[2].removesuffix('.safetensors')}{method}", card, maps)


def common_levels(networks: Sequence[FeatureMaps], wanted: Sequence[str]) -> list[str]:
    """Return the wanted levels, or all that the networks have in common."""
    for level in wanted:
        for network in networks:
            if level not in network.maps:
                raise UserError(f"--levels: {network.name} has no {level}; it has {', '.join(network.maps)}")
    levels = list(wanted) or [level for level in networks[0].maps if all(level in n.maps for n in networks)]
    if not levels:
        raise UserError("--weights: these networks have no level in common")
    return levels


def same_size(maps: Sequence[Tensor]) -> list[Tensor]:
    """Average (I, C, H, W) maps down to the smallest height and width among them."""
    size = min(map_.shape[2] for map_ in maps), min(map_.shape[3] for map_ in maps)
    return [pooled(map_, size) for map_ in maps]


@dataclass(frozen=True)
class Plane:
    """The live channels of all networks at one level, projected by PCA or t-SNE: points (C, 2) of each network."""

    method: str
    title: str
    points: list[Tensor]


@dataclass(frozen=True)
class Level:
    """How near the students are to the teacher, the first of M networks, at one level, ``res2`` .. ``res5``."""

    name: str
    # of each student, by kernel: the unweighted NST losses (arXiv 1707.01219, equations 4 to 7)
    mmd: list[dict[str, float]]
    # of each student: mean cosine, 0..1, of the teacher's live channels with the student's nearest
    nearest: list[float]
    # of each network: channels without activity
    dead: list[int]
    # (M, K): the teacher's K most active channels, and each student's that are active at the most similar places
    shown: Tensor
    # (M, K), -1..1, of these with the teacher's
    cosine: Tensor
    planes: list[Plane]


def compare_level(networks: Sequence[FeatureMaps], name: str, with_tsne: bool = False) -> Level:
    """Measure one level that all networks have, the teacher first."""
    maps = same_size([network.maps[name] for network in networks])
    units, alive = zip(*(unit_channels(map_) for map_ in maps))
    activity = torch.linalg.vector_norm(maps[0].transpose(0, 1).flatten(1), dim=1)
    order = activity.argsort(descending=True, stable=True)
    columns = order[alive[0][order]][:SHOWN_CHANNELS]
    shown, cosine, nearest = [columns], [torch.ones(len(columns), dtype=torch.float64)], []
    for student in units[1:]:
        cosines, index = (units[0] @ student.T).max(dim=1)
        shown.append(index[columns])
        cosine.append(cosines[columns])
        nearest.append(float(cosines[alive[0]].mean()))
    live = [unit[mask] for unit, mask in zip(units, alive)]
    counts, joint = [len(part) for part in live], torch.cat(live)
    plane, share = principal_plane(joint)
    planes = [Plane("pca", f"PCA: {share:.0%} of the variance", list(plane.split(counts)))]
    if with_tsne and len(joint) > 4:
        planes.append(Plane("tsne", "t-SNE", list(tsne_plane(joint).split(counts))))
    return Level(
        name=name,
        mmd=[{kernel: float(nst_loss(student, maps[0], kernel)) for kernel in KERNELS} for student in maps[1:]],
        nearest=nearest,
        dead=[int((~mask).sum()) for mask in alive],
        shown=torch.stack(shown),
        cosine=torch.stack(cosine),
        planes=planes,
    )


def cka_of_levels(student: FeatureMaps, teacher: FeatureMaps, levels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Compute (L, L) linear CKA of a student's levels (rows) with the teacher's, a point for each position.

    The second matrix is where there were no more positions than channels, so that the value says nothing.
    """
    values = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    few = torch.zeros(len(levels), len(levels), dtype=torch.bool)
    for row, mine in enumerate(levels):
        for column, theirs in enumerate(levels):
            pair = same_size([student.maps[mine], teacher.maps[theirs]])
            x, y = (map_.permute(0, 2, 3, 1).flatten(0, 2) for map_ in pair)
            values[row, column] = linear_cka(x, y)
            few[row, column] = len(x) <= max(x.shape[1], y.shape[1])
    return values, few
