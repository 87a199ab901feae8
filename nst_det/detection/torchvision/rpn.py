"""The region proposal network (Ren et al. 2015, https://arxiv.org/abs/1506.01497)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.box_coder import (
    IGNORED,
    Anchors,
    Box2BoxTransform,
    Generators,
    clip,
    larger_than,
    match,
    sample,
)
from nst_det.engine.nan_guard import raise_together
from nst_det.errors import UserError


class RpnHead(nn.Module):
    """A hidden convolution, or several, then objectness and box deltas of each anchor; shared by all levels."""

    def __init__(self, channels: int, anchors: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [channels]
        for size in hidden:
            sizes.append(sizes[-1] if size == -1 else size)
        convs = [nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(sizes)]
        # one alone has no number in its name
        numbered: OrderedDict[str, nn.Module] = OrderedDict((f"conv{index}", conv) for index, conv in enumerate(convs))
        self.conv = convs[0] if len(convs) == 1 else nn.Sequential(numbered)
        self.objectness_logits = nn.Conv2d(sizes[-1], anchors, 1)
        self.anchor_deltas = nn.Conv2d(sizes[-1], anchors * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (B, H * W * A) and deltas (B, H * W * A, 4) of maps (B, C, H, W), level by level."""
        logits, deltas = [], []
        for map_ in maps:
            hidden = map_
            for conv in self.conv if isinstance(self.conv, nn.Sequential) else [self.conv]:
                hidden = F.relu(conv(hidden))
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            delta = self.anchor_deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(delta.reshape(len(delta), -1, 4))
        return logits, deltas


@dataclass
class RpnSettings:
    """Numbers of the proposal network, from MODEL.RPN and MODEL.PROPOSAL_GENERATOR; pairs are (train, test)."""

    in_features: list[str]
    thresholds: list[float]
    batch_size: int
    positive_fraction: float
    boundary: float
    pre_nms: tuple[int, int]
    post_nms: tuple[int, int]
    nms_threshold: float
    min_size: float
    beta: float
    cls_weight: float
    loc_weight: float


