"""ResNets as Caffe had them, which Detectron2's and mmdetection's zoos fine-tune: under timm's own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn


class CaffeResNet(ResNet):
    """timm's ResNet with a bottleneck's stride in its first convolution, for images in BGR, 0..255 (std 1)."""

    channel_order = "BGR"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Bottleneck, **kwargs)
        for block in self.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def is_caffe(arch: str) -> bool:
    """Return whether an architecture is one of these."""
    return arch.split(".")[0] in default_cfgs


def stride_in_1x1(network: nn.Module) -> bool:
    """Return whether a ResNet, timm's or Detectron2's, has the stride of a bottleneck in its first convolution."""
    # the first of other networks' blocks may be a block itself
    firsts = (block.conv1 for block in network.modules() if hasattr(block, "conv3"))
    return any(getattr(first, "stride", (1, 1)) != (1, 1) for first in firsts)


def is_resnext(theirs: Mapping[str, Tensor]) -> bool:
    """Return whether weights by Detectron2's names are those of grouped convolutions."""
    second = next((value for name, value in theirs.items() if name.endswith("res3.0.conv2.weight")), None)
    return second is not None and second.shape[0] != second.shape[1]


def check_stride(theirs: Mapping[str, Tensor], network: nn.Module) -> None:
    """Refuse (ValueError) bottlenecks by Detectron2's names in a network whose stride is, or may be, elsewhere.

    Names and shapes don't tell where it is: what is known is that of Detectron2's zoo.
    """
    if not any(name.endswith("res3.0.conv3.weight") for name in theirs):
        return
    grouped, caffe = is_resnext(theirs), stride_in_1x1(network)
    if grouped and caffe:
        raise ValueError("a ResNeXt of Detectron2 has its stride in the 3 x 3 convolution (STRIDE_IN_1X1 False)")
    if not grouped and not caffe:
        raise ValueError(
            "Detectron2's bottlenecks: the file doesn't say where their stride is. In R-50 and R-101 of its zoo it is "
            "in the first convolution (STRIDE_IN_1X1 True), as in nst_resnet50_caffe and nst_resnet101_caffe; if it "
            "was False, write them by timm's names first: nst-det convert --to timm for a detector, else "
            "nst_det.models.convert.resnet_from_detectron2"
        )


default_cfgs = generate_default_cfgs(
    {
        f"nst_resnet{depth}_caffe": {"mean": (0.406, 0.456, 0.485), "std": (1 / 255,) * 3, "first_conv": "conv1"}
        | {"classifier": "fc", "pool_size": (7, 7)}
        for depth in (50, 101)
    }
)


@register_model
def nst_resnet50_caffe(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 of Detectron2's zoo (MSRA's)."""
    return build_model_with_cfg(CaffeResNet, "nst_resnet50_caffe", pretrained, layers=(3, 4, 6, 3), **kwargs)


@register_model
def nst_resnet101_caffe(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101 of Detectron2's zoo (MSRA's)."""
    return build_model_with_cfg(CaffeResNet, "nst_resnet101_caffe", pretrained, layers=(3, 4, 23, 3), **kwargs)
