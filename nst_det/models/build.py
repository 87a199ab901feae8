"""timm is the zoo: students and teachers by their timm names."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nst_det.errors import UserError
from nst_det.losses import ModelOutputs
from nst_det.models import caffe, cifar, inception_bn, small  # noqa: F401 (registers these networks in timm)
from nst_det.models.hub import near_names, weights_file

# timm's arguments that load weights or read files: an architecture from a card must never reach them
NOT_ARCHITECTURE = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("features_only", "scriptable", "exportable", "no_jit", "num_classes"),
)
LARGEST_NUMBER = 1 << 16
# the values of Detectron2's MODEL.RESNETS.NORM that mean batch normalization
NORM_POLICIES = {"FrozenBN": "frozen", "BN": "train", "SyncBN": "sync"}
# stride 4, 8, 16, 32
LEVELS = ("res2", "res3", "res4", "res5")
PROBE_SIZE = 64
# sides of an image that no stride divides, in pixels
ODD_SIZE = (193, 257)


def create_model(arch: str, num_classes: int, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    """A timm model with a classifier of ``num_classes``.

    Args:
        arch: a timm name, also with a tag (``resnet18``, ``resnet18.a1_in1k``, ``nst_resnet10_w32``).
        num_classes: classes of the classifier.
        pretrained: take timm's published weights (they are downloaded on first use).
        kwargs: architecture arguments of that timm model.

    Raises:
        ValueError: unknown architecture, arguments that it doesn't take, or no pretrained weights to be had.
    """
    check_arch(arch, kwargs)
    if not 0 <= num_classes <= 1_000_000:
        raise ValueError(f"{num_classes} classes asked of {arch}; use 1 to 1000000")
    if pretrained and not timm.is_model_pretrained(arch):
        raise ValueError(f"timm has no published weights of {arch}; name a file of weights, or set PRETRAINED False")
    published: dict[str, Any] = {"pretrained_cfg_overlay": {"file": published_file(arch)}} if pretrained else {}
    try:
        return timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **published, **kwargs)
    except (TypeError, LookupError, AssertionError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{arch} doesn't take these arguments: {kwargs} ({first_line(error)})") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"no pretrained weights for {arch} could be obtained ({first_line(error)}); connect to the internet "
            "once, or name a file of weights"
        ) from error


def published_file(arch: str) -> str | None:
    """Return the file of timm's published weights, None where timm itself gets it; a ValueError if it can't be had."""
    known = timm.get_pretrained_cfg(arch) if timm.is_model_pretrained(arch) else None
    if known is None or not known.hf_hub_id or known.custom_load:
        return None
    try:
        return str(weights_file(arch, known.hf_hub_id))
    except UserError as error:
        raise ValueError(str(error)) from error


def check_arch(arch: str, arch_kwargs: Mapping[str, Any]) -> None:
    """Refuse what isn't a plain timm name with plain arguments: numbers, text and lists of such."""
    base = arch.split(".")[0]
    # the check also keeps out timm's "hf-hub:" and "local-dir:" names, which fetch and read files
    if not timm.is_model(base) or ":" in arch or "/" in arch:
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ValueError(f"unknown architecture '{arch[:80]}'; {hint}")
    if arch != base and not timm.is_model_pretrained(arch):
        raise ValueError(f"'{arch[:80]}' isn't published by timm; {near_names(arch)}")
    for key, value in arch_kwargs.items():
        if key in NOT_ARCHITECTURE:
            raise ValueError(f"architecture argument '{key}' is not allowed; leave it out")
        for item in value if isinstance(value, list | tuple) else [value]:
            too_large = isinstance(item, int | float) and abs(item) > LARGEST_NUMBER
            if too_large or not isinstance(item, bool | int | float | str | None):
                raise ValueError(f"architecture argument '{key}' must be a number up to {LARGEST_NUMBER}, text or list")


def count_parameters(model: nn.Module) -> int:
    """Number of the ``model``'s trainable and frozen parameters; buffers don't count."""
    return sum(parameter.numel() for parameter in model.parameters())


def batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield all batch normalization layers by name, timm's with a built-in activation included."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield name, layer


