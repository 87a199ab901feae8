"""A detector on images that are larger than it was made for: in tiles that overlap, and joined across their seams."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nst_det.detection.predictions import Boxes, Find
from nst_det.errors import UserError

SMALLEST = 32
OVERLAP = 0.2
# two tiles see one object where their boxes, cut off at what both see, overlap (IoU) by more, or where more than this
# part of the smaller box lies in the larger one
SAME, INSIDE = 0.5, 0.7
# a box that ends nearer to its tile's edge than this part of the tile may go on behind it
EDGE = 0.01


@dataclass(frozen=True)
class Tiles:
    """Square tiles of ``side`` pixels, of which neighbors share at least the part ``overlap``, 0..1, of a side."""

    side: int
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if self.side < SMALLEST:
            raise UserError(f"--tile: {self.side}; give the side of a tile, {SMALLEST} pixels or more")
        if not 0 <= self.overlap < 1:
            raise UserError(
                f"--overlap: {self.overlap:g}; give the part of a tile that its neighbors share, at least 0 and below 1"
            )

    def places(self, height: int, width: int) -> np.ndarray:
        """Return the tiles of an image, (T, 4) int64 xyxy: all inside it, evenly spread, as few as there can be."""
        step = max(1, math.floor(self.side * (1 - self.overlap)))

        def starts(length: int) -> np.ndarray:
            count = 1 + max(0, math.ceil((length - self.side) / step))
            return np.linspace(0, max(0, length - self.side), count).round().astype(np.int64)

        corners = np.array(list(itertools.product(starts(height), starts(width))))[:, ::-1]
        return np.hstack((corners, np.minimum(corners + self.side, (width, height))))

    def around(self, find: Find) -> Find:
        """Return a detector that looks at an image tile by tile, and once at the whole for what no tile can hold.

        An object as large as the overlap or smaller is whole in one tile at least, and pieces of larger ones are put
        together; from the look at the whole image only what is larger than a tile is taken.  An image that fits into a
        tile is given to ``find`` as it is.
        """

        def find_in_tiles(images: Iterable[np.ndarray]) -> Iterator[Boxes]:
            waiting: deque[np.ndarray] = deque()

            def parts() -> Iterator[np.ndarray]:
                for image in images:
                    height, width = image.shape[:2]
                    tiles = self.places(height, width)
                    whole = [[0, 0, width, height]] if len(tiles) > 1 else []
                    waiting.append(np.vstack((tiles, *whole)))
                    yield from (image[top:bottom, left:right] for left, top, right, bottom in waiting[-1].tolist())

            found = find(parts())
            for first in found:
                tiles = waiting.popleft()
                yield self.join([first, *itertools.islice(found, len(tiles) - 1)], tiles)

        return find_in_tiles

    def join(self, found: Sequence[Boxes], tiles: np.ndarray) -> Boxes:
        """Return the detections of an image, best first, of those of each tile (T, 4), the last of which is the whole.

        Of two boxes that are one object the one that ends inside its tile is taken, else the one of the better score,
        with the better score of both; of two that both end at their tile's edge the box around both.
        """
        if len(tiles) == 1:
            return found[0]
        image = tiles[-1]
        sizes = [len(one.scores) for one in found]
        of = np.repeat(tiles, sizes, axis=0).astype(np.float32)
        boxes = np.concatenate([one.boxes + tile[[0, 1, 0, 1]] for one, tile in zip(found, tiles)]).astype(np.float32)
        scores, labels = (np.concatenate([getattr(one, name) for one in found]) for name in ("scores", "labels"))
        near = EDGE * self.side
        cut = ((boxes[:, :2] < of[:, :2] + near) & (of[:, :2] > 0)).any(1)
        cut |= ((boxes[:, 2:] > of[:, 2:] - near) & (of[:, 2:] < image[2:])).any(1)
        from_whole = np.arange(len(boxes)) >= len(boxes) - sizes[-1]
        seen = ~from_whole | ((boxes[:, 2:] - boxes[:, :2]).max(1) > self.side)
        order = np.lexsort((-scores, cut))
        order = order[seen[order]]
        by_label = (order[labels[order] == label] for label in np.unique(labels))
        kept = [group for one in by_label for group in _groups(one, boxes, of, cut)]
        joined = np.array([_around(boxes[group]) if cut[group[0]] else boxes[group[0]] for group in kept])
        best = np.array([scores[group].max() for group in kept], np.float32)
        first = np.argsort(-best, kind="stable")
        label = np.array([labels[group[0]] for group in kept], np.int64)
        return Boxes(joined.reshape(-1, 4)[first], label[first], best[first])


def _groups(order: np.ndarray, boxes: np.ndarray, tiles: np.ndarray, cut: np.ndarray) -> list[list[int]]:
    """Return indices of boxes that are one object, the one that stands for it first; those that are cut come last."""
    groups: list[list[int]] = []
    # boxes that others may be compared with, and their groups
    members = np.zeros(len(order), np.int64)
    group_of = np.zeros(len(order), np.int64)
    count = 0
    for index in order.tolist():
        known = members[:count]
        # a tile's own boxes are different objects
        elsewhere = (tiles[known] != tiles[index]).any(1)
        same = np.flatnonzero(elsewhere & _are_one(boxes[index], tiles[index], boxes[known], tiles[known]))
        group = int(group_of[same].min()) if same.size else len(groups)
        if not same.size:
            groups.append([])
        groups[group].append(index)
        # a piece that a whole box stands for says nothing about further ones
        if not same.size or cut[groups[group][0]]:
            members[count], group_of[count] = index, group
            count += 1
    return groups


def _are_one(box: np.ndarray, tile: np.ndarray, boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Return whether a box of a tile and others (N, 4) of other tiles are one object, (N,) bool."""
    shared = _intersection(tile, tiles)
    first, second = _intersection(box, shared), _intersection(boxes, shared)
    both = _area(_intersection(first, second))
    union = _area(first) + _area(second) - both
    return (both > SAME * union) | (both > INSIDE * np.minimum(_area(box), _area(boxes)))


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate((np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])), axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1)


def _around(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((boxes[:, :2].min(0), boxes[:, 2:].max(0)))
