"""A detector's inference as one graph of tensors that ``torch.export`` can trace, for an image of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from nst_det.detection.torchvision import Detector
from nst_det.detection.torchvision.box_coder import larger_than


class DetectorGraph(nn.Module):
    """Inference on one image of any size; the detector is put into evaluation mode and shared, not copied."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.multiple = max(detector.backbone.size_divisibility, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (N, 4) xyxy boxes in pixels of (3, H, W) uint8 RGB, (N,) scores and (N,) int64 labels, best first."""
        size = image.shape[1], image.shape[2]
        maps = self.detector.backbone(self._normalized(image))
        proposals, valid = self._propose(maps, size)
        return self._detect(maps, proposals, valid, size)

    def _normalized(self, image: Tensor) -> Tensor:
        detector = self.detector
        pixels = image.flip(0) if detector.input_format == "BGR" else image
        pixels = (pixels - detector.pixel_mean) / detector.pixel_std
        below, right = (-image.shape[1]) % self.multiple, (-image.shape[2]) % self.multiple
        return F.pad(pixels, (0, right, 0, below))[None]

    def _propose(self, maps: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return (P, 4) proposals, best first, and (P,) whether there is one in this row."""
        rpn = self.detector.proposal_generator
        settings = rpn.settings
        levels = [maps[name] for name in settings.IN_FEATURES]
        boxes, scores = [], []
        for anchors, logits, deltas in zip(rpn.anchors(levels), *rpn.rpn_head(levels)):
            count = settings.PRE_NMS_TOPK_TEST
            best, index = best_first(F.pad(logits[0], (0, count), value=-torch.inf), count)
            rows, places = (F.pad(x, (0, 0, 0, count))[index] for x in (deltas[0], anchors))
            found = clip(rpn.coder.decode_rows(rows, places), size)
            usable = torch.isfinite(found).all(1) & larger_than(found, rpn.min_size)
            best = torch.where(usable, best, -torch.inf)
            kept = torch.zeros_like(usable).index_fill(0, kept_by_nms(found, best, settings.NMS_THRESH), True)
            boxes.append(found)
            scores.append(torch.where(kept, best, -torch.inf))
        all_scores, all_boxes = torch.cat(scores), torch.cat(boxes)
        best, index = best_first(all_scores, min(settings.POST_NMS_TOPK_TEST, len(levels) * settings.PRE_NMS_TOPK_TEST))
        valid = torch.isfinite(best)
        return torch.where(valid[:, None], all_boxes[index], 0.0), valid

    def _detect(
        self, maps: dict[str, Tensor], proposals: Tensor, valid: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.detector.roi_heads
        settings = heads.settings
        features = heads.box_pooler([maps[name] for name in settings.IN_FEATURES], [proposals])
        logits, deltas = heads.box_predictor(heads.box_head(features))
        boxes = heads.coder.decode_rows(deltas, proposals).unflatten(1, (-1, 4))
        probabilities = F.softmax(logits, dim=1)
        usable = valid & torch.isfinite(boxes).all(2).all(1) & torch.isfinite(probabilities).all(1)
        candidates = (probabilities[:, :-1] > settings.SCORE_THRESH_TEST) & usable[:, None]
        rows, labels = torch.nonzero(candidates).unbind(1)
        found = clip(boxes[rows, labels if boxes.shape[1] > 1 else 0], size)
        scores = probabilities[rows, labels]
        best = kept_by_nms(moved_apart(found, labels, size), scores, settings.NMS_THRESH_TEST)
        if heads.detections >= 0:
            best = best[: heads.detections]
        found, scores, labels = found[best], scores[best], labels[best]
        some = larger_than(found, 0)
        return found[some], scores[some], labels[some]


def best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest of (N,) scores in falling order, and their indices; equal ones by index."""
    best, index = scores.sort(descending=True, stable=True)
    return best[:count], index[:count]


def kept_by_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices (M,) of the boxes (N, 4) that NMS at an IoU of 0..1 keeps, best score (N,) first."""
    # torchvision tells torch.export that at least two boxes are kept, and the exported program would refuse an image
    # with fewer; these two touch nothing
    more = boxes.new_tensor([[-4.0, -4.0, -3.0, -3.0], [-2.0, -2.0, -1.0, -1.0]])
    kept = nms(torch.cat((boxes, more)), F.pad(scores, (0, 2), value=-torch.inf), threshold)
    return kept[kept < boxes.shape[0]]


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (N, 4) xyxy boxes off at an image of (height, width), which may be symbols."""
    x, y = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)


def moved_apart(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Move boxes inside an image of (height, width) so that those of different labels never overlap."""
    return boxes + (labels * (max(size) + 1))[:, None]
