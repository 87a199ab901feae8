"""A detector's inference as one graph of tensors that ``torch.export`` can trace, for images of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from nst_det.detection.torchvision import Detector
from nst_det.detection.torchvision.box_coder import larger_than


class DetectorGraph(nn.Module):
    """Inference on images of any one size; the detector is put into evaluation mode and shared, not copied."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.multiple = max(detector.backbone.size_divisibility, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the detections on (B, 3, H, W) uint8 RGB, image by image, the best of each first.

        They are (N, 4) xyxy boxes in pixels, (N,) scores, (N,) int64 labels and (N,) int64 indices of their images.
        """
        size = images.shape[2], images.shape[3]
        heads = self.detector.roi_heads
        maps = self.detector.backbone(self._normalized(images))
        proposals, valid = self._propose(maps, size)
        features = self._pooled([maps[name] for name in heads.settings.IN_FEATURES], proposals)
        # as many proposals for each image
        logits, deltas = (x.unflatten(0, valid.shape) for x in heads.box_predictor(heads.box_head(features)))
        found = [self._detect(*of_image, size) for of_image in zip(logits, deltas, proposals, valid)]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found))
        return boxes, scores, labels, torch.cat([torch.full_like(x[2], image) for image, x in enumerate(found)])

    def _normalized(self, images: Tensor) -> Tensor:
        detector = self.detector
        pixels = images.flip(1) if detector.input_format == "BGR" else images
        pixels = (pixels - detector.pixel_mean) / detector.pixel_std
        below, right = (-images.shape[2]) % self.multiple, (-images.shape[3]) % self.multiple
        return F.pad(pixels, (0, right, 0, below))

    def _propose(self, maps: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return (B, P, 4) proposals, best first, and (B, P) whether there is one in this row."""
        rpn = self.detector.proposal_generator
        settings, count = rpn.settings, rpn.settings.PRE_NMS_TOPK_TEST
        levels = [maps[name] for name in settings.IN_FEATURES]
        parts = []
        for anchors, logits, deltas in zip(rpn.anchors(levels), *rpn.rpn_head(levels)):
            # what is no number comes first, as in the detector, and is taken out before NMS
            numbers = torch.where(torch.isnan(logits), torch.inf, logits)
            best, index = best_first(F.pad(numbers, (0, count), value=-torch.inf), count)
            index = index.clamp(max=logits.shape[1] - 1)
            parts.append((best, deltas.gather(1, index[..., None].expand(-1, -1, 4)), anchors[index]))
        scores, deltas, anchors = (torch.cat(of_levels, dim=1) for of_levels in zip(*parts))
        boxes = clip(rpn.coder.decode_rows(deltas, anchors), size)
        usable = torch.isfinite(scores) & torch.isfinite(boxes).all(2) & larger_than(boxes, rpn.min_size)
        scores = torch.where(usable, scores, -torch.inf)
        kept = []
        for of_image in zip(boxes, scores):
            by_level = enumerate(zip(of_image[0].split(count), of_image[1].split(count)))
            rows = [level * count + kept_by_nms(*x, settings.NMS_THRESH) for level, x in by_level]
            kept.append(torch.zeros_like(of_image[1]).index_fill(0, torch.cat(rows), 1.0))
        scores = torch.where(torch.stack(kept) > 0, scores, -torch.inf)
        best, index = best_first(scores, min(settings.POST_NMS_TOPK_TEST, len(levels) * count))
        valid = torch.isfinite(best)
        return torch.where(valid[..., None], boxes.gather(1, index[..., None].expand(-1, -1, 4)), 0.0), valid

    def _pooled(self, maps: list[Tensor], proposals: Tensor) -> Tensor:
        """Return what the detector's pooler does, level after level and then in order again.

        The tensor of zeros that the pooler fills would be a part of the file, as large as all that is pooled.
        """
        pooler = self.detector.roi_heads.box_pooler
        rois = torch.cat([F.pad(found, (1, 0), value=float(image)) for image, found in enumerate(proposals)])
        level = pooler.levels(rois[:, 1:])
        rows = [torch.nonzero(level == index).squeeze(1) for index in range(len(maps))]
        pooled = torch.cat([pooler.pool(*of_level) for of_level in zip(maps, (rois[x] for x in rows), pooler.strides)])
        # no two keys are equal: not every runtime sorts stably
        order = (level * len(rois) + torch.arange(len(rois))).argsort()
        return pooled[order.argsort()]

    def _detect(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.detector.roi_heads
        settings = heads.settings
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
    """Return the ``count`` largest of each row of (B, N) scores in falling order, and their indices.

    Of equal ones the first comes first.
    """
    # sorting all of the finest level would take as long as a tenth of the network
    index = scores.topk(count, sorted=False).indices.sort().values
    best, order = scores.gather(1, index).sort(descending=True, stable=True)
    return best, index.gather(1, order)


def kept_by_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices (M,) of the boxes (N, 4) that NMS at an IoU of 0..1 keeps, best score (N,) first."""
    # torchvision tells torch.export that at least two boxes are kept, and the exported program would refuse an image
    # with fewer; these two touch nothing
    more = boxes.new_tensor([[-4.0, -4.0, -3.0, -3.0], [-2.0, -2.0, -1.0, -1.0]])
    kept = nms(torch.cat((boxes, more)), F.pad(scores, (0, 2), value=-torch.inf), threshold)
    return kept[kept < boxes.shape[0]]


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (..., 4) xyxy boxes off at an image of (height, width), which may be symbols."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack((x, y), dim=-1).flatten(-2)


def moved_apart(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Move boxes inside an image of (height, width) so that those of different labels never overlap."""
    return boxes + (labels * (max(size) + 1))[:, None]
