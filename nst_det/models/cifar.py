"""The networks of the papers' experiments on CIFAR and MNIST, for images of about 32 x 32, under timm names.

- ``nst_wrn16_1``, ``nst_wrn16_2``, ``nst_wrn40_1``, ``nst_wrn40_2``, and ``nst_wrn`` of any depth and width: wide
  residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146), VID's teacher and students.
- ``nst_preact_resnet110`` and ``nst_preact_resnet1001`` (He et al. 2016, arXiv 1603.05027), the latter NST's teacher.
- ``nst_inception_bn_32``: NST's student is a simplified Inception-BN whose last layer is in5b.  No source at hand says
  more; ours is the one that MXNet, which its authors used, calls by these names.  Its pools are padded like its
  convolutions.
- ``nst_plain1`` .. ``nst_plain4`` and ``nst_plain_teacher``, LP's students and teacher: widths and pools as a
  re-implementation has them, the students' being those of FitNets (Romero et al. 2015, arXiv 1412.6550), with maxout of
  two pieces and 500 hidden units as there.  Ours: batch normalization before maxout, no dropout, and of the teacher the
  3 x 3 kernels and pools of 4 x 4 that halve a map (of stride 4 they would leave nothing of 32 pixels).

Their levels have the sources' names (``conv1`` .. ``conv4``, ``3b``, ``4d``, ``5b``) and begin at stride 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class StagedNet(nn.Module):
    """Stages, each of which gives a level by its name, and a classifier on their pooled end, by timm's conventions.

    ``neck`` comes before pooling to ``grid`` x ``grid`` (an average, or the largest where ``hidden`` follows), and
    ``hidden`` between this and the linear classifier.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        widths: Sequence[int],
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        neck: nn.Module | None = None,
        hidden: nn.Module | None = None,
        grid: int = 1,
        num_features: int = 0,
    ) -> None:
        super().__init__()
        self.in_chans, self.level_names = in_chans, tuple(stages)
        self.stages = nn.ModuleDict(stages)
        self.neck, self.hidden = neck or nn.Identity(), hidden or nn.Identity()
        self.pool = nn.AdaptiveMaxPool2d(grid) if hidden else nn.AdaptiveAvgPool2d(grid)
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features = self.head_hidden_size = num_features or widths[-1]
        self.feature_info = [
            {"num_chs": width, "module": f"stages.{name}"} for name, width in zip(self.level_names, widths)
        ]
        self.reset_classifier(num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier of ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final map (B, C, h, w) and the ends of the stages at ``indices``, by timm's conventions."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps are given as NCHW, not {output_fmt}")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for index, stage in enumerate(self.stages.values()):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in take:
                maps.append(x)
        return maps if intermediates_only else (self.neck(x), maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the final map (B, C, h, w)."""
        for stage in self.stages.values():
            x = stage(x)
        features: Tensor = self.neck(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The final map to logits (B, num_classes), or to what enters the classifier if ``pre_logits``."""
        x = self.head_drop(self.hidden(self.pool(x).flatten(1)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PreActBlock(nn.Module):
    """Two convolutions of 3 x 3, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, each behind its normalization and ReLU.

    Where the size changes, the shortcut is a convolution of what the first ReLU gives.
    """

    def __init__(self, channels: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        inner = out // 4
        rows = [(1, inner, 1), (3, inner, stride), (1, out, 1)] if bottleneck else [(3, out, stride), (3, out, 1)]
        inputs = [channels, *(width for _, width, _ in rows)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in inputs[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, kernel, step, kernel // 2, bias=False)
            for before, (kernel, width, step) in zip(inputs, rows)
        )
        changes = channels != out or stride > 1
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            x = norm(x).relu()
            if index == 0 and self.shortcut is not None:
                shortcut = self.shortcut(x)
            x = conv(x)
        return x + shortcut


class PreActResNet(StagedNet):
    """A 3 x 3 convolution of 16 channels, then three groups of ``blocks``, of 16, 32 and 64 channels times ``width``.

    Levels: the convolution (``conv1``) and the sums at the end of each group (``conv2``, ``conv3``, ``conv4``), which
    the next group, or the classifier, normalizes first.
    """

    def __init__(
        self,
        blocks: int,
        width: int = 1,
        bottleneck: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        widths = [16, *(16 * 2**group * width for group in range(3))]
        stages: dict[str, nn.Module] = {"conv1": nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)}
        for group, (channels, out) in enumerate(itertools.pairwise(widths)):
            first = PreActBlock(channels, out, 2 if group else 1, bottleneck)
            rest = (PreActBlock(out, out, 1, bottleneck) for _ in range(blocks - 1))
            stages[f"conv{group + 2}"] = nn.Sequential(first, *rest)
        neck = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
        super().__init__(stages, widths, num_classes, in_chans, drop_rate, neck)


class Concat(nn.ModuleList):
    """Branches that read the same map, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


# blocks of each stage: channels of the 1 x 1 and the 3 x 3 branch; a block without the former halves the map
INCEPTION = {
    "3b": {"3a": (32, 32), "3b": (32, 48)},
    "4d": {"3c": (0, 80), "4a": (112, 48), "4b": (96, 64), "4c": (80, 80), "4d": (48, 96)},
    "5b": {"4e": (0, 96), "5a": (176, 160), "5b": (176, 160)},
}


class InceptionBN32(StagedNet):
    """A 3 x 3 convolution of 96 channels, then blocks of two branches; levels ``3b``, ``4d`` and ``5b``."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        stages: dict[str, nn.Module] = {}
        widths: list[int] = []
        channels = 96
        for stage, blocks in INCEPTION.items():
            made = nn.Sequential()
            if not widths:
                made.add_module("conv1", ConvNormAct(in_chans, channels, 3))
            for name, (single, conv) in blocks.items():
                branches = [ConvNormAct(channels, single), ConvNormAct(channels, conv, 3)] if single else []
                halving = [ConvNormAct(channels, conv, 3, stride=2), nn.MaxPool2d(3, 2, 1)]
                made.add_module(name, Concat(branches or halving))
                channels = conv + (single or channels)
            stages[stage] = made
            widths.append(channels)
        super().__init__(stages, widths, num_classes, in_chans, drop_rate)


class Maxout(nn.Module):
    """The larger of each pair of channels: (B, 2 C, ...) to (B, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


class PlainNet(StagedNet):
    """Three stages of 3 x 3 convolutions with maxout, ``pool`` x ``pool`` between them, then 500 hidden units.

    The last map is pooled to ``grid`` x ``grid``; levels ``conv1``, ``conv2`` and ``conv3`` come before pooling.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        pool: int = 2,
        grid: int = 1,
        hidden: int = 500,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        stages: dict[str, nn.Module] = {}
        channels = in_chans
        for number, row in enumerate(widths, start=1):
            layers: list[nn.Module] = [nn.MaxPool2d(pool, 2, pool // 2 - 1)] if stages else []
            for width in row:
                conv = nn.Conv2d(channels, 2 * width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(2 * width), Maxout()]
                channels = width
            stages[f"conv{number}"] = nn.Sequential(*layers)
        units = nn.Sequential(nn.Linear(channels * grid**2, 2 * hidden), nn.BatchNorm1d(2 * hidden), Maxout())
        ends = [row[-1] for row in widths]
        super().__init__(stages, ends, num_classes, in_chans, drop_rate, None, units, grid, hidden)


PLAIN: dict[str, dict[str, Any]] = {
    "nst_plain1": {"widths": ([16] * 3, [32] * 3, [48, 48, 64])},
    "nst_plain2": {"widths": ([16, 32, 32], [48, 64, 80], [96, 96, 128])},
    "nst_plain3": {"widths": ([32, 48, 64, 64], [80] * 4, [128] * 3)},
    "nst_plain4": {"widths": ([32] * 3 + [48] * 2, [80] * 6, [128] * 6)},
    "nst_plain_teacher": {"widths": ([96], [96], [96]), "pool": 4, "grid": 4},
}
RESIDUAL = ["nst_wrn", "nst_wrn16_1", "nst_wrn16_2", "nst_wrn40_1", "nst_wrn40_2"]
RESIDUAL += ["nst_preact_resnet110", "nst_preact_resnet1001"]

# the rest is timm's defaults, ImageNet's mean and std among them
default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, 32, 32), "classifier": "fc"} for name in (*RESIDUAL, "nst_inception_bn_32", *PLAIN)}
)


def _wrn(name: str, pretrained: bool, depth: int, width: int, **kwargs: Any) -> PreActResNet:
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"a WRN's depth is 6 n + 4 (10, 16, 22, ...) and its width at least 1, not {depth}, {width}")
    return build_model_with_cfg(PreActResNet, name, pretrained, blocks=(depth - 4) // 6, width=width, **kwargs)


@register_model
def nst_wrn(pretrained: bool = False, depth: int = 28, width: int = 10, **kwargs: Any) -> PreActResNet:
    """WRN-``depth``-``width``: depth 6 n + 4, and 16, 32 and 64 channels times width."""
    return _wrn("nst_wrn", pretrained, depth, width, **kwargs)


@register_model
def nst_wrn16_1(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-16-1, 0.17 million parameters with 10 classes."""
    return _wrn("nst_wrn16_1", pretrained, 16, 1, **kwargs)


@register_model
def nst_wrn16_2(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-16-2, 0.69 million parameters with 10 classes."""
    return _wrn("nst_wrn16_2", pretrained, 16, 2, **kwargs)


@register_model
def nst_wrn40_1(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-40-1, 0.56 million parameters with 10 classes."""
    return _wrn("nst_wrn40_1", pretrained, 40, 1, **kwargs)


@register_model
def nst_wrn40_2(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-40-2, 2.2 million parameters with 10 classes."""
    return _wrn("nst_wrn40_2", pretrained, 40, 2, **kwargs)


@register_model
def nst_preact_resnet110(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-110: 18 blocks a group, 1.7 million parameters with 10 classes."""
    return build_model_with_cfg(PreActResNet, "nst_preact_resnet110", pretrained, blocks=18, **kwargs)


@register_model
def nst_preact_resnet1001(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-1001: 111 bottlenecks a group, 64 to 256 channels, 10.2 million weights of convolutions."""
    size = {"blocks": 111, "width": 4, "bottleneck": True}
    return build_model_with_cfg(PreActResNet, "nst_preact_resnet1001", pretrained, **size, **kwargs)


@register_model
def nst_inception_bn_32(pretrained: bool = False, **kwargs: Any) -> InceptionBN32:
    """Inception-BN simplified for small images, 336 channels at its end, 1.7 million parameters with 10 classes."""
    return build_model_with_cfg(InceptionBN32, "nst_inception_bn_32", pretrained, **kwargs)


@register_model
def nst_plain1(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """LP's student 1 (FitNet-1): 9 convolutions, 0.25 million parameters with 10 classes."""
    return build_model_with_cfg(PlainNet, "nst_plain1", pretrained, **PLAIN["nst_plain1"], **kwargs)


@register_model
def nst_plain2(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """LP's student 2 (FitNet-2): 9 convolutions, 0.87 million parameters with 10 classes."""
    return build_model_with_cfg(PlainNet, "nst_plain2", pretrained, **PLAIN["nst_plain2"], **kwargs)


@register_model
def nst_plain3(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """LP's student 3 (FitNet-3): 11 convolutions, 1.5 million parameters with 10 classes."""
    return build_model_with_cfg(PlainNet, "nst_plain3", pretrained, **PLAIN["nst_plain3"], **kwargs)


@register_model
def nst_plain4(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """LP's student 4 (FitNet-4): 17 convolutions, 2.6 million parameters with 10 classes."""
    return build_model_with_cfg(PlainNet, "nst_plain4", pretrained, **PLAIN["nst_plain4"], **kwargs)


@register_model
def nst_plain_teacher(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """LP's teacher: 3 convolutions of 96 channels."""
    return build_model_with_cfg(PlainNet, "nst_plain_teacher", pretrained, **PLAIN["nst_plain_teacher"], **kwargs)
