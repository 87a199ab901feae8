"""Small residual networks for work on a CPU, under timm's own names: ``nst_resnet10_w32``, ``nst_resnet18_w48``.

They are timm's ResNet with narrower stages and a cheaper stem: one 3 x 3 convolution of stride 2 in place of the
7 x 7 one.  The strides stay 4, 8, 16 and 32, so that a detector built on one is built like that on a ResNet-18.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import create_conv2d
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from torch import Tensor, nn
from torch.nn import functional as F


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


def _architecture(pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what of timm's arguments is the network's."""
    if pretrained:
        raise ValueError("the small networks and the MLPs have no pretrained weights; train them by stage one")
    others = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "scriptable")
    return {key: value for key, value in kwargs.items() if key not in others}


def _resnet(layers: tuple[int, int, int, int], width: int, pretrained: bool, kwargs: dict[str, Any]) -> ResNet:
    model = SmallStemResNet(layers, width, **_architecture(pretrained, kwargs))
    model.default_cfg = model.pretrained_cfg = _default_cfg()
    return model


@register_model
def nst_resnet10_w32(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Student: one basic block a stage, 32 to 256 channels, 1.2 million parameters."""
    return _resnet((1, 1, 1, 1), 32, pretrained, kwargs)


@register_model
def nst_resnet18_w48(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Teacher: two basic blocks a stage, 48 to 384 channels, 6.3 million parameters."""
    return _resnet((2, 2, 2, 2), 48, pretrained, kwargs)


class MLP(nn.Module):
    """Images, averaged down to a small square and flattened, through hidden layers of one width.

    It offers what timm's models offer for feature extraction.  Its levels ``hidden1`` .. have no positions: as maps
    they are (B, width, 1, 1).

    Args:
        width: units of each hidden layer (linear, batch normalization, ReLU).
        depth: hidden layers.
        img_size: side of the square that is flattened, in pixels.
        num_classes: classes of the classifier.
        in_chans: channels of the image.
        drop_rate: dropout probability before the classifier.
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
        self.img_size, self.num_features, self.num_classes, self.in_chans = img_size, width, num_classes, in_chans
        inputs = [in_chans * img_size**2, *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()) for before in inputs
        )
        self.vector_levels = tuple(f"hidden{number + 1}" for number in range(depth))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; 0 classes leave the hidden vector as it is."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
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
        """The last hidden vector (B, width) and the hidden vectors as maps (B, width, 1, 1), by timm's conventions.

        Raises:
            ValueError: another format than NCHW.
        """
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
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _mlp(width: int, pretrained: bool, kwargs: dict[str, Any]) -> MLP:
    model = MLP(width, **_architecture(pretrained, kwargs))
    config = {"url": "", "num_classes": 1000, "input_size": (3, model.img_size, model.img_size), "classifier": "head"}
    model.default_cfg = model.pretrained_cfg = config  # type: ignore[assignment]
    return model


@register_model
def nst_mlp_w1024(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 1024 units on 32 x 32 pixels, 6.3 million parameters with 1000 classes."""
    return _mlp(1024, pretrained, kwargs)


@register_model
def nst_mlp_w2048(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 2048 units on 32 x 32 pixels, 16.7 million parameters with 1000 classes."""
    return _mlp(2048, pretrained, kwargs)


@register_model
def nst_mlp_w4096(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 4096 units on 32 x 32 pixels, 50.3 million parameters with 1000 classes."""
    return _mlp(4096, pretrained, kwargs)
