"""Batch normalization of a backbone: frozen, trained, or trained over all processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# the keys of Detectron2's MODEL.RESNETS.NORM that speak of batch normalization
NORM_POLICIES = {"FrozenBN": "frozen", "BN": "train", "SyncBN": "sync"}


def batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All batch normalization layers by name, timm's with a built-in activation included."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield name, layer


def freeze_batch_norm(layer: _BatchNorm) -> None:
    """Fix statistics, scale and shift: the layer is affine from now on.

    It stays the layer that it was, so that the names in its state dict don't change; whoever owns it must put
    it back into evaluation mode after ``train()`` (:class:`~nst_det.backbones.bottomup.Bottomup` does).
    """
    layer.eval()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
