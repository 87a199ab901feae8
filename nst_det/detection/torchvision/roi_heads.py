"""Box head: proposals in, classes and boxes out (Girshick 2015, https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.batch import Truth
from nst_det.detection.torchvision.box_coder import BoxCoder, clip, larger_than
from nst_det.detection.torchvision.nms import kept_by_nms
from nst_det.detection.torchvision.pooler import Pooler, with_images
from nst_det.detection.torchvision.sampling import match, random_keys, sample
from nst_det.engine.distributed import mean_of_processes, world_size
from nst_det.errors import UserError


class Instances(NamedTuple):
    """Detections on an image: boxes (N, 4) xyxy in its pixels, scores (N,), labels (N,) from 0; the best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class BoxHead(nn.Sequential):
    """Convolutions (``conv1`` ..), then fully connected layers (``fc1`` ..), each with ReLU, to (N, ``width``)."""

    def __init__(self, channels: int, resolution: int, convs: Sequence[int], fcs: Sequence[int]) -> None:
        super().__init__()
        for number, size in enumerate(convs, start=1):
            conv = nn.Conv2d(channels, size, 3, padding=1)
            c2_msra_fill(conv)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"conv_relu{number}", nn.ReLU(inplace=True))
            channels = size
        self.add_module("flatten", nn.Flatten())
        self.width = channels * resolution**2
        for number, size in enumerate(fcs, start=1):
            layer = nn.Linear(self.width, size)
            c2_xavier_fill(layer)
            self.add_module(f"fc{number}", layer)
            self.add_module(f"fc_relu{number}", nn.ReLU(inplace=True))
            self.width = size


