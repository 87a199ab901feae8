"""Plain multilayer perceptrons as students of a convolutional teacher, under timm's own names: ``nst_mlp_w1024`` ...

VID's authors transfer from a WRN-40-2 to perceptrons of width 4096, 2048 and 1024 on CIFAR-10 (Ahn et al. 2019, arXiv
1904.05835).  Of theirs the widths alone could be read; depth and batch normalization are choices of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F


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
        """The hidden vectors as maps (B, width, 1, 1), as timm's models give theirs.

        Args:
            x: images (B, in_chans, H, W).
            indices: of the hidden layers; a number takes that many of the last ones, None all.
            norm: there is no other norm than the layers' own.
            stop_early: go no further than the last index.
            output_fmt: NCHW.
            intermediates_only: leave out the last hidden vector (B, width).

        Returns:
            The last hidden vector and the list of maps, or the list alone.

        Raises:
            ValueError: another format.
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


def _build(width: int, pretrained: bool, kwargs: dict[str, Any]) -> MLP:
    if pretrained:
        raise ValueError("the MLPs have no pretrained weights; train them by stage one")
    own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "scriptable")
    model = MLP(width, **{key: value for key, value in kwargs.items() if key not in own})
    config = {"url": "", "num_classes": 1000, "input_size": (3, model.img_size, model.img_size), "classifier": "head"}
    model.default_cfg = model.pretrained_cfg = config  # type: ignore[assignment]
    return model


@register_model
def nst_mlp_w1024(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 1024 units on 32 x 32 pixels, 6.3 million parameters with 1000 classes.

    Raises:
        ValueError: ``pretrained``, since no weights of it are published.
    """
    return _build(1024, pretrained, kwargs)


@register_model
def nst_mlp_w2048(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 2048 units on 32 x 32 pixels, 16.7 million parameters with 1000 classes.

    Raises:
        ValueError: ``pretrained``, since no weights of it are published.
    """
    return _build(2048, pretrained, kwargs)


@register_model
def nst_mlp_w4096(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Three hidden layers of 4096 units on 32 x 32 pixels, 50.3 million parameters with 1000 classes.

    Raises:
        ValueError: ``pretrained``, since no weights of it are published.
    """
    return _build(4096, pretrained, kwargs)
