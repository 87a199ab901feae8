"""The detector's bottom-up: a timm classifier without its classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nst_det.errors import UserError
from nst_det.models.build import (
    LEVELS,
    batch_norms,
    create_model,
    feature_levels,
    forward_outputs,
    probe_image,
    probe_size,
    same_maps,
    stride_of,
    take_levels,
)
from nst_det.models.card import Card
from nst_det.models.io import first_names, load_backbone, load_strict
from nst_det.models.sync_norm import sync_batch_norm


class Bottomup(nn.Module):
    """Images in, one map a level out; computes exactly what the classifier computes up to there.

    It assumes that images are normalized as the weights expect.  The timm model is made whole, filled strictly,
    and only then cut down to what the levels need, so that no unused parameter remains.

    Args:
        arch: timm name.
        levels: of ``res2`` .. ``res5``.
        arch_kwargs: further arguments of the timm model.
        state_dict: weights of the whole classifier; None leaves random weights.
        num_classes: classes of the classifier in ``state_dict``.
        pretrained: take timm's published weights.

    Attributes:
        channels: level -> channels.
        strides: level -> stride in pixels.
        loaded: whether the weights come from a file or from timm, not from a random generator.

    Raises:
        ValueError: unknown architecture or level, or a state dict that doesn't fit it whole.

    Example:
        >>> bottomup = Bottomup("nst_resnet10_w32", ["res3", "res4"])
        >>> {name: tuple(map_.shape) for name, map_ in bottomup(torch.zeros(1, 3, 64, 64)).items()}
        {'res3': (1, 64, 8, 8), 'res4': (1, 128, 4, 4)}
    """

    def __init__(
        self,
        arch: str,
        levels: Sequence[str] = LEVELS,
        arch_kwargs: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        num_classes: int = 1000,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.arch = arch
        model = create_model(arch, num_classes, pretrained, **(arch_kwargs or {}))
        taken = take_levels(feature_levels(model), levels, arch)
        if state_dict is not None:
            load_strict(model, state_dict, arch)
        self.loaded = pretrained or state_dict is not None
        whole = set(model.state_dict())
        self._indices = [info.index for info in taken.values()]
        # intermediate maps are taken before the final norm, so that norm would stay without a gradient
        model.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        self.model = model
        self.channels = {name: info.channels for name, info in taken.items()}
        self.strides = {name: info.stride for name, info in taken.items()}
        self._pruned_keys = whole - set(model.state_dict())
        self._fixed: set[str] = set()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalized images to maps (B, C, H / stride, W / stride) by level."""
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=self._indices, stop_early=True, intermediates_only=True
        )
        return dict(zip(self.channels, maps))

    def load_classifier(self, state_dict: Mapping[str, Tensor], source: str) -> None:
        """Fill from the state dict of the whole classifier; what was cut off is left out, the rest must fit.

        Args:
            state_dict: the classifier's, by timm's names.
            source: named in the error.

        Raises:
            ValueError: names missing or unexpected, or shapes that differ.
        """
        kept = {key: value for key, value in state_dict.items() if key not in self._pruned_keys}
        load_strict(self.model, kept, source)
        self.loaded = True

    def freeze(self, at: int, allow_random: bool = False) -> None:
        """Freeze all layers that the last map of stride ``2**at`` depends on, batch normalization included.

        The numbers are Detectron2's ``MODEL.BACKBONE.FREEZE_AT``: 0 freezes nothing, 1 the stem, 2 the stem and
        the stage of ``res2``, and so on to 5.

        Raises:
            ValueError: the network has no map of that stride, or the layers to freeze have random weights.
        """
        if at == 0:
            return
        if not 0 < at <= 5:
            raise ValueError(f"freeze at {at}: use 0 (nothing) to 5 (all)")
        frozen = set(self._names_below(at))
        self._guard(frozen, allow_random, f"freezing at {at}", "freeze at 0")
        for name, parameter in self.model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        for prefix, layer in batch_norms(self.model):
            if any(f"{prefix}.{name}" in frozen for name, _ in layer.named_parameters()):
                self._fix(prefix, layer)

    def set_norm(self, policy: str, allow_random: bool = False) -> None:
        """Say how batch normalization trains: ``frozen``, ``train``, or ``sync`` (over all processes).

        Raises:
            ValueError: unknown policy, or ``frozen`` on random weights (it would mean no normalization at all).
        """
        if policy == "frozen":
            layers = dict(batch_norms(self.model))
            self._guard(layers, allow_random, "freezing batch normalization", "train it")
            for name, layer in layers.items():
                self._fix(name, layer)
        elif policy == "sync":
            self.model = sync_batch_norm(self.model)
        elif policy != "train":
            raise ValueError(f"unknown norm policy '{policy}'; use frozen, train or sync")

    def train(self, mode: bool = True) -> Bottomup:
        """As ``nn.Module.train``; frozen batch normalization stays in evaluation mode."""
        super().train(mode)
        for name in self._fixed:
            self.model.get_submodule(name).eval()
        return self

    def _fix(self, name: str, layer: _BatchNorm) -> None:
        """Make the layer affine; it stays the layer that it was, so that the names in its state dict don't change."""
        layer.eval().requires_grad_(False)
        self._fixed.add(name)

    def _guard(self, layers: Iterable[str], allow_random: bool, what: str, remedy: str) -> None:
        names = sorted(layers)
        if not self.loaded and names and not allow_random:
            raise ValueError(
                f"{what} would freeze layers with random weights: {first_names(names)}; load a backbone first, "
                f"or {remedy}"
            )

    def _names_below(self, at: int) -> list[str]:
        """Names of the parameters that the last map of stride ``2**at`` depends on, found by its gradient."""
        if 2**at >= max(self.strides.values()):
            return [name for name, _ in self.model.named_parameters()]
        # on a copy, so that no flag and no statistic of this one is touched
        model = copy.deepcopy(self.model).eval().requires_grad_(True)
        names, parameters = zip(*model.named_parameters())
        size = probe_size(model)
        with torch.enable_grad():
            maps = model.forward_intermediates(  # type: ignore[operator]
                probe_image(model, size), intermediates_only=True
            )
            last = [map_ for map_ in maps if stride_of(map_, size) == 2**at]
            if not last:
                raise ValueError(f"{self.arch} has no map of stride {2**at}, so it can't be frozen at {at}")
            grads = torch.autograd.grad(last[-1].sum(), parameters, allow_unused=True)
        return [name for name, grad in zip(names, grads) if grad is not None]