@dataclass(frozen=True)
class LevelInfo:
    """Where a level is: its index in ``forward_intermediates``, its stride in pixels and its channels.

    Stride 0 is a vector: a map (B, channels, 1, 1) without positions, such as a hidden layer of an MLP.  ``of_stride``
    is that of the network's own map where the level is made of it, at another size.
    """

    index: int
    stride: int
    channels: int
    of_stride: int = 0

    def resized(self, map_: Tensor) -> Tensor:
        """Return the network's map (B, C, H, W) at the level's size."""
        if not self.of_stride:
            return map_
        if self.stride < self.of_stride:
            return F.interpolate(map_, scale_factor=self.of_stride / self.stride, mode="bilinear")
        return F.max_pool2d(map_, self.stride // self.of_stride, ceil_mode=True)


def feature_levels(model: nn.Module) -> dict[str, LevelInfo]:
    """The levels of a timm model: the last map of stride 4, 8, 16 and 32, as far as it has them.

    A transformer of one stride (ViT) has the map of each of its blocks too, ``block1`` and so on, and of its last map,
    as Li et al. 2022 (https://arxiv.org/abs/2203.16527) but without weights, one of half the stride and one of twice
    that: a teacher's, since a detector's bottom-up wants maps of the network's own.

    A model with ``vector_levels`` gives its hidden vectors by these names instead, with stride 0, and one with
    ``level_names`` all its maps by these names.  A black image is sent through the model once, in evaluation mode and
    without gradients; the model is left as it was.

    Args:
        model: a timm model with ``forward_intermediates``.

    Raises:
        ValueError: the model gives no intermediate maps, or none at these strides.

    Example:
        >>> import timm
        >>> feature_levels(timm.create_model("resnet18"))["res3"]
        LevelInfo(index=2, stride=8, channels=128, of_stride=0)
    """
    name = type(model).__name__
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} has no forward_intermediates, so its feature maps can't be read; use another model")
    size = probe_size(model)
    maps = _maps(model, size)
    if hasattr(model, "vector_levels"):
        names: Sequence[str] = model.vector_levels  # type: ignore[assignment]
        return {vector: LevelInfo(index, 0, maps[index].shape[1]) for index, vector in enumerate(names)}
    levels: dict[str, LevelInfo] = {}
    own: Sequence[str] | None = getattr(model, "level_names", None)
    strides = [stride_of(map_, size) for map_ in maps]
    for index, (map_, stride) in enumerate(zip(maps, strides)):
        level = own[index] if own else f"res{int(math.log2(stride))}"
        if own or level in LEVELS:
            levels[level] = LevelInfo(index, stride, map_.shape[1])
    if levels and not own and len(maps) > 1 and len({*strides}) == 1:
        last, (stride, channels) = len(maps) - 1, (strides[-1], maps[-1].shape[1])
        for other in (stride // 2, stride * 2):
            if f"res{int(math.log2(other))}" in LEVELS:
                levels[f"res{int(math.log2(other))}"] = LevelInfo(last, other, channels, of_stride=stride)
        levels |= {f"block{index + 1}": LevelInfo(index, stride, map_.shape[1]) for index, map_ in enumerate(maps)}
    if not levels:
        raise ValueError(f"{name} has no feature map of stride 4, 8, 16 or 32; use another model")
    return levels


def take_levels(available: Mapping[str, LevelInfo], names: Sequence[str], arch: str) -> dict[str, LevelInfo]:
    """Return the levels in ``names`` out of those ``available`` for the network ``arch``, by stride.

    Raises:
        ValueError: no name, a name that the network doesn't have, or a level that isn't a map of its own.
    """
    if not names:
        raise ValueError(f"no levels asked of {arch}; it has {', '.join(available)}")
    for name in names:
        if name not in available:
            raise ValueError(f"{arch} has no level '{name}'; it has {', '.join(available)}")
        if not available[name].stride:
            raise ValueError(f"{arch}: '{name}' is a vector, and a detector needs maps; use a convolutional network")
        if name not in own_maps(available):
            raise ValueError(
                f"{arch}: '{name}' can be read from a teacher only; a detector needs the network's own maps"
            )
    return {name: info for name, info in available.items() if name in names}


def own_maps(available: Mapping[str, LevelInfo]) -> dict[str, LevelInfo]:
    """Return the levels that are maps of the network's own strides, which a detector can take."""
    return {name: info for name, info in available.items() if name in LEVELS and not info.of_stride}


def probe_image(model: nn.Module, *sides: int) -> Tensor:
    """Return a black image (1, C, H, W), or with one side (1, C, side, side), on the model's device."""
    parameter = next(model.parameters())
    channels = getattr(model, "in_chans", None) or getattr(model, "default_cfg", {}).get("input_size", (3,))[0]
    return torch.zeros(1, channels, sides[0], sides[-1], device=parameter.device, dtype=parameter.dtype)


def probe_size(model: nn.Module) -> int:
    """Return the side of a square image that the model takes: small where it may be, else the model's own."""
    try:
        if all(stride_of(map_, PROBE_SIZE) * map_.shape[-1] == PROBE_SIZE for map_ in _maps(model, PROBE_SIZE)):
            return PROBE_SIZE
    except Exception:  # it takes its own size alone, and raises whatever it stumbles over
        pass
    # it may also pad so little that strides can't be read from a small image
    return own_size(model)


def own_size(model: nn.Module) -> int:
    """Return the side of the images that timm made the model for, in pixels."""
    # as its architecture arguments say, where it takes one size alone
    if size := getattr(getattr(model, "patch_embed", None), "img_size", None):
        return int(size[0])
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", {})
    return int(config.get("input_size", (3, 224, 224))[-1])


def check_image_size(model: nn.Module, arch: str, size: int, where: str) -> None:
    """Refuse (ValueError) a classifier that takes no images of ``size`` pixels; ``where`` has its ARCH_KWARGS."""
    try:
        probe_outputs(model, {}, size)
    except Exception as error:  # a network raises whatever it stumbles over
        remedy = f", or {where}.ARCH_KWARGS.img_size to {size}" if takes_argument(model, "img_size") else ""
        raise ValueError(
            f"{arch} takes no images of {size} x {size} pixels ({first_line(error)}); set DATA.IMAGE_SIZE to "
            f"{own_size(model)}{remedy}"
        ) from error


def takes_argument(model: nn.Module, name: str) -> bool:
    """Return whether a network's class has an architecture argument of this name."""
    return name in inspect.signature(type(model).__init__).parameters


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _maps(model: nn.Module, size: int) -> list[Tensor]:
    with evaluating(model):
        image = probe_image(model, size)
        maps: list[Tensor] = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
    return maps


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; each module's own mode is restored after the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def stride_of(map_: Tensor, size: int) -> int:
    """Return the stride of a map (B, C, H, W) of an image of ``size`` pixels: a power of two, the nearest one."""
    stride: int = 2 ** round(math.log2(size / map_.shape[-1]))
    return stride


def forward_outputs(model: nn.Module, images: Tensor, levels: Mapping[str, LevelInfo]) -> ModelOutputs:
    """Logits, maps and embedding of a classifier in one pass, equal to what ``model(images)`` computes.

    Args:
        model: a timm model with its classifier.
        images: (B, 3, H, W), normalized.
        levels: the maps to give, from :func:`feature_levels`; may be empty.

    Returns:
        logits (B, K), None where the model has no classes; maps (B, C, H / stride, W / stride) by level; embedding
        (B, D): what enters the classifier.
    """
    indices = sorted({info.index for info in levels.values()})
    if indices:
        features, maps = model.forward_intermediates(images, indices=indices)  # type: ignore[operator]
    else:
        features, maps = model.forward_features(images), []  # type: ignore[operator]
    seen: list[Tensor] = []
    # the head runs once: a second call for pre_logits would draw another dropout mask and move BN statistics twice
    hook = last_layers(model)[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        logits = model.forward_head(features)  # type: ignore[operator]
    finally:
        hook.remove()
    by_index = dict(zip(indices, maps))
    found = {name: info.resized(by_index[info.index]) for name, info in levels.items()}
    if not model.num_classes:
        logits = None
    return ModelOutputs(logits=logits, maps=found, embedding=seen[0].flatten(1) if seen else None)


def probe_outputs(model: nn.Module, levels: Mapping[str, LevelInfo], size: int) -> ModelOutputs:
    """Return :func:`forward_outputs` of one black image of ``size`` pixels; the model is left as it was."""
    with evaluating(model):
        return forward_outputs(model, probe_image(model, size), levels)


def last_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return a classifier's last layer, or both where it has one more for a distillation token."""
    found = model.get_classifier()  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of a classifier's last layers, such as weight (K, D) and bias (K,)."""
    last = {id(parameter) for layer in last_layers(model) for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in last}


def backbone_parameters(model: nn.Module) -> list[Tensor]:
    """Return the trainable parameters of a classifier without those of its last layer."""
    last = classifier_names(model)
    return [value for name, value in model.named_parameters() if value.requires_grad and name not in last]


def embedding_width(model: nn.Module) -> int:
    """Return D of the embedding that :func:`forward_outputs` gives; 0 if there is no classifier to enter."""
    embedding = probe_outputs(model, {}, probe_size(model)).embedding
    return 0 if embedding is None else embedding.shape[1]
