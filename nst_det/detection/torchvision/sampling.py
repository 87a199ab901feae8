"""Which anchors and proposals of a batch are trained on, as what: matching and sampling for all images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# an anchor or proposal that is trained on neither as object nor as background
IGNORED = -1
# (object, box) pairs that are compared at once, a matter of memory: 256 MiB a tensor
MOST_PAIRS = 2**26
# random keys are below
KEYS = 2**30


def iou(objects: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoU (B, M, N) of (B, M, 4) objects and (B, N, 4) or (N, 4) boxes."""
    objects, boxes = objects.unsqueeze(-2), boxes.unsqueeze(-3)
    sides = (torch.minimum(objects[..., 2:], boxes[..., 2:]) - torch.maximum(objects[..., :2], boxes[..., :2])).clamp(0)
    shared = sides[..., 0] * sides[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (objects, boxes)]
    return shared / (areas[0] + areas[1] - shared)


def match(
    objects: Tensor,
    real: Tensor,
    boxes: Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (B, N), for each box the index of the object with the highest IoU, and (B, N) its label.

    Args:
        objects: (B, M, 4), at least one each image; those that aren't ``real`` (B, M) are zeros and match nothing.
        boxes: (B, N, 4), or (N, 4) of all images.
        thresholds: ascending IoUs between the labels.
        labels: -1 ignored, 0 background, 1 object; one more than thresholds.
        low_quality: the best boxes of each object, ties included, are labelled 1 however low their IoU is: not
            necessarily matched with this object, as in Detectron2.
    """
    images, pairs = len(objects), objects.shape[1] * boxes.shape[-2]
    if images > 1 and images * pairs > MOST_PAIRS:
        several = max(MOST_PAIRS // pairs, 1)
        parts = [
            match(*of_images, thresholds, labels, low_quality)
            for of_images in zip(
                objects.split(several),
                real.split(several),
                boxes.expand(images, -1, -1).split(several),
            )
        ]
        index, label = (torch.cat(part) for part in zip(*parts))
        return index, label
    overlap = iou(objects, boxes)
    best, index = overlap.max(dim=1)
    label = torch.full_like(index, labels[0])
    for threshold, higher in zip(thresholds, labels[1:]):
        label.masked_fill_(best >= threshold, higher)
    if low_quality:
        # what is no object reaches no IoU of 2
        highest = overlap.amax(dim=2, keepdim=True).masked_fill(~real[..., None], 2.0)
        label.masked_fill_((overlap == highest).any(dim=1), 1)
    return index, label


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """Return (B, count) int32 from 0 to :data:`KEYS`, a function of the image's seed and the place alone.

    They mix ``seeds`` (B, 2) int32 and the place as MurmurHash3 does at its end: the same numbers on every device,
    whatever the other images of the batch are.
    """
    place = torch.arange(count, dtype=torch.int32, device=seeds.device) * -1640531535
    key = place + seeds[:, :1]
    key = (key ^ (key >> 16)) * -2048144789
    key = (key ^ (key >> 13) ^ seeds[:, 1:]) * -1028477387
    return (key ^ (key >> 16)) & (KEYS - 1)


def sample(
    positive: Tensor, negative: Tensor, count: int, positive_fraction: float, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw places of each image, at most that fraction of ``count`` where (B, N) ``positive``, the rest ``negative``.

    Return (B, R) places, R the smaller of ``count`` and N, positive ones first, and (B, R) whether one was drawn: where
    there are too few the last places are filled up.  Those with the highest ``keys`` (B, N), of
    :func:`random_keys`, are drawn.
    """
    most = int(count * positive_fraction)
    found = torch.where(positive, keys, -1)
    if most < found.shape[1]:
        beyond = found.topk(most + 1, dim=1).values[:, most:]
        found = torch.where(found > beyond, found, -1)
    found = torch.where(found >= 0, found + KEYS, torch.where(negative, keys, -1))
    highest, places = found.topk(min(count, found.shape[1]), dim=1)
    return places, highest >= 0