def load_into(model: nn.Module, path: str | Path) -> Card:
    """Fill a classifier, or a detector's bottom-up, from a backbone file.

    Args:
        model: a timm classifier of the same architecture, or a :class:`Bottomup`.
        path: a ``.safetensors`` path or ``backbone://NAME``.

    Raises:
        UserError: as :func:`load_backbone`, or the weights don't fit this model.
    """
    state_dict, card = load_backbone(path)
    try:
        if isinstance(model, Bottomup):
            if model.arch.split(".")[0] != card.arch.split(".")[0]:
                raise ValueError(f"{path}: holds {card.arch}, the model is {model.arch}")
            model.load_classifier(state_dict, str(path))
        else:
            load_strict(model, state_dict, str(path))
    except ValueError as error:
        raise UserError(str(error)) from error
    return card


def classifier_from_file(path: str | Path) -> tuple[nn.Module, Card]:
    """The whole classifier in a backbone file, in evaluation mode on the CPU, and its card.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``.

    Raises:
        UserError: as :func:`load_backbone`.
    """
    state_dict, card = load_backbone(path)
    try:
        classifier = create_model(card.arch, card.num_classes, **card.arch_kwargs)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_strict(classifier, state_dict, str(path))
    return classifier.eval(), card


def bottomup_from_file(path: str | Path, levels: Sequence[str] = LEVELS) -> Bottomup:
    """The bottom-up in a backbone file.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``.
        levels: of ``res2`` .. ``res5``.

    Raises:
        UserError: as :func:`load_backbone`, or a level that the architecture doesn't have.
    """
    state_dict, card = load_backbone(path)
    try:
        return Bottomup(card.arch, levels, card.arch_kwargs, state_dict, card.num_classes)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def prove_parity(path: str | Path, size: int | None = None) -> float:
    """The largest absolute difference between the classifier's maps and the bottom-up's, on the same images.

    Both are built from the file independently and run in evaluation mode; 0.0 means that the detector starts
    from exactly what stage one trained.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``.
        size: side of the images of seeded noise; None takes the card's.

    Raises:
        UserError: as :func:`load_backbone`.
    """
    classifier, card = classifier_from_file(path)
    levels = feature_levels(classifier)
    bottomup = bottomup_from_file(path, list(levels)).eval()
    side = size or int(card.input.get("size") or 64)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return same_maps(forward_outputs(classifier, images, levels).maps, bottomup(images))
