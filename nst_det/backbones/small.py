"""Small residual networks for work on a CPU, under timm's own names: ``nst_resnet10_w32``, ``nst_resnet18_w48``.

They are timm's ResNet with narrower stages and a cheaper stem: one 3 x 3 convolution of stride 2 in place of the
7 x 7 one.  The strides stay 4, 8, 16 and 32, so that a detector built on one is built like that on a ResNet-18.
"""

from __future__ import annotations

from typing import Any

from timm.layers import create_conv2d
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from torch import nn


class SmallStemResNet(ResNet):
    """timm's ResNet whose stem is one 3 x 3 convolution of stride 2, as wide as the first stage.

    Args:
        layers: basic blocks in each of the four stages.
        width: channels of the first stage; each next stage doubles them.
        num_classes: classes of the classifier.
        in_chans: channels of the image.
        drop_rate: dropout probability before the classifier.
        drop_path_rate: stochastic depth of the last block, falling linearly to 0 at the first.
        zero_init_last: start each block as the identity.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        width: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        channels = tuple(width * 2**stage for stage in range(4))
        super().__init__(
            BasicBlock, layers, num_classes=num_classes, in_chans=in_chans, channels=channels, drop_rate=drop_rate
        )
        # timm fixes the width of its plain stem at 64, so the stem and what is built on its width are made again
        self.conv1 = create_conv2d(in_chans, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, info = make_blocks(
            (BasicBlock,) * 4,
            channels,
            layers,
            width,
            drop_path_rate=drop_path_rate,
            act_layer=nn.ReLU,
            norm_layer=nn.BatchNorm2d,
        )
        for name, stage in stages:
            self.add_module(name, stage)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "act1"}, *info]
        self.init_weights(zero_init_last=zero_init_last)


def _default_cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 64, 64),
        "pool_size": (2, 2),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
    }


def _build(layers: tuple[int, int, int, int], width: int, pretrained: bool, kwargs: dict[str, Any]) -> ResNet:
    if pretrained:
        raise ValueError("the small networks have no pretrained weights; train them by stage one")
    own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "scriptable")
    model = SmallStemResNet(layers, width, **{key: value for key, value in kwargs.items() if key not in own})
    model.default_cfg = model.pretrained_cfg = _default_cfg()
    return model


@register_model
def nst_resnet10_w32(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Student: one basic block a stage, 32 to 256 channels, 1.2 million parameters.

    Raises:
        ValueError: ``pretrained``, since no weights of it are published.
    """
    return _build((1, 1, 1, 1), 32, pretrained, kwargs)


@register_model
def nst_resnet18_w48(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Teacher: two basic blocks a stage, 48 to 384 channels, 6.3 million parameters.

    Raises:
        ValueError: ``pretrained``, since no weights of it are published.
    """
    return _build((2, 2, 2, 2), 48, pretrained, kwargs)
