"""The network below the heads: a timm bottom-up, alone or under a feature pyramid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from nst_det.engine.compilation import compiled
from nst_det.engine.keys import OFF
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.models import Bottomup
from nst_det.models.card import check_pixels, published_card


class Shape(NamedTuple):
    """Channels and stride (pixels) of a level."""

    channels: int
    stride: int


class BackboneOnly(Bottomup):
    """A timm bottom-up with the interface of :class:`Fpn`."""

    size_divisibility = 0

    @property
    def bottom_up(self) -> Bottomup:
        return self

    def output_shape(self) -> dict[str, Shape]:
        return {name: Shape(self.channels[name], self.strides[name]) for name in self.channels}


class Fpn(nn.Module):
    """Feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144), with ``p6`` picked from ``p5``."""

    def __init__(self, bottom_up: Bottomup, in_features: Sequence[str], channels: int, average: bool = False) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features, self.channels, self.average = list(in_features), channels, average
        strides = [bottom_up.strides[name] for name in in_features]
        if any(below * 2 != above for below, above in itertools.pairwise(strides)):
            raise ValueError(f"FPN levels {', '.join(in_features)}: each must have twice the stride of the one before")
        self.levels = [int(math.log2(stride)) for stride in strides]
        # images are padded to a multiple of it, so that every map is exactly twice the next
        self.size_divisibility = strides[-1]
        for level, name in zip(self.levels, in_features):
            self.add_module(f"fpn_lateral{level}", nn.Conv2d(bottom_up.channels[name], channels, 1))
            self.add_module(f"fpn_output{level}", nn.Conv2d(channels, channels, 3, padding=1))

    def initialize(self, seed: int) -> None:
        """Draw weights that don't depend on the bottom-up, except where its channels are the input's."""
        for kind in ("output", "lateral"):
            with seeded(seed, "init", f"fpn_{kind}"):
                for level in self.levels:
                    c2_xavier_fill(self.get_submodule(f"fpn_{kind}{level}"))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps (B, channels, H / stride, W / stride) of (B, 3, H, W) normalized images: ``p2`` .. ``p6``."""
        return self.pyramid(self.bottom_up(images))

    def pyramid(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return :meth:`forward` from the bottom-up's maps."""
        above: Tensor | None = None
        pyramid: dict[str, Tensor] = {}
        for level, name in zip(reversed(self.levels), reversed(self.in_features)):
            lateral: Tensor = self.get_submodule(f"fpn_lateral{level}")(maps[name])
            if above is not None:
                lateral = lateral + F.interpolate(above, scale_factor=2.0, mode="nearest")
                lateral = lateral / 2 if self.average else lateral
            above = lateral
            pyramid[f"p{level}"] = self.get_submodule(f"fpn_output{level}")(lateral)
        last = self.levels[-1]
        pyramid[f"p{last + 1}"] = F.max_pool2d(pyramid[f"p{last}"], kernel_size=1, stride=2)
        return dict(sorted(pyramid.items()))

    def output_shape(self) -> dict[str, Shape]:
        return {f"p{level}": Shape(self.channels, 2**level) for level in [*self.levels, self.levels[-1] + 1]}


def compile_backbone(
    backbone: BackboneOnly | Fpn, mode: str, device: torch.device, whose: str, when: Callable[[], bool] = lambda: True
) -> None:
    """Compile bottom-up and pyramid in place, each by itself: hooks on modules run between and around them."""
    if mode == OFF:
        return
    bottom_up = backbone.bottom_up
    bottom_up.forward = compiled(bottom_up.forward, mode, device, f"{whose} bottom-up", when)  # type: ignore[method-assign]
    if isinstance(backbone, Fpn):
        backbone.pyramid = compiled(backbone.pyramid, mode, device, f"{whose} FPN", when)  # type: ignore[method-assign]


def build_backbone(config: CfgNode, seed: int) -> BackboneOnly | Fpn:
    """Return the backbone of MODEL.BACKBONE and MODEL.TIMM, nothing frozen yet."""
    timm, fpn = config.MODEL.TIMM, config.MODEL.FPN
    pretrained = timm.PRETRAINED and not config.MODEL.WEIGHTS
    kind = Bottomup if config.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone" else BackboneOnly
    try:
        with seeded(seed, "init", "bottom_up"):
            bottom_up = kind(timm.ARCH, timm.OUT_FEATURES, dict(timm.KWARGS), pretrained=pretrained)
        if pretrained:
            card, pixels = published_card(bottom_up.model, timm.ARCH), config.MODEL
            check_pixels(card, pixels.PIXEL_MEAN, pixels.PIXEL_STD, config.INPUT.FORMAT, "MODEL.TIMM.PRETRAINED")
        if isinstance(bottom_up, BackboneOnly):
            bottom_up.check_map_sizes()
            return bottom_up
        with seeded(seed, "init", "fpn"):
            pyramid = Fpn(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, average=fpn.FUSE_TYPE == "avg")
        bottom_up.check_map_sizes(pyramid.size_divisibility)
    except ValueError as error:
        raise UserError(f"MODEL.TIMM: {error}") from error
    pyramid.initialize(seed)
    return pyramid
