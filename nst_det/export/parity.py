"""How far the detections of an exported detector are from those of the detector that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nst_det.errors import UserError

# boxes in pixels, scores 0..1
BOX_LIMIT = 0.01
SCORE_LIMIT = 1e-4

# boxes (N, 4), scores (N,), labels (N,), best first
Found = Sequence[np.ndarray]


@dataclass(frozen=True)
class Difference:
    """What comparing two sides on some images gave.

    Attributes:
        images: compared.
        detections: of the first side that have a partner on the other.
        boxes: largest difference of a coordinate among partners, in pixels.
        scores: largest difference of a score among partners.
        alone: detections of either side without a partner within both limits.
        borderline: detections without a partner whose score is within the limit of the score threshold or, on an image
            with as many detections as there may be, of the last one's; either side may be right, so they are not in
            ``alone``.
    """

    images: int
    detections: int
    boxes: float
    scores: float
    alone: int
    borderline: int

    def check(self, name: str) -> None:
        """Refuse a difference beyond the limits.

        Args:
            name: of the export, for the error.

        Raises:
            UserError: a detection has no partner within :data:`BOX_LIMIT` and :data:`SCORE_LIMIT`.
        """
        if self.alone:
            raise UserError(
                f"{name}: on {self.images} images {self.alone} detections differ from PyTorch's by more than "
                f"{BOX_LIMIT:g} px or {SCORE_LIMIT:g} in score, so nothing was exported"
            )

    def line(self) -> str:
        """One line for people."""
        border = f", {self.borderline} on the edge of the score threshold" if self.borderline else ""
        return (
            f"{self.images} images, {self.detections} detections: boxes within {self.boxes:.1e} px (limit "
            f"{BOX_LIMIT:g}), scores within {self.scores:.1e} (limit {SCORE_LIMIT:g}){border}"
        )


def difference(
    first: Callable[[np.ndarray], Found],
    second: Callable[[np.ndarray], Found],
    images: Iterable[np.ndarray],
    threshold: float = 0.0,
    most: int = -1,
) -> Difference:
    """Run both on the same images and compare their detections.

    Args:
        first: (3, H, W) uint8 to detections.
        second: likewise.
        images: to run on.
        threshold: least score of a detection, 0..1.
        most: detections on an image; -1 for any number.
    """
    count = detections = alone = borderline = 0
    boxes, scores = 0.0, 0.0
    for image in images:
        mine, theirs = first(image), second(image)
        pairs, rest = partners(mine, theirs)
        for row, other in pairs:
            boxes = max(boxes, float(np.abs(mine[0][row] - theirs[0][other]).max()))
            scores = max(scores, float(abs(mine[1][row] - theirs[1][other])))
        full = len(mine[1]) == len(theirs[1]) == most
        edges = [threshold, *(float(side[1].min()) for side in (mine, theirs) if full)]
        near = [score for score in rest if min(abs(score - edge) for edge in edges) <= SCORE_LIMIT]
        count, detections = count + 1, detections + len(pairs)
        alone, borderline = alone + len(rest) - len(near), borderline + len(near)
    return Difference(count, detections, boxes, scores, alone, borderline)


def partners(mine: Found, theirs: Found) -> tuple[list[tuple[int, int]], list[float]]:
    """Which detections of two sides are the same: one label, boxes and scores within the limits.

    Returns:
        (row of mine, row of theirs), and the scores of those of either side that have no partner.
    """
    free = np.ones(len(theirs[1]), dtype=bool)
    pairs: list[tuple[int, int]] = []
    alone: list[float] = []
    for row, (box, score, label) in enumerate(zip(*mine)):
        far = np.abs(theirs[0] - box).max(axis=1, initial=0.0)
        fits = free & (theirs[2] == label) & (far <= BOX_LIMIT) & (np.abs(theirs[1] - score) <= SCORE_LIMIT)
        if fits.any():
            other = int(np.where(fits, far, np.inf).argmin())
            free[other] = False
            pairs.append((row, other))
        else:
            alone.append(float(score))
    return pairs, alone + theirs[1][free].tolist()
