"""timm is the zoo: students and teachers by their timm names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from nst_det.backbones import inception_bn, mlp, small  # noqa: F401 (registers these networks in timm)

# timm's arguments that load weights or read files: an architecture from a card must never reach them
NOT_ARCHITECTURE = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "scriptable",
    "exportable",
    "no_jit",
    "num_classes",
)
LARGEST_NUMBER = 1 << 16


def create_model(arch: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
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
    try:
        return timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise ValueError(f"{arch} doesn't take these arguments: {kwargs} ({error})") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"no pretrained weights for {arch} could be had ({reason}); go online once, or name a weights file"
        ) from error


def check_arch(arch: str, arch_kwargs: Mapping[str, Any]) -> None:
    """Refuse what isn't a plain timm name with plain arguments.

    Raises:
        ValueError: unknown name (the nearest known ones are listed), or an argument that isn't a small number, a
            short text, or a short list of such.
    """
    base = arch.split(".")[0]
    # the check also keeps out timm's "hf-hub:" and "local-dir:" names, which fetch and read files
    if not timm.is_model(base) or ":" in arch or "/" in arch:
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ValueError(f"unknown architecture '{arch[:80]}'; {hint}")
    for key, value in arch_kwargs.items():
        if key in NOT_ARCHITECTURE:
            raise ValueError(f"architecture argument '{key}' is not allowed; leave it out")
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, bool | int | float | str | None) or (
                isinstance(item, int | float) and abs(item) > LARGEST_NUMBER
            ):
                raise ValueError(f"architecture argument '{key}' must be a number up to {LARGEST_NUMBER}, text or list")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers don't count."""
    return sum(parameter.numel() for parameter in model.parameters())


def same_maps(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of maps (B, C, H, W) by level; infinite if shapes differ."""
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return float("inf")
    return max((float((first[key] - second[key]).abs().max()) for key in first), default=0.0)
