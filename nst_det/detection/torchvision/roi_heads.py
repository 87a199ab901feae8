"""Box head: proposals in, classes and boxes out (Girshick 2015, https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.box_coder import Box2BoxTransform, Generators, clip, larger_than, match, sample
from nst_det.engine.distributed import mean_of_processes, world_size
from nst_det.errors import UserError


class Instances(NamedTuple):
    """Detections on an image: boxes (N, 4) xyxy in its pixels, scores (N,), labels (N,) from 0; the best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Pooler(nn.Module):
    """RoIAlign, each box on the level of its size (FPN, equation 1).

    Args:
        strides: of the levels, each twice the one before.
        resolution: side of the pooled map.
        sampling_ratio: samples a bin and side; 0 takes as many as the bin has pixels.
        aligned: half a pixel is taken off, as in ROIAlignV2.
        canonical_size: side of a box in pixels that belongs on ...
        canonical_level: ... this level.
    """

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
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
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
            return self._pool(maps[0], rois, self.strides[0])
        level = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.resolution, self.resolution)
        for index, (map_, stride) in enumerate(zip(maps, self.strides)):
            chosen = torch.nonzero(level == index).squeeze(1)
            pooled = pooled.index_put((chosen,), self._pool(map_, rois[chosen], stride))
        return pooled

    def _pool(self, map_: Tensor, rois: Tensor, stride: int) -> Tensor:
        pooled: Tensor = roi_align(map_, rois, self.resolution, 1.0 / stride, self.sampling_ratio, self.aligned)
        return pooled


class BoxHead(nn.Sequential):
    """Convolutions (``conv1`` ..), then fully connected layers (``fc1`` ..), each followed by ReLU.

    ``width`` is that of what comes out, flattened.
    """

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
        """(N, width) to logits (N, classes + 1) and deltas (N, 4 * classes), or (N, 4)."""
        return self.cls_score(features), self.bbox_pred(features)


@dataclass
class RoiSettings:
    """Numbers of the box head, from MODEL.ROI_HEADS, MODEL.ROI_BOX_HEAD and TEST."""

    in_features: list[str]
    classes: int
    thresholds: list[float]
    batch_size: int
    positive_fraction: float
    append_truth: bool
    beta: float
    box_weight: float
    score_threshold: float
    nms_threshold: float
    detections: int


