"""The names of a residual network: torchvision's and timm's on one side, Detectron2's on the other.

Nothing here needs Detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nst_det.errors import UserError

# epsilon of every batch normalization that Detectron2 builds, FrozenBN too
DETECTRON2_EPS = 1e-5
_BLOCKS: dict[tuple[int, ...], dict[str, int]] = {
    (2, 2, 2, 2): {"basic": 18},
    (3, 4, 6, 3): {"basic": 34, "bottleneck": 50},
    (3, 4, 23, 3): {"bottleneck": 101},
    (3, 8, 36, 3): {"bottleneck": 152},
}
_LAYER = re.compile(r"layer(?P<layer>[1-4])\.(?P<block>\d+)\.(?P<rest>.+)")
_BLOCK_TO_DETECTRON2 = {
    r"conv([123])\.weight": r"conv\1.weight",
    r"bn([123])\.(weight|bias|running_mean|running_var)": r"conv\1.norm.\2",
    r"downsample\.0\.weight": r"shortcut.weight",
    r"downsample\.1\.(weight|bias|running_mean|running_var)": r"shortcut.norm.\1",
}
_BLOCK_FROM_DETECTRON2 = {
    r"conv([123])\.weight": r"conv\1.weight",
    r"conv([123])\.norm\.(\w+)": r"bn\1.\2",
    r"shortcut\.weight": r"downsample.0.weight",
    r"shortcut\.norm\.(\w+)": r"downsample.1.\1",
}
_SKIPPED = re.compile(r"fc\..*|.*\.num_batches_tracked|num_batches_tracked")


@dataclass(frozen=True)
class ResNetShape:
    """What Detectron2's ``MODEL.RESNETS`` must say for a state dict to fit."""

    depth: int
    groups: int
    width_per_group: int
    res2_channels: int
    stem_channels: int


def to_detectron2_name(name: str) -> str | None:
    """Detectron2's name of a torchvision/timm ResNet entry; None for what Detectron2 doesn't keep.

    Example:
        >>> to_detectron2_name("layer1.0.downsample.1.running_var")
        'res2.0.shortcut.norm.running_var'

    Raises:
        UserError: the name is not that of a plain ResNet.
    """
    if _SKIPPED.fullmatch(name):
        return None
    if name == "conv1.weight":
        return "stem.conv1.weight"
    if found := re.fullmatch(r"bn1\.(weight|bias|running_mean|running_var)", name):
        return f"stem.conv1.norm.{found[1]}"
    if (found := _LAYER.fullmatch(name)) and (rest := _renamed(found["rest"], _BLOCK_TO_DETECTRON2)):
        return f"res{int(found['layer']) + 1}.{found['block']}.{rest}"
    raise UserError(f"'{name}' is not a layer of a plain ResNet, so Detectron2's ResNet has no place for it")


def from_detectron2_name(name: str) -> str | None:
    """The torchvision/timm name of an entry of Detectron2's ResNet (without ``backbone.bottom_up.``).

    Example:
        >>> from_detectron2_name("res2.0.shortcut.norm.running_var")
        'layer1.0.downsample.1.running_var'

    Raises:
        UserError: the name is not that of Detectron2's ResNet.
    """
    if name.startswith("stem.fc") or name.startswith("linear.") or name.endswith("num_batches_tracked"):
        return None
    if name == "stem.conv1.weight":
        return "conv1.weight"
    if found := re.fullmatch(r"stem\.conv1\.norm\.(\w+)", name):
        return f"bn1.{found[1]}"
    found = re.fullmatch(r"res([2-5])\.(\d+)\.(.+)", name)
    if found and (rest := _renamed(found[3], _BLOCK_FROM_DETECTRON2)):
        return f"layer{int(found[1]) - 1}.{found[2]}.{rest}"
    raise UserError(f"'{name}' is not a layer of Detectron2's ResNet")


def _renamed(name: str, forms: Mapping[str, str]) -> str | None:
    return next((re.sub(pattern, form, name) for pattern, form in forms.items() if re.fullmatch(pattern, name)), None)


def resnet_to_detectron2(state_dict: Mapping[str, Tensor], eps: float = DETECTRON2_EPS) -> dict[str, Tensor]:
    """A torchvision/timm ResNet by Detectron2's names; the classifier is left out.

    Where the network's batch normalization has another epsilon than Detectron2's 1e-5, the difference goes into
    the running variance, so that the function computed in evaluation stays the same.

    Args:
        state_dict: the state dict of the classifier or of its bottom-up, without a prefix.
        eps: epsilon of its batch normalization.

    Raises:
        UserError: a name that Detectron2's ResNet has no place for.
    """
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        target = to_detectron2_name(name)
        if target is None:
            continue
        if name.endswith("running_var") and eps != DETECTRON2_EPS:
            value = value + (eps - DETECTRON2_EPS)
        out[target] = value.detach().clone()
    return out


def resnet_from_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, state dict to state dict; batch counters, which Detectron2's frozen layers lack, are set to 0."""
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        target = from_detectron2_name(name)
        if target is None:
            continue
        out[target] = value.detach().clone()
        if target.endswith("running_var"):
            out[f"{target.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    return out


def resnet_shape(state_dict: Mapping[str, Tensor]) -> ResNetShape:
    """Read depth, groups and widths off the state dict of a torchvision/timm ResNet.

    Raises:
        UserError: not a ResNet that Detectron2 can build (its depths are 18, 34, 50, 101 and 152).
    """
    names = set(state_dict)
    _refuse_other_stems(names)
    counts = tuple(_count_blocks(names, layer) for layer in (1, 2, 3, 4))
    kind = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
    depth = _BLOCKS.get(counts, {}).get(kind)
    if depth is None:
        raise UserError(
            f"a ResNet of {kind} blocks {list(counts)} can't be built by Detectron2's MODEL.RESNETS; its depths are "
            "18, 34, 50, 101 and 152. Use build_timm_fpn_backbone, which takes any timm network"
        )
    second = state_dict["layer1.0.conv2.weight"]
    groups = second.shape[0] // second.shape[1] if kind == "bottleneck" else 1
    last = state_dict["layer1.0.conv3.weight" if kind == "bottleneck" else "layer1.0.conv2.weight"]
    shape = ResNetShape(
        depth=depth,
        groups=groups,
        width_per_group=second.shape[0] // groups,
        res2_channels=last.shape[0],
        stem_channels=state_dict["conv1.weight"].shape[0],
    )
    stem = tuple(state_dict["conv1.weight"].shape[1:])
    if stem != (3, 7, 7):
        raise UserError(f"the stem's convolution is {stem}, Detectron2's is (3, 7, 7); use build_timm_fpn_backbone")
    if kind == "basic" and (shape.res2_channels, shape.stem_channels) != (64, 64):
        raise UserError(
            f"Detectron2 builds R-18 and R-34 64 channels wide, this one has {shape.res2_channels}; "
            "use build_timm_fpn_backbone"
        )
    return shape


def _refuse_other_stems(names: Iterable[str]) -> None:
    names = set(names)
    if "conv1.weight" not in names or "layer1.0.conv1.weight" not in names:
        raise UserError(
            "not a plain ResNet (no conv1 and layer1), so Detectron2's ResNet can't hold it; "
            "use build_timm_fpn_backbone"
        )


def _count_blocks(names: Iterable[str], layer: int) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"layer{layer}.")})
