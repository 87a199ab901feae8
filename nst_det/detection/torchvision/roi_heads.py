"""Box head: proposals in, classes and boxes out (Girshick 2015, https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.box_coder import BoxCoder, Generators, clip, larger_than, match, sample
from nst_det.engine.distributed import mean_of_processes, world_size
from nst_det.errors import UserError


class Instances(NamedTuple):
    """Detections on an image: boxes (N, 4) xyxy in its pixels, scores (N,), labels (N,) from 0; the best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Pooler(nn.Module):
    """RoIAlign, each box on the level of its size (FPN, equation 1)."""

    def __init__(
        self,
        strides: Sequence[int],
        resolution: int,
        sampling_ratio: int,
        aligned: bool = True,
        canonical_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.strides, self.resolution = list(strides), resolution
        # samples a bin and side, 0 for as many as the bin has pixels; ROIAlignV2 takes half a pixel off (aligned)
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        # a box with sides of this many pixels belongs on this level
        self.canonical_size, self.canonical_level = canonical_size, canonical_level
        self.lowest, self.highest = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))

    def levels(self, boxes: Tensor) -> Tensor:
        """Return (N,) index into ``strides`` for (N, 4) boxes."""
        side = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_size + 1e-8))
        return level.clamp(self.lowest, self.highest).long() - self.lowest

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool maps (B, C, H, W) a level and (N, 4) boxes an image to (sum of N, C, resolution, resolution)."""
        rois = torch.cat([F.pad(found, (1, 0), value=float(image)) for image, found in enumerate(boxes)])
        if len(self.strides) == 1:
            return self.pool(maps[0], rois, self.strides[0])
        level = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.resolution, self.resolution)
        for index, (map_, stride) in enumerate(zip(maps, self.strides)):
            chosen = torch.nonzero(level == index).squeeze(1)
            pooled = pooled.index_put((chosen,), self.pool(map_, rois[chosen], stride))
        return pooled

    def pool(self, map_: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool (N, 5) boxes, each behind its image's index, from one level to (N, C, resolution, resolution)."""
        pooled: Tensor = roi_align(map_, rois, self.resolution, 1.0 / stride, self.sampling_ratio, self.aligned)
        return pooled


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
        self.coder = BoxCoder(tuple(box.BBOX_REG_WEIGHTS))

    def forward(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[tuple[Tensor, Tensor]] | None = None,
        generators: Generators = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the detections of each image, or the losses if ``truth`` has its (M, 4) boxes and (M,) labels.

        ``maps`` are (B, C, H, W) float32 by level, ``proposals`` (N, 4) and ``sizes`` (height, width) of each image.
        """
        levels = [maps[name] for name in self.settings.IN_FEATURES]
        if truth is None:
            logits, deltas = self.box_predictor(self.box_head(self.box_pooler(levels, proposals)))
            return self.detect(logits, deltas, proposals, sizes), {}
        given = zip(proposals, truth, generators or itertools.repeat(None))
        chosen = [self.sample_proposals(found, *objects, generator) for found, objects, generator in given]
        logits, deltas = self.box_predictor(self.box_head(self.box_pooler(levels, [rois for rois, _, _ in chosen])))
        boxes, targets, labels = (torch.cat(parts) for parts in zip(*chosen))
        return [], self.losses(logits, deltas, boxes, targets, labels)

    def box_outputs(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return, for (N, 4) boxes of each image, the predictor's input (R, D) and the logits (R, classes + 1)."""
        features: Tensor = self.box_head(self.box_pooler([maps[name] for name in self.settings.IN_FEATURES], boxes))
        return features, self.box_predictor.cls_score(features)

    @torch.no_grad()
    def sample_proposals(
        self, proposals: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw (R, 4) proposals of an image to train on, with (R, 4) their objects' boxes and (R,) labels."""
        settings, background = self.settings, self.settings.NUM_CLASSES
        if settings.PROPOSAL_APPEND_GT:
            proposals = torch.cat((proposals, boxes))
        index, kind = match(boxes, proposals, settings.IOU_THRESHOLDS, (0, 1), low_quality=False)
        label = torch.full_like(index, background)
        if len(boxes):
            label = torch.where(kind == 1, labels[index], label)
        count = settings.BATCH_SIZE_PER_IMAGE
        positive, negative = sample(label, background, count, settings.POSITIVE_FRACTION, generator)
        chosen = torch.cat((positive, negative))
        # background has no object; its own box takes that place and is never read
        targets = boxes[index[chosen]] if len(boxes) else proposals[chosen]
        return proposals[chosen], targets, label[chosen]

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        settings = self.box_settings
        positive = torch.nonzero(labels < self.settings.NUM_CLASSES).squeeze(1)
        rows = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
        agnostic = rows.shape[1] == 1
        found = rows[positive, 0 if agnostic else labels[positive]]
        distance = self.coder.regression_loss(found, boxes[positive], targets[positive], settings.SMOOTH_L1_BETA)
        # over all RoIs, so that an object weighs the same in every batch; no RoI at all gives 0, not NaN
        count = max(len(labels), 1) if world_size() == 1 else mean_of_processes(logits.new_tensor(len(labels))).clamp(1)
        classification = F.cross_entropy(logits, labels, reduction="sum") / count
        return {"loss_cls": classification, "loss_box_reg": distance / count * settings.BBOX_REG_LOSS_WEIGHT}

    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return the detections of each image that are above the score threshold and that NMS keeps."""
        settings, detections = self.settings, []
        counts = [len(found) for found in proposals]
        all_boxes = self.coder.decode_rows(deltas, torch.cat(list(proposals))).split(counts)
        all_scores = F.softmax(logits, dim=1).split(counts)
        for boxes, scores, size in zip(all_boxes, all_scores, sizes):
            finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
            boxes, scores = boxes[finite], scores[finite, :-1]
            rows, labels = torch.nonzero(scores > settings.SCORE_THRESH_TEST, as_tuple=True)
            by_class = clip(boxes.unflatten(1, (boxes.shape[1] // 4, 4)), size)
            chosen = by_class[rows, 0 if by_class.shape[1] == 1 else labels]
            confidence = scores[rows, labels]
            best = batched_nms(chosen, confidence, labels, settings.NMS_THRESH_TEST)
            if self.detections >= 0:
                best = best[: self.detections]
            detections.append(Instances(chosen[best], confidence[best], labels[best]))
        return detections


def postprocess(found: Instances, seen: tuple[int, int], size: tuple[int, int]) -> Instances:
    """Return detections, which the network saw at (height, width) ``seen``, in pixels of an image of ``size``."""
    scale_y, scale_x = size[0] / seen[0], size[1] / seen[1]
    boxes = clip(found.boxes * found.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y]), size)
    kept = larger_than(boxes, 0)
    return Instances(boxes[kept], found.scores[kept], found.labels[kept])
