"""BN-Inception, the student of the NST paper, under the timm name ``inception_bn``.

The network is that of Ioffe and Szegedy (2015, arXiv 1502.03167) with the widths that the NST authors' code and the
published Caffe weights have: 128 pooled channels in 4c and 4d, where the article's table has 96, so that 4c and 4d give
608 channels and 4e gives 1056.  The two pools of the stem are padded: maps have the article's sizes (56 and 28 pixels
for an image of 224), and their cells lie on multiples of the stride, as in a ResNet.

Where this differs from the NST authors' code: no batch normalization of the image itself (images come normalized), no
biases in convolutions (the batch normalization behind each has one), and their unpadded stem pools give 55 and 27
pixels in place of 56 and 28.  From 3c on the sizes agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import ConvNormAct, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

# of the authors' batch normalization
EPS = 2e-5
STEM_CHANNELS = {"conv1": 64, "conv2": 192}
# blocks that read the input through a 3 x 3 max-pool of stride 2
POOLED = ("conv2", "3a")
STRIDE16_TAPS = ("4a", "4b", "4c", "4d")


@dataclass(frozen=True)
class Widths:
    """Output channels of the convolutions of one block; a block without ``single`` and ``project`` halves the map."""

    # 1 x 1, then 3 x 3
    reduce: int
    conv: int
    # 1 x 1, then two of 3 x 3
    double_reduce: int
    double: int
    # the 1 x 1 alone
    single: int = 0
    # avg or max of 3 x 3, then 1 x 1; 0 hands the pooled input on
    pool: str = "max"
    project: int = 0

    def out(self, channels: int) -> int:
        """Channels that the block gives for an input of ``channels``."""
        return self.single + self.conv + self.double + (self.project or channels)


BLOCKS = {
    "3a": Widths(64, 64, 64, 96, 64, "avg", 32),
    "3b": Widths(64, 96, 64, 96, 64, "avg", 64),
    "3c": Widths(128, 160, 64, 96),
    "4a": Widths(64, 96, 96, 128, 224, "avg", 128),
    "4b": Widths(96, 128, 96, 128, 192, "avg", 128),
    "4c": Widths(128, 160, 128, 160, 160, "avg", 128),
    "4d": Widths(128, 192, 160, 192, 96, "avg", 128),
    "4e": Widths(128, 192, 192, 256),
    "5a": Widths(192, 320, 160, 224, 352, "avg", 128),
    "5b": Widths(192, 320, 192, 224, 352, "max", 128),
}


def _conv(channels: int, out: int, size: int = 1, stride: int = 1, act: bool = True) -> ConvNormAct:
    return ConvNormAct(channels, out, size, stride, padding=size // 2, apply_act=act, norm_kwargs={"eps": EPS})


class Inception(nn.Module):
    """Three or four branches, concatenated: (B, C, H, W) to a map before its ReLU, of half the size if it halves.

    The pooled input that a halving block hands on went through a ReLU already, which a second one leaves as it is.
    """

    def __init__(self, channels: int, widths: Widths) -> None:
        super().__init__()
        stride = 1 if widths.project else 2
        branches = []
        if widths.single:
            branches.append(nn.Sequential(_conv(channels, widths.single, act=False)))
        one = (_conv(channels, widths.reduce), _conv(widths.reduce, widths.conv, 3, stride, act=False))
        two = (
            _conv(channels, widths.double_reduce),
            _conv(widths.double_reduce, widths.double, 3),
            _conv(widths.double, widths.double, 3, stride, act=False),
        )
        pool = (nn.AvgPool2d if widths.pool == "avg" else nn.MaxPool2d)(3, stride, 1)
        project = [_conv(channels, widths.project, act=False)] if widths.project else []
        branches += [nn.Sequential(*one), nn.Sequential(*two), nn.Sequential(pool, *project)]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class InceptionBN(nn.Module):
    """BN-Inception by timm's conventions.

    Intermediate maps are the last ones of stride 2, 4, 8, 16 and 32: conv1, conv2, 3b, 4d and 5b.

    ``pre_activation_taps`` gives intermediate maps before their ReLU: True for all, or the blocks for which (``["5b"]``
    is what the NST authors' code compares); what the network computes stays the same.  ``stride16_tap`` is the block
    that gives the map of stride 16: 4a, 4b, 4c or 4d (the last one); the NST paper's detector reads 4b.  The rest is
    timm's.

    Example:
        >>> maps = InceptionBN().eval().forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
        >>> [tuple(map_.shape[1:]) for map_ in maps]
        [(64, 32, 32), (192, 16, 16), (320, 8, 8), (608, 4, 4), (1024, 2, 2)]
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pre_activation_taps: bool | Sequence[str] = False,
        stride16_tap: str = "4d",
    ) -> None:
        super().__init__()
        if stride16_tap not in STRIDE16_TAPS:
            taps = ", ".join(STRIDE16_TAPS)
            raise ValueError(f"inception_bn: stride16_tap must be one of {taps}, not {stride16_tap!r}")
        self.taps = ("conv1", "conv2", "3b", stride16_tap, "5b")
        if isinstance(pre_activation_taps, bool):
            pre_activation_taps = self.taps if pre_activation_taps else ()
        for name in set(pre_activation_taps) - set(self.taps):
            raise ValueError(f"inception_bn: pre_activation_taps names {name!r}; the taps are {', '.join(self.taps)}")
        self.pre_activation_taps = frozenset(pre_activation_taps)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate

        channels = STEM_CHANNELS["conv1"]
        self.blocks = nn.ModuleDict({"conv1": _conv(in_chans, channels, 7, 2, act=False)})
        second = {"reduce": _conv(channels, channels), "conv": _conv(channels, STEM_CHANNELS["conv2"], 3, act=False)}
        self.blocks["conv2"] = nn.Sequential(OrderedDict(second))
        widths = dict(STEM_CHANNELS)
        channels = widths["conv2"]
        for name, row in BLOCKS.items():
            self.blocks[name] = Inception(channels, row)
            channels = widths[name] = row.out(channels)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.act = nn.ReLU()
        self.feature_info = [
            {"num_chs": widths[name], "reduction": 2**power, "module": f"blocks.{name}"}
            for power, name in enumerate(self.taps, start=1)
        ]
        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal weights of variance 2 / (inputs of a unit), as in the NST authors' code."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _through(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map of one block before and after its ReLU."""
        before = self.blocks[name](self.pool(x) if name in POOLED else x)
        return before, self.act(before)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final map (B, 1024, H / 32, W / 32) after its ReLU and intermediate ones, by timm's conventions."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(len(self.taps), indices)
        wanted = {self.taps[index] for index in take}
        maps = []
        for name in self.blocks:
            before, x = self._through(name, x)
            if name in wanted:
                maps.append(before if name in self.pre_activation_taps else x)
            if stop_early and name == self.taps[last]:
                break
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the named intermediate maps don't need, by timm's conventions; return the indices that stay."""
        take, last = feature_take_indices(len(self.taps), indices)
        names = list(self.blocks)
        for name in names[names.index(self.taps[last]) + 1 :]:
            del self.blocks[name]
        cut = len(self.blocks) < len(names)
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return list(take)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A new classifier of ``num_classes`` with random weights; 0 removes it."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the map of 5b after its ReLU (B, 1024, H / 32, W / 32)."""
        for name in self.blocks:
            _, x = self._through(name, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of 5b to logits (B, K), or to the pooled vector (B, 1024) if ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# the rest is timm's defaults: 1000 classes, 224 pixels, ImageNet's mean and std
default_cfgs = generate_default_cfgs(
    {"inception_bn.untrained": {"pool_size": (7, 7), "first_conv": "blocks.conv1.conv", "classifier": "fc"}}
)


@register_model
def inception_bn(pretrained: bool = False, **kwargs: Any) -> InceptionBN:
    """The NST paper's student: 11.3 million parameters; no published weights, train it by stage one."""
    return build_model_with_cfg(
        InceptionBN, "inception_bn", pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs
    )
