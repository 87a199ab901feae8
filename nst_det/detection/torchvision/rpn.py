"""The region proposal network (Ren et al. 2015, https://arxiv.org/abs/1506.01497)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.batch import Truth
from nst_det.detection.torchvision.box_coder import Anchors, BoxCoder, clip, larger_than
from nst_det.detection.torchvision.nms import kept_by_nms
from nst_det.detection.torchvision.sampling import IGNORED, match, random_keys, sample
from nst_det.engine.nan_guard import require_finite
from nst_det.errors import UserError

# sizes of maps whose anchors are kept
MOST_SIZES = 16


class Grid(NamedTuple):
    """What maps of one size have in common."""

    # (N, 4) of all levels, one after the other
    anchors: Tensor
    # (cells, 9) of each cell of all levels the cells around it, row by row; number ``cells`` is outside of all maps
    around: Tensor


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

    @property
    def is_local(self) -> bool:
        """Whether an output depends on the nine cells around it alone, see :meth:`at`."""
        return not isinstance(self.conv, nn.Sequential)

    def at(self, maps: Sequence[Tensor], around: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, R) and deltas (B, R, 4) at some anchors (B, R) of all levels.

        They are those of :meth:`forward`.  But few anchors are trained on, and where the gradient comes from these
        alone the convolution's passes back are products of their number, not of the maps' size.
        """
        per_cell, (images, count) = self.objectness_logits.out_channels, places.shape
        channels = maps[0].shape[1]
        outside = maps[0].new_zeros(images, 1, channels)
        cells = torch.cat([*(map_.flatten(2).transpose(1, 2) for map_ in maps), outside], dim=1)
        first = torch.arange(images, device=places.device)[:, None, None] * cells.shape[1]
        nine = cells.flatten(0, 1).index_select(0, (around[places // per_cell] + first).flatten())
        conv = self.conv
        assert isinstance(conv, nn.Conv2d), "see is_local"
        hidden = F.relu(F.linear(nine.view(-1, 9 * channels), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias))
        logits, deltas = (
            F.linear(hidden, layer.weight.flatten(1), layer.bias).view(images, count, per_cell, -1)
            for layer in (self.objectness_logits, self.anchor_deltas)
        )
        of_cell = (places % per_cell)[..., None, None]
        return logits.gather(2, of_cell)[..., 0, 0], deltas.gather(2, of_cell.expand(-1, -1, -1, 4))[:, :, 0]


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
            if generator.NAME == "RoundedAnchorGenerator":
                for cell in self.anchors.buffers():
                    cell.round_()
        except ValueError as error:
            raise UserError(f"MODEL.ANCHOR_GENERATOR: {error}") from error
        self.rpn_head = RpnHead(levels[0].channels, self.anchors.per_cell, settings.CONV_DIMS)
        self.coder = BoxCoder(settings.BBOX_REG_WEIGHTS)
        self._grids: dict[tuple[torch.device, tuple[torch.Size, ...]], Grid] = {}

    def forward(
        self, maps: dict[str, Tensor], limits: Tensor, truth: Truth | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (B, P, 4) proposals, best first, (B, P) whether there are as many, and the losses if there is truth.

        ``maps`` are (B, C, H, W) by level; ``limits`` (B, 4) of the images without padding, see ``clip``.
        """
        levels = [maps[name] for name in self.settings.IN_FEATURES]
        grid = self.grid(levels)
        losses: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and truth is not None and not self.rpn_head.is_local):
            logits, deltas = self.rpn_head(levels)
        if truth is not None:
            places, positive, drawn, targets = self.choose(grid, limits, truth)
            if self.rpn_head.is_local:
                scores, moves = self.rpn_head.at(levels, grid.around, places)
            else:
                scores = torch.cat(logits, dim=1).gather(1, places)
                moves = torch.cat(deltas, dim=1).gather(1, places[..., None].expand(-1, -1, 4))
            losses = self.losses(scores.float(), moves.float(), grid.anchors[places], targets, positive, drawn)
        with torch.no_grad():
            return *self.propose(grid, logits, deltas, limits), losses

    def grid(self, maps: Sequence[Tensor]) -> Grid:
        """Return what depends on the maps' sizes alone; that of the last sizes is kept."""
        key = maps[0].device, tuple(map_.shape[-2:] for map_ in maps)
        if key not in self._grids:
            if len(self._grids) == MOST_SIZES:
                del self._grids[next(iter(self._grids))]
            around, cells = [], 0
            outside = sum(map_.shape[-2:].numel() for map_ in maps)
            for map_ in maps:
                height, width = map_.shape[-2:]
                own = torch.arange(cells, cells + height * width, device=map_.device).view(height, width)
                padded = F.pad(own, (1, 1, 1, 1), value=outside)
                around.append(padded.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
                cells += height * width
            self._grids[key] = Grid(torch.cat(self.anchors(maps)), torch.cat(around))
        return self._grids[key]

    @torch.no_grad()
    def choose(self, grid: Grid, limits: Tensor, truth: Truth) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw anchors to train on: (B, R) their places, whether objects, whether drawn; (B, R, 4) the objects' boxes.

        Where there is no object the anchor's own box takes its place.
        """
        settings, anchors = self.settings, grid.anchors
        index, label = match(
            truth.boxes, truth.real, anchors, settings.IOU_THRESHOLDS, (0, IGNORED, 1), low_quality=True
        )
        if settings.BOUNDARY_THRESH >= 0:
            margin = settings.BOUNDARY_THRESH
            inside = (anchors[:, :2] >= -margin).all(dim=1) & (anchors[:, 2:] < limits[:, None, 2:] + margin).all(dim=2)
            label = torch.where(inside, label, IGNORED)
        keys = random_keys(truth.seeds[:, :2], len(anchors))
        count, fraction = settings.BATCH_SIZE_PER_IMAGE, settings.POSITIVE_FRACTION
        places, drawn = sample(label == 1, label == 0, count, fraction, keys)
        positive = drawn & (label.gather(1, places) == 1)
        objects = truth.boxes.gather(1, index.gather(1, places)[..., None].expand(-1, -1, 4))
        return places, positive, drawn, torch.where(positive[..., None], objects, anchors[places])

    def losses(
        self, scores: Tensor, moves: Tensor, anchors: Tensor, targets: Tensor, positive: Tensor, drawn: Tensor
    ) -> dict[str, Tensor]:
        """Return both losses of scores (B, R) and moves (B, R, 4) at chosen anchors, see :meth:`choose`."""
        settings = self.settings
        objectness = F.binary_cross_entropy_with_logits(scores, positive.float(), drawn.float(), reduction="sum")
        distances = self.coder.distances(moves, anchors, targets, settings.SMOOTH_L1_BETA)
        distance = torch.where(positive, distances, 0.0).sum()
        normalizer = settings.BATCH_SIZE_PER_IMAGE * len(scores)
        return {
            "loss_rpn_cls": objectness * (settings.LOSS_WEIGHT / normalizer),
            "loss_rpn_loc": distance * (settings.LOSS_WEIGHT * settings.BBOX_REG_LOSS_WEIGHT / normalizer),
        }

    def propose(self, grid: Grid, logits: list[Tensor], deltas: list[Tensor], limits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the proposals and whether there are as many; in training they are required to be finite."""
        settings, phase = self.settings, "TRAIN" if self.training else "TEST"
        before_nms, after_nms = settings[f"PRE_NMS_TOPK_{phase}"], settings[f"POST_NMS_TOPK_{phase}"]
        most = min(before_nms, max(row.shape[1] for row in logits))
        scores, places, start = [], [], 0
        for row in logits:
            best, place = row.topk(min(before_nms, row.shape[1]), dim=1)
            missing = most - best.shape[1]
            # smaller levels are filled up with anchors that are none
            scores.append(F.pad(best, (0, missing)) if missing else best)
            places.append(F.pad(place + start, (0, missing), value=-1) if missing else place + start)
            start += row.shape[1]
        # (B, levels, most)
        all_scores, all_places = torch.stack(scores, dim=1).float(), torch.stack(places, dim=1)
        real, all_places = all_places >= 0, all_places.clamp(min=0).flatten(1)
        moves = torch.cat(deltas, dim=1).gather(1, all_places[..., None].expand(-1, -1, 4)).float()
        boxes = self.coder.decode_rows(moves, grid.anchors[all_places]).unflatten(1, real.shape[1:])
        finite = torch.isfinite(torch.cat((boxes, all_scores[..., None]), dim=-1)).all(dim=-1) | ~real
        if self.training:

            def broken() -> str:
                ends_well = finite.transpose(0, 1).flatten(1).all(dim=1).tolist()
                names = [name for name, well in zip(settings.IN_FEATURES, ends_well) if not well]
                return f"the RPN's proposals, which are not finite on {', '.join(names)}"

            require_finite(finite.all(), broken)
        boxes = clip(boxes, limits[:, None, None])
        valid = real & finite & larger_than(boxes, self.min_size)
        kept = kept_by_nms(boxes.flatten(0, 1), valid.flatten(0, 1), settings.NMS_THRESH).view_as(valid)
        best, order = torch.where(kept, all_scores, -torch.inf).flatten(1).sort(dim=1, descending=True, stable=True)
        chosen = order[:, :after_nms, None].expand(-1, -1, 4)
        return boxes.flatten(1, 2).gather(1, chosen), best[:, :after_nms] > -torch.inf
