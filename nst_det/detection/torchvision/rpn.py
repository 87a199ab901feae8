"""The region proposal network (Ren et al. 2015, https://arxiv.org/abs/1506.01497)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.box_coder import (
    IGNORED,
    Anchors,
    BoxCoder,
    Generators,
    clip,
    larger_than,
    match,
    sample,
)
from nst_det.engine.nan_guard import require_finite
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


class Rpn(nn.Module):
    """Proposals, and in training the losses ``loss_rpn_cls`` and ``loss_rpn_loc``, on levels of the given shapes."""

    def __init__(self, config: CfgNode, shapes: dict[str, Shape]) -> None:
        super().__init__()
        # MODEL.RPN
        self.settings = settings = config.MODEL.RPN.clone()
        self.min_size, generator = config.MODEL.PROPOSAL_GENERATOR.MIN_SIZE, config.MODEL.ANCHOR_GENERATOR
        levels = [shapes[name] for name in settings.IN_FEATURES]
        if len({level.channels for level in levels}) != 1:
            raise UserError("MODEL.RPN.IN_FEATURES: these levels have different numbers of channels")
        try:
            strides = [level.stride for level in levels]
            self.anchors = Anchors(generator.SIZES, generator.ASPECT_RATIOS, strides, generator.OFFSET)
        except ValueError as error:
            raise UserError(f"MODEL.ANCHOR_GENERATOR: {error}") from error
        self.rpn_head = RpnHead(levels[0].channels, self.anchors.per_cell, settings.CONV_DIMS)
        self.coder = BoxCoder(tuple(settings.BBOX_REG_WEIGHTS))

    def forward(
        self,
        maps: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor] | None = None,
        generators: Generators = (),
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return (N, 4) proposals of each image, best first, and the losses, if ``truth`` has its (M, 4) objects.

        ``maps`` are (B, C, H, W) float32 by level; ``sizes`` (height, width) of each image without padding.
        """
        levels = [maps[name] for name in self.settings.IN_FEATURES]
        anchors = self.anchors(levels)
        logits, deltas = self.rpn_head(levels)
        losses = {} if truth is None else self.losses(anchors, logits, deltas, sizes, truth, generators)
        with torch.no_grad():
            return self.propose(anchors, logits, deltas, sizes), losses

    def losses(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor],
        generators: Generators = (),
    ) -> dict[str, Tensor]:
        """Return both losses; where there are no generators, torch's own draws the anchors to train on."""
        settings, all_anchors = self.settings, torch.cat(anchors)
        all_logits, all_deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)
        scores, labels = [], []
        distance = all_logits.new_zeros(())
        given = zip(truth, sizes, generators or itertools.repeat(None))
        for image, (boxes, (height, width), generator) in enumerate(given):
            index, label = match(boxes, all_anchors, settings.IOU_THRESHOLDS, (0, IGNORED, 1), low_quality=True)
            if settings.BOUNDARY_THRESH >= 0:
                margin = settings.BOUNDARY_THRESH
                begins_inside = (all_anchors[:, :2] >= -margin).all(dim=1)
                limits = all_anchors.new_tensor([width + margin, height + margin])
                label[~(begins_inside & (all_anchors[:, 2:] < limits).all(dim=1))] = IGNORED
            count = settings.BATCH_SIZE_PER_IMAGE
            positive, negative = sample(label, 0, count, settings.POSITIVE_FRACTION, generator)
            scores.append(all_logits[image, torch.cat((positive, negative))])
            labels.append(torch.cat((torch.ones_like(positive), torch.zeros_like(negative))))
            found, places, targets = all_deltas[image, positive], all_anchors[positive], boxes[index[positive]]
            distance = distance + self.coder.regression_loss(found, places, targets, settings.SMOOTH_L1_BETA)
        objectness = F.binary_cross_entropy_with_logits(
            torch.cat(scores), torch.cat(labels).to(all_logits.dtype), reduction="sum"
        )
        normalizer = settings.BATCH_SIZE_PER_IMAGE * len(truth)
        return {
            "loss_rpn_cls": objectness / normalizer * settings.LOSS_WEIGHT,
            "loss_rpn_loc": distance / normalizer * (settings.LOSS_WEIGHT * settings.BBOX_REG_LOSS_WEIGHT),
        }

    def propose(
        self, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the proposals; in training, those that are not finite in any process raise NotFinite in all."""
        settings, phase = self.settings, "TRAIN" if self.training else "TEST"
        before_nms, after_nms = settings[f"PRE_NMS_TOPK_{phase}"], settings[f"POST_NMS_TOPK_{phase}"]
        boxes, scores, levels = [], [], []
        for level, (level_anchors, level_logits, level_deltas) in enumerate(zip(anchors, logits, deltas)):
            best, index = level_logits.topk(min(before_nms, level_logits.shape[1]), dim=1)
            rows = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode_rows(rows, level_anchors[index]))
            scores.append(best)
            levels.append(torch.full((best.shape[1],), level, device=best.device))
        all_boxes, all_scores, all_levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
        finite = torch.isfinite(all_boxes).all(dim=2) & torch.isfinite(all_scores)
        if self.training:

            def broken() -> str:
                levels = all_levels[~finite.all(dim=0)].unique().tolist()
                names = ", ".join(settings.IN_FEATURES[level] for level in levels)
                return f"the RPN's proposals, which are not finite on {names}"

            require_finite(finite.all(), broken)
        proposals = []
        for image, size in enumerate(sizes):
            found = clip(all_boxes[image], size)
            kept = torch.nonzero(finite[image] & larger_than(found, self.min_size)).squeeze(1)
            found, score = found[kept], all_scores[image, kept]
            best = batched_nms(found, score, all_levels[kept], settings.NMS_THRESH)
            proposals.append(found[best[:after_nms]])
        return proposals
