"""How near the detections of two detectors are on the same images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from nst_det.detection.torchvision import Detector
from nst_det.errors import UserError

# boxes in pixels, scores 0..1
BOX_LIMIT = 0.01
SCORE_LIMIT = 1e-4
SAME_OBJECT = 0.5

# boxes (N, 4), scores (N,), labels (N,), best first
Detections = Sequence[np.ndarray]
# (3, H, W) uint8 RGB to detections
Detect = Callable[[np.ndarray], Detections]


@dataclass
class Difference:
    """How far two detectors' detections are apart on some images."""

    images: int = 0
    detections: int = 0  # with a partner at the other detector
    # the largest differences among partners: in pixels, and in score
    boxes: float = 0.0
    scores: float = 0.0
    alone: int = 0  # without a partner within both limits
    # without a partner too, but as near to the score threshold as the limit or, on an image with as many detections as
    # there may be, to the last one's score: either detector may be right
    borderline: int = 0

    def __str__(self) -> str:
        border = f", {self.borderline} on the edge of the score threshold" if self.borderline else ""
        return (
            f"{self.images} images, {self.detections} detections: boxes within {self.boxes:.1e} px (limit "
            f"{BOX_LIMIT:g}), scores within {self.scores:.1e} (limit {SCORE_LIMIT:g}){border}"
        )

    def check(self, output: Path) -> None:
        """Raise UserError if a detection has no partner within :data:`BOX_LIMIT` and :data:`SCORE_LIMIT`."""
        if self.alone:
            raise UserError(
                f"{output}: on {self.images} images {self.alone} detections differ from PyTorch's by more than "
                f"{BOX_LIMIT:g} px or {SCORE_LIMIT:g} in score, so nothing was exported"
            )


def compare_detections(
    first: Detect, second: Detect, images: Iterable[np.ndarray], threshold: float = 0.0, most: int = -1
) -> Difference:
    """Compare two detectors with the least score ``threshold`` and at most ``most`` detections an image (-1: any)."""
    total = Difference()
    for image in images:
        mine, theirs = first(image), second(image)
        pairs, rest = partners(mine, theirs)
        for row, other in pairs:
            total.boxes = max(total.boxes, float(np.abs(mine[0][row] - theirs[0][other]).max()))
            total.scores = max(total.scores, float(abs(mine[1][row] - theirs[1][other])))
        full = len(mine[1]) == len(theirs[1]) == most
        edges = [threshold, *(float(side[1].min()) for side in (mine, theirs) if full)]
        near = sum(min(abs(score - edge) for edge in edges) <= SCORE_LIMIT for score in rest)
        total.images += 1
        total.detections += len(pairs)
        total.alone += len(rest) - near
        total.borderline += near
    return total


def partners(mine: Detections, theirs: Detections) -> tuple[list[tuple[int, int]], list[float]]:
    """Pair detections of one label within the limits: (row of mine, of theirs), and the scores of all without one."""
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


def found_again(mine: Detections, theirs: Detections) -> int:
    """Count those of mine that overlap one of theirs of the same label by an IoU of 0.5 at least; each serves once."""
    overlap = box_iou(*(torch.from_numpy(side[0]) for side in (mine, theirs))).numpy()
    overlap = np.where(mine[2][:, None] == theirs[2][None], overlap, 0.0)
    count = 0
    for row in overlap:
        if row.max(initial=0.0) >= SAME_OBJECT:
            overlap[:, row.argmax()] = 0.0
            count += 1
    return count


def detect(detector: Detector, images: Iterable[np.ndarray]) -> list[Detections]:
    """Return what a detector finds on each of a batch of images (3, H, W) uint8 RGB, in its pixels."""
    with torch.no_grad():
        found = detector([{"image": in_own_order(detector, image)} for image in images])
    return [[one[name].numpy() for name in ("boxes", "scores", "labels")] for one in found]


def in_own_order(detector: Detector, image: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(image)
    return pixels.flip(0) if detector.input_format == "BGR" else pixels


def equal_scores(detector: Detector, image: np.ndarray) -> int:
    """Count the anchors, of those that become proposals of an image (3, H, W) RGB, that share their score."""
    rpn = detector.proposal_generator
    with torch.no_grad():
        images, _ = detector.preprocess([in_own_order(detector, image)])
        maps = detector.backbone(images)
        logits, _ = rpn.rpn_head([maps[name] for name in rpn.settings.IN_FEATURES])
    best = [row[0].topk(min(rpn.settings.PRE_NMS_TOPK_TEST, row.shape[1])).values for row in logits]
    return sum(len(row) - len(row.unique()) for row in best)