class BoxPredictor(nn.Module):
    """Logits of the classes and of the background, which is last, and box deltas of each class."""

    def __init__(self, width: int, classes: int, agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 if agnostic else 4 * classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes + 1) and deltas (N, 4 * classes), or (N, 4), of features (N, width)."""
        return self.cls_score(features), self.bbox_pred(features)


def first_rows(values: Tensor, counts: Iterable[int]) -> list[Tensor]:
    """Return the first rows, as many as counted, of each image in (B, N, ...) values."""
    return [rows[:count] for rows, count in zip(values, counts)]


class RoiHeads(nn.Module):
    """Detections, or in training the losses ``loss_cls`` and ``loss_box_reg``, on levels of the given shapes."""

    def __init__(self, config: CfgNode, shapes: dict[str, Shape]) -> None:
        super().__init__()
        # MODEL.ROI_HEADS and ROI_BOX_HEAD
        self.settings, self.box_settings = config.MODEL.ROI_HEADS.clone(), config.MODEL.ROI_BOX_HEAD.clone()
        self.detections = config.TEST.DETECTIONS_PER_IMAGE
        box, classes = self.box_settings, self.settings.NUM_CLASSES
        levels = [shapes[name] for name in self.settings.IN_FEATURES]
        strides = [level.stride for level in levels]
        if len({level.channels for level in levels}) != 1:
            raise UserError("MODEL.ROI_HEADS.IN_FEATURES: these levels have different numbers of channels")
        if any(below * 2 != above for below, above in itertools.pairwise(strides)):
            raise UserError("MODEL.ROI_HEADS.IN_FEATURES: each level must have twice the stride of the one before")
        if box.NUM_CONV + box.NUM_FC < 1:
            raise UserError("MODEL.ROI_BOX_HEAD: NUM_CONV and NUM_FC are both 0; set NUM_FC to 2, as Detectron2 does")
        self.box_pooler = Pooler(
            strides,
            box.POOLER_RESOLUTION,
            box.POOLER_SAMPLING_RATIO,
            box.POOLER_TYPE == "ROIAlignV2",
            box.CANONICAL_BOX_SIZE,
            box.CANONICAL_LEVEL,
        )
        convs, fcs = [box.CONV_DIM] * box.NUM_CONV, [box.FC_DIM] * box.NUM_FC
        self.box_head = BoxHead(levels[0].channels, box.POOLER_RESOLUTION, convs, fcs)
        self.box_predictor = BoxPredictor(self.box_head.width, classes, box.CLS_AGNOSTIC_BBOX_REG)
        self.coder = BoxCoder(box.BBOX_REG_WEIGHTS)

    def forward(self, maps: dict[str, Tensor], proposals: Tensor, valid: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Return the losses of proposals (B, N, 4), of which those that are ``valid`` (B, N) are trained on.

        ``maps`` are (B, C, H, W) by level.
        """
        rois, targets, labels, drawn = self.sample_proposals(proposals, valid, truth)
        counts = self.box_pooler.count(rois, drawn)
        of_images = [sum(of_image) for of_image in counts]
        boxes = first_rows(rois, of_images)
        logits, deltas = self.predict(maps, boxes, counts)
        chosen = (torch.cat(first_rows(values, of_images)) for values in (targets, labels))
        return self.losses(logits, deltas, torch.cat(boxes), *chosen)

    def predict(
        self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return float32 logits (R, classes + 1) and deltas (R, 4 * classes) for (N, 4) boxes of each image."""
        levels = [maps[name] for name in self.settings.IN_FEATURES]
        logits, deltas = self.box_predictor(self.box_head(self.box_pooler(levels, boxes, counts)))
        return logits.float(), deltas.float()

    def box_outputs(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return, for (N, 4) boxes of each image, the predictor's input (R, D) and the logits (R, classes + 1)."""
        features: Tensor = self.box_head(self.box_pooler([maps[name] for name in self.settings.IN_FEATURES], boxes))
        return features, self.box_predictor.cls_score(features)

    @torch.no_grad()
    def sample_proposals(self, proposals: Tensor, valid: Tensor, truth: Truth) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw (B, R, 4) proposals to train on, with (B, R, 4) their objects' boxes and (B, R) labels.

        The last are (B, R) whether one was drawn: the first ones of each image are, where it has fewer than R.
        """
        settings, background = self.settings, self.settings.NUM_CLASSES
        if settings.PROPOSAL_APPEND_GT:
            proposals, valid = torch.cat((proposals, truth.boxes), dim=1), torch.cat((valid, truth.real), dim=1)
        index, kind = match(truth.boxes, truth.real, proposals, settings.IOU_THRESHOLDS, (0, 1))
        keys = random_keys(truth.seeds[:, 2:], proposals.shape[1])
        count, fraction = settings.BATCH_SIZE_PER_IMAGE, settings.POSITIVE_FRACTION
        chosen, drawn = sample(valid & (kind == 1), valid & (kind == 0), count, fraction, keys)
        index, positive = index.gather(1, chosen), kind.gather(1, chosen) == 1
        rois, targets = (
            values.gather(1, rows[..., None].expand(-1, -1, 4))
            for values, rows in ((proposals, chosen), (truth.boxes, index))
        )
        labels = torch.where(positive, truth.labels.gather(1, index), background)
        # background has no object; its own box takes that place
        return rois, torch.where(positive[..., None], targets, rois), labels, drawn

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of R RoIs; the boxes and targets of those that have the background's label aren't read."""
        settings, classes = self.box_settings, self.settings.NUM_CLASSES
        rows = deltas.unflatten(1, (-1, 4))
        row = torch.zeros_like(labels) if rows.shape[1] == 1 else labels.clamp(max=classes - 1)
        found = rows.gather(1, row[:, None, None].expand(-1, -1, 4))[:, 0]
        distances = self.coder.distances(found, boxes, targets, settings.SMOOTH_L1_BETA)
        distance = torch.where(labels < classes, distances, 0.0).sum()
        # over all RoIs, so that an object weighs the same in every batch; no RoI at all gives 0, not NaN
        count: int | Tensor = max(len(labels), 1)
        if world_size() > 1:
            count = mean_of_processes(torch.full((), len(labels), dtype=logits.dtype, device=logits.device)).clamp(1)
        classification = F.cross_entropy(logits, labels, reduction="sum") / count
        return {"loss_cls": classification, "loss_box_reg": distance / count * settings.BBOX_REG_LOSS_WEIGHT}

    def detect(
        self,
        maps: Mapping[str, Tensor],
        proposals: Tensor,
        valid: Tensor,
        limits: Tensor,
        scales: Tensor,
        originals: Tensor,
    ) -> list[Instances]:
        """Return the detections of each image that are above the score threshold and that NMS keeps.

        Args:
            maps: (B, C, H, W) by level.
            proposals: (B, N, 4), the first of each image ``valid`` (B, N).
            limits: (B, 4), see ``clip``.
            scales: (B, 4), what the boxes are multiplied by; then they are cut off at ``originals`` (B, 4).
        """
        counts = self.box_pooler.count(proposals, valid)
        rois = first_rows(proposals, [sum(of_image) for of_image in counts])
        logits, deltas = self.predict(maps, rois, counts)
        boxes, scores, labels, images = self.candidates(logits, deltas, with_images(rois), limits)
        kept = torch.nonzero(self.kept(boxes, scores, labels, images)).squeeze(1)
        # the best first in each image
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        kept = kept[images[kept].argsort(stable=True)]
        boxes, scores, labels, images = (values[kept] for values in (boxes, scores, labels, images))
        boxes = clip(boxes * scales[images], originals[images])
        in_image = torch.arange(len(limits), device=images.device)[:, None] == images
        if self.detections >= 0:
            in_image &= in_image.cumsum(dim=1) <= self.detections
        in_image &= larger_than(boxes, 0)
        chosen = torch.nonzero(in_image)
        counted = in_image.sum(dim=1).tolist()
        parts = (values[chosen[:, 1]].split(counted) for values in (boxes, scores, labels))
        return [Instances(*of_image) for of_image in zip(*parts)]

    def candidates(
        self, logits: Tensor, deltas: Tensor, rois: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes (K, 4), scores, labels and images (K,) above the threshold, of (R, 5) RoIs with their images."""
        boxes = self.coder.decode_rows(deltas, rois[:, 1:])
        scores = F.softmax(logits, dim=1)
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        scores = scores[:, :-1]
        rows, labels = torch.nonzero((scores > self.settings.SCORE_THRESH_TEST) & finite[:, None], as_tuple=True)
        images = rois[rows, 0].long()
        by_class = boxes.unflatten(1, (-1, 4))
        chosen = by_class[rows, 0 if by_class.shape[1] == 1 else labels]
        return clip(chosen, limits[images]), scores[rows, labels], labels, images

    def kept(self, boxes: Tensor, scores: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Return (K,) whether NMS, in each class of each image by itself, keeps a candidate."""
        best = scores.argsort(descending=True, stable=True)
        groups, order = (images * self.settings.NUM_CLASSES + labels)[best].sort(stable=True)
        order = best[order]
        # a group in use a row
        used, row, sizes = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
        place = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
        shape = len(used), int(sizes.max()) if len(used) else 0
        padded, valid = boxes.new_zeros(*shape, 4), boxes.new_zeros(shape, dtype=torch.bool)
        padded[row, place], valid[row, place] = boxes[order], True
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[order] = kept_by_nms(padded, valid, self.settings.NMS_THRESH_TEST)[row, place]
        return kept