class Rpn(nn.Module):
    """Proposals, and in training the losses ``loss_rpn_cls`` and ``loss_rpn_loc``."""

    def __init__(self, head: RpnHead, anchors: Anchors, coder: Box2BoxTransform, settings: RpnSettings) -> None:
        super().__init__()
        self.rpn_head, self.anchors, self.coder, self.settings = head, anchors, coder, settings

    def forward(
        self,
        maps: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor] | None = None,
        generators: Generators = (),
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes.

        Args:
            maps: level -> (B, C, H, W), float32.
            sizes: (height, width) of each image without padding.
            truth: (M, 4) boxes of each image's objects; given in training.
            generators: what chooses the anchors of each image; where it is empty, torch's own generator does.

        Returns:
            (N, 4) proposals of each image, best first, and the losses.

        Raises:
            NotFinite: training diverged, so that proposals are not finite here or in another process.
        """
        levels = [maps[name] for name in self.settings.in_features]
        anchors = self.anchors(levels)
        logits, deltas = self.rpn_head(levels)
        losses = {} if truth is None else self._losses(anchors, logits, deltas, sizes, truth, generators)
        with torch.no_grad():
            return self._propose(anchors, logits, deltas, sizes), losses

    def _losses(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor],
        generators: Generators = (),
    ) -> dict[str, Tensor]:
        settings, all_anchors = self.settings, torch.cat(anchors)
        all_logits, all_deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)
        scores, labels = [], []
        distance = all_logits.new_zeros(())
        given = zip(truth, sizes, generators or itertools.repeat(None))
        for image, (boxes, size, generator) in enumerate(given):
            index, label = match(boxes, all_anchors, settings.thresholds, (0, IGNORED, 1), low_quality=True)
            if settings.boundary >= 0:
                label[~_inside(all_anchors, size, settings.boundary)] = IGNORED
            positive, negative = sample(label, 0, settings.batch_size, settings.positive_fraction, generator)
            scores.append(all_logits[image, torch.cat((positive, negative))])
            labels.append(torch.cat((torch.ones_like(positive), torch.zeros_like(negative))))
            targets = boxes[index[positive]]
            found = all_deltas[image, positive]
            distance = distance + self.coder.regression_loss(found, all_anchors[positive], targets, settings.beta)
        objectness = F.binary_cross_entropy_with_logits(
            torch.cat(scores), torch.cat(labels).to(all_logits.dtype), reduction="sum"
        )
        normalizer = settings.batch_size * len(truth)
        return {
            "loss_rpn_cls": objectness / normalizer * settings.cls_weight,
            "loss_rpn_loc": distance / normalizer * settings.loc_weight,
        }

    def _propose(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        settings, phase = self.settings, 0 if self.training else 1
        boxes, scores, levels = [], [], []
        for level, (level_anchors, level_logits, level_deltas) in enumerate(zip(anchors, logits, deltas)):
            best, index = level_logits.topk(min(settings.pre_nms[phase], level_logits.shape[1]), dim=1)
            rows = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode_rows(rows, level_anchors[index]))
            scores.append(best)
            levels.append(torch.full((best.shape[1],), level, device=best.device))
        all_boxes, all_scores, all_levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
        finite = torch.isfinite(all_boxes).all(dim=2) & torch.isfinite(all_scores)
        if self.training:
            broken = all_levels[~finite.all(dim=0)].unique().tolist()
            names = ", ".join(settings.in_features[level] for level in broken)
            raise_together(bool(names), all_boxes.device, f"the RPN's proposals, which are not finite on {names}")
        proposals = []
        for image, size in enumerate(sizes):
            found = clip(all_boxes[image], size)
            kept = torch.nonzero(finite[image] & larger_than(found, settings.min_size)).squeeze(1)
            found, score = found[kept], all_scores[image, kept]
            best = batched_nms(found, score, all_levels[kept], settings.nms_threshold)
            proposals.append(found[best[: settings.post_nms[phase]]])
        return proposals


def _inside(boxes: Tensor, size: tuple[int, int], margin: float) -> Tensor:
    height, width = size
    return (
        (boxes[:, 0] >= -margin)
        & (boxes[:, 1] >= -margin)
        & (boxes[:, 2] < width + margin)
        & (boxes[:, 3] < height + margin)
    )


def build_rpn(config: CfgNode, shapes: dict[str, Shape]) -> Rpn:
    """Return the proposal network of MODEL.RPN on levels of the given shapes."""
    rpn, generator = config.MODEL.RPN, config.MODEL.ANCHOR_GENERATOR
    levels = [shapes[name] for name in rpn.IN_FEATURES]
    if len({level.channels for level in levels}) != 1:
        raise UserError(
            "MODEL.RPN.IN_FEATURES: these levels have different numbers of channels, one head can't read all"
        )
    try:
        anchors = Anchors(
            generator.SIZES, generator.ASPECT_RATIOS, [level.stride for level in levels], generator.OFFSET
        )
    except ValueError as error:
        raise UserError(f"MODEL.ANCHOR_GENERATOR: {error}") from error
    settings = RpnSettings(
        in_features=list(rpn.IN_FEATURES),
        thresholds=list(rpn.IOU_THRESHOLDS),
        batch_size=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        boundary=rpn.BOUNDARY_THRESH,
        pre_nms=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        post_nms=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        nms_threshold=rpn.NMS_THRESH,
        min_size=config.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        beta=rpn.SMOOTH_L1_BETA,
        cls_weight=rpn.LOSS_WEIGHT,
        loc_weight=rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
    )
    head = RpnHead(levels[0].channels, anchors.per_cell, rpn.CONV_DIMS)
    return Rpn(head, anchors, Box2BoxTransform(tuple(rpn.BBOX_REG_WEIGHTS)), settings)