class RoiHeads(nn.Module):
    """Detections, or in training the losses ``loss_cls`` and ``loss_box_reg``."""

    def __init__(
        self, pooler: Pooler, head: BoxHead, predictor: BoxPredictor, coder: Box2BoxTransform, settings: RoiSettings
    ) -> None:
        super().__init__()
        self.box_pooler, self.box_head, self.box_predictor = pooler, head, predictor
        self.coder, self.settings = coder, settings

    def forward(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[tuple[Tensor, Tensor]] | None = None,
        generators: Generators = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Classify and refine proposals.

        Args:
            maps: level -> (B, C, H, W), float32.
            proposals: (N, 4) of each image.
            sizes: (height, width) of each image without padding.
            truth: (M, 4) boxes and (M,) labels of each image's objects; given in training.
            generators: what chooses the proposals of each image; where it is empty, torch's own generator does.

        Returns:
            The detections of each image (none in training), and the losses (none in inference).
        """
        levels = [maps[name] for name in self.settings.in_features]
        if truth is None:
            logits, deltas = self._predict(levels, proposals)
            return self._detect(logits, deltas, proposals, sizes), {}
        given = zip(proposals, truth, generators or itertools.repeat(None))
        chosen = [self._sample(found, *objects, generator) for found, objects, generator in given]
        logits, deltas = self._predict(levels, [rois for rois, _, _ in chosen])
        boxes, targets, labels = (torch.cat(parts) for parts in zip(*chosen))
        return [], self._losses(logits, deltas, boxes, targets, labels)

    def box_outputs(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the box head says about given boxes, for a detector that learns from this one.

        Args:
            maps: level -> (B, C, H, W), float32.
            boxes: (N, 4) of each image, xyxy in pixels of the network's input.

        Returns:
            What enters the predictor (R, D) and the logits (R, classes + 1), background last; R is the sum of N.
        """
        pooled = self.box_pooler([maps[name] for name in self.settings.in_features], boxes)
        features: Tensor = self.box_head(pooled)
        return features, self.box_predictor.cls_score(features)

    def _predict(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        predicted: tuple[Tensor, Tensor] = self.box_predictor(self.box_head(self.box_pooler(levels, boxes)))
        return predicted

    @torch.no_grad()
    def _sample(
        self, proposals: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(R, 4) proposals to train on, (R, 4) their objects' boxes, (R,) labels."""
        settings = self.settings
        if settings.append_truth:
            proposals = torch.cat((proposals, boxes))
        index, kind = match(boxes, proposals, settings.thresholds, (0, 1), low_quality=False)
        label = torch.full_like(index, settings.classes)
        if len(boxes):
            label = torch.where(kind == 1, labels[index], label)
        positive, negative = sample(label, settings.classes, settings.batch_size, settings.positive_fraction, generator)
        chosen = torch.cat((positive, negative))
        # background has no object; its own box stands in and is never read
        targets = boxes[index[chosen]] if len(boxes) else proposals[chosen]
        return proposals[chosen], targets, label[chosen]

    def _losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        settings = self.settings
        positive = torch.nonzero(labels < settings.classes).squeeze(1)
        rows = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
        agnostic = rows.shape[1] == 1
        found = rows[positive, 0 if agnostic else labels[positive]]
        distance = self.coder.regression_loss(found, boxes[positive], targets[positive], settings.beta)
        # over all RoIs, so that an object weighs the same in every batch; no RoI at all gives 0, not NaN
        count = max(len(labels), 1) if world_size() == 1 else mean_of_processes(logits.new_tensor(len(labels))).clamp(1)
        classification = F.cross_entropy(logits, labels, reduction="sum") / count
        return {
            "loss_cls": classification,
            "loss_box_reg": distance / count * settings.box_weight,
        }

    def _detect(
        self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        counts = [len(found) for found in proposals]
        boxes = self.coder.decode_rows(deltas, torch.cat(list(proposals)))
        scores = F.softmax(logits, dim=1)
        return [self._detect_image(*parts) for parts in zip(boxes.split(counts), scores.split(counts), sizes)]

    def _detect_image(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Instances:
        settings = self.settings
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        boxes, scores = boxes[finite], scores[finite, :-1]
        rows, labels = torch.nonzero(scores > settings.score_threshold, as_tuple=True)
        by_class = clip(boxes.unflatten(1, (boxes.shape[1] // 4, 4)), size)
        chosen = by_class[rows, 0 if by_class.shape[1] == 1 else labels]
        confidence = scores[rows, labels]
        best = batched_nms(chosen, confidence, labels, settings.nms_threshold)
        if settings.detections >= 0:
            best = best[: settings.detections]
        return Instances(chosen[best], confidence[best], labels[best])


def postprocess(found: Instances, seen: tuple[int, int], size: tuple[int, int]) -> Instances:
    """Return detections, which the network saw at (height, width) ``seen``, in pixels of an image of ``size``."""
    scale_y, scale_x = size[0] / seen[0], size[1] / seen[1]
    boxes = clip(found.boxes * found.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y]), size)
    kept = larger_than(boxes, 0)
    return Instances(boxes[kept], found.scores[kept], found.labels[kept])


def build_roi_heads(config: CfgNode, shapes: dict[str, Shape]) -> RoiHeads:
    """Return the RoI heads of MODEL.ROI_HEADS and MODEL.ROI_BOX_HEAD on levels of the given shapes."""
    roi, box = config.MODEL.ROI_HEADS, config.MODEL.ROI_BOX_HEAD
    levels = [shapes[name] for name in roi.IN_FEATURES]
    strides = [level.stride for level in levels]
    if len({level.channels for level in levels}) != 1:
        raise UserError("MODEL.ROI_HEADS.IN_FEATURES: these levels have different numbers of channels")
    if any(below * 2 != above for below, above in itertools.pairwise(strides)):
        raise UserError("MODEL.ROI_HEADS.IN_FEATURES: each level must have twice the stride of the one before")
    if box.NUM_CONV + box.NUM_FC < 1:
        raise UserError("MODEL.ROI_BOX_HEAD: NUM_CONV and NUM_FC are both 0; set NUM_FC to 2, as Detectron2's FPN does")
    pooler = Pooler(
        strides,
        box.POOLER_RESOLUTION,
        box.POOLER_SAMPLING_RATIO,
        box.POOLER_TYPE == "ROIAlignV2",
        box.CANONICAL_BOX_SIZE,
        box.CANONICAL_LEVEL,
    )
    head = BoxHead(levels[0].channels, box.POOLER_RESOLUTION, [box.CONV_DIM] * box.NUM_CONV, [box.FC_DIM] * box.NUM_FC)
    settings = RoiSettings(
        in_features=list(roi.IN_FEATURES),
        classes=roi.NUM_CLASSES,
        thresholds=list(roi.IOU_THRESHOLDS),
        batch_size=roi.BATCH_SIZE_PER_IMAGE,
        positive_fraction=roi.POSITIVE_FRACTION,
        append_truth=roi.PROPOSAL_APPEND_GT,
        beta=box.SMOOTH_L1_BETA,
        box_weight=box.BBOX_REG_LOSS_WEIGHT,
        score_threshold=roi.SCORE_THRESH_TEST,
        nms_threshold=roi.NMS_THRESH_TEST,
        detections=config.TEST.DETECTIONS_PER_IMAGE,
    )
    predictor = BoxPredictor(head.width, roi.NUM_CLASSES, box.CLS_AGNOSTIC_BBOX_REG)
    return RoiHeads(pooler, head, predictor, Box2BoxTransform(tuple(box.BBOX_REG_WEIGHTS)), settings)
