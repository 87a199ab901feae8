"""Small networks for work on a CPU, under timm's own names: residual ones and multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from torch import Tensor, nn
from torch.nn import functional as F


class SmallStemResNet(ResNet):
    """timm's ResNet whose stem is one 3 x 3 convolution of stride 2, as wide as the first stage.

    ``layers`` are the basic blocks in each of the four stages; each stage doubles the ``width`` of the one before. The
    strides stay 4, 8, 16 and 32, so that a detector built on one is built like that on a ResNet-18.
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
        layer_types = {"act_layer": nn.ReLU, "norm_layer": nn.BatchNorm2d}
        blocks = (BasicBlock,) * 4
        stages, info = make_blocks(blocks, channels, layers, width, drop_path_rate=drop_path_rate, **layer_types)
        for name, stage in stages:
            self.add_module(name, stage)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "act1"}, *info]
        self.init_weights(zero_init_last=zero_init_last)


class MLP(nn.Module):
    """Images, averaged down to a small square and flattened, through hidden layers of one width.

    A hidden layer is linear, batch normalization and ReLU.  It offers what timm's models offer for feature extraction;
    its levels ``hidden1`` .. have no positions: as maps they are (B, width, 1, 1).
    """

    def __init__(
        self,
        width: int,
        depth: int = 3,
        img_size: int = 32,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if min(width, depth, img_size) < 1:
            raise ValueError(f"an MLP needs width, depth and img_size of at least 1, not {width}, {depth}, {img_size}")
        self.img_size, self.num_features, self.in_chans = img_size, width, in_chans
        inputs = [in_chans * img_size**2, *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()) for before in inputs
        )
        self.vector_levels = tuple(f"hidden{number + 1}" for number in range(depth))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new classifier; 0 classes leave the hidden vector as it is."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last hidden vector (B, width) and the hidden vectors as maps (B, width, 1, 1), as timm does."""
        if output_fmt != "NCHW":
            raise ValueError(f"an MLP gives its hidden vectors as NCHW, not {output_fmt}")
        depth = len(self.hidden)
        if indices is None or isinstance(indices, int):
            indices = range(depth)[-(indices or depth) :]
        wanted = [index % depth for index in indices]
        x = F.adaptive_avg_pool2d(x, self.img_size).flatten(1)
        maps = []
        for index, layer in enumerate(self.hidden):
            if stop_early and index > max(wanted):
                break
            x = layer(x)
            if index in wanted:
                maps.append(x[:, :, None, None])
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last hidden vector (B, width)."""
        features: Tensor = self.forward_intermediates(x, [])[0]
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last hidden vector (B, width) to logits (B, num_classes)."""
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# the rest is timm's defaults, ImageNet's mean and std among them
default_cfgs = generate_default_cfgs(
    {
        **{f"nst_resnet{name}": {"input_size": (3, 64, 64), "classifier": "fc"} for name in ("10_w32", "18_w48")},
        **{f"nst_mlp_w{width}": {"input_size": (3, 32, 32), "classifier": "head"} for width in (1024, 2048, 4096)},
    }
)


@register_model
def nst_resnet10_w32(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Student: one basic block a stage, 32 to 256 channels, 1.2 million parameters."""
    return build_model_with_cfg(SmallStemResNet, "nst_resnet10_w32", pretrained, layers=(1,) * 4, width=32, **kwargs)


@register_model
def nst_resnet18_w48(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Teacher: two basic blocks a stage, 48 to 384 channels, 6.3 million parameters."""
    return build_model_with_cfg(SmallStemResNet, "nst_resnet18_w48", pretrained, layers=(2,) * 4, width=48, **kwargs)


@register_model
def nst_mlp_w1024(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 1024 units on 32 x 32 pixels, 6.3 million parameters with 1000 classes."""
    return build_model_with_cfg(MLP, "nst_mlp_w1024", pretrained, width=1024, **kwargs)


@register_model
def nst_mlp_w2048(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 2048 units on 32 x 32 pixels, 16.7 million parameters with 1000 classes."""
    return build_model_with_cfg(MLP, "nst_mlp_w2048", pretrained, width=2048, **kwargs)


@register_model
def nst_mlp_w4096(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 4096 units on 32 x 32 pixels, 50.3 million parameters with 1000 classes."""
    return build_model_with_cfg(MLP, "nst_mlp_w4096", pretrained, width=4096, **kwargs)
