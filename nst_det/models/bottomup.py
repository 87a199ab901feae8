"""The detector's bottom-up: a timm classifier without its classifier."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nst_det.errors import UserError
from nst_det.models.build import (
    LEVELS,
    ODD_SIZE,
    batch_norms,
    create_model,
    evaluating,
    feature_levels,
    first_line,
    forward_outputs,
    own_maps,
    probe_image,
    probe_size,
    stride_of,
    take_levels,
    takes_argument,
)
from nst_det.models.card import Card, check_pixels
from nst_det.models.io import first_names, load_backbone, load_strict
from nst_det.models.sync_norm import sync_batch_norm
from nst_det.models.weights import recognize

log = logging.getLogger(__name__)


class Bottomup(nn.Module):
    """Images in, one map a level out; computes exactly what the classifier computes up to there.

    It assumes that images are normalized as the weights expect.  The timm model is made whole, filled strictly,
    and only then cut down to what the levels need.  Parameters that have no effect on these levels and can't be cut off
    (HRNet's, whose branches feed each other) are frozen, and the log names them.

    ``arch``, ``arch_kwargs`` and ``pretrained`` are those of :func:`create_model`, ``levels`` of ``res2`` .. ``res5``;
    ``state_dict`` has the weights of the whole classifier of ``num_classes``, None leaves random ones.  A ValueError
    says what of it is unknown or doesn't fit.

    Attributes:
        channels: level -> channels.
        strides: level -> stride in pixels.
        loaded: whether the weights come from a file or from timm, not from a random generator.
        unused: names of the parameters that give nothing to the levels.

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
        self.arch, self.arch_kwargs = arch, dict(arch_kwargs or {})
        model = create_model(arch, num_classes, pretrained, **self.arch_kwargs)
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
        self._frozen_norms: set[str] = set()
        self.unused = self._freeze_unused()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalized images to maps (B, C, H / stride, W / stride) by level."""
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=self._indices, stop_early=True, intermediates_only=True
        )
        return dict(zip(self.channels, maps))

    def check_map_sizes(self, multiple: int = 1) -> None:
        """Refuse (ValueError) a network whose maps aren't the image's size divided by their strides.

        ``multiple`` is what the sides of images are padded to a multiple of; 1 takes images of any size.
        """
        sides = [side // multiple * multiple for side in ODD_SIZE]
        size = " x ".join(map(str, sides))
        try:
            with evaluating(self.model):
                maps = self(probe_image(self.model, *sides))
        except Exception as error:  # a network raises whatever it stumbles over
            remedy = "take another network"
            if takes_argument(self.model, "strict_img_size"):
                remedy += ", or set KWARGS.strict_img_size to False, with an FPN above it"
            raise ValueError(
                f"{self.arch} takes no images of {size} pixels ({first_line(error)}), and a detector's images have "
                f"many sizes; {remedy}"
            ) from error
        for name, stride in self.strides.items():
            found = maps[name].shape[-2:]
            # either way a cell is where its stride says
            if any(not side // stride <= cells <= -(-side // stride) for side, cells in zip(sides, found)):
                wanted = " x ".join(str(-(-side // stride)) for side in sides)
                raise ValueError(
                    f"{self.arch}: the map {name} of an image of {size} pixels has {found[0]} x {found[1]} cells, and "
                    f"stride {stride} asks for {wanted}: features would be read at wrong places; take another network"
                )

    def load_classifier(self, state_dict: Mapping[str, Tensor], source: str) -> None:
        """Fill from the state dict of the whole classifier, of which all but what was cut off must fit.

        A ValueError names ``source``, and the names that are missing or unexpected or of other shapes.
        """
        kept = {key: value for key, value in state_dict.items() if key not in self._pruned_keys}
        load_strict(self.model, kept, source)
        self.loaded = True

    def freeze(self, at: int, allow_random: bool = False) -> None:
        """Freeze all layers that the last map of stride ``2**at`` depends on, batch normalization included.

        The numbers are Detectron2's ``MODEL.BACKBONE.FREEZE_AT``: 0 freezes nothing, 1 the stem, 2 the stem and
        the stage of ``res2``, and so on to 5.  A ValueError says that the network has no map of that stride, or that
        the layers to freeze have random weights.
        """
        if at == 0:
            return
        if not 0 < at <= 5:
            raise ValueError(f"freeze at {at}: use 0 (nothing) to 5 (all)")
        frozen = self._names_below(at)
        self._check_loaded(frozen, allow_random, f"freezing at {at}", "freeze at 0")
        for name, parameter in self.model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        norms = dict(batch_norms(self.model))
        self._freeze_norms({name: norms[name] for name in norms if f"{name}.weight" in frozen})

    def set_norm(self, policy: str, allow_random: bool = False) -> None:
        """Choose how batch normalization trains: ``frozen``, ``train``, or ``sync`` (over all processes).

        A ValueError says that the policy is unknown, or ``frozen`` on random weights (which would mean no
        normalization at all).
        """
        if policy == "frozen":
            norms = dict(batch_norms(self.model))
            self._check_loaded(set(norms), allow_random, "freezing batch normalization", "train it")
            self._freeze_norms(norms)
        elif policy == "sync":
            self.model = sync_batch_norm(self.model)
        elif policy != "train":
            raise ValueError(f"unknown norm policy '{policy}'; use frozen, train or sync")

    def train(self, mode: bool = True) -> Bottomup:
        """As ``nn.Module.train``; frozen batch normalization stays in evaluation mode."""
        super().train(mode)
        for name in self._frozen_norms:
            self.model.get_submodule(name).eval()
        return self

    def _freeze_norms(self, layers: Mapping[str, _BatchNorm]) -> None:
        # each stays the layer that it was, so that the names in its state dict don't change
        for name, layer in layers.items():
            layer.eval().requires_grad_(False)
            self._frozen_norms.add(name)

    def _check_loaded(self, layers: Collection[str], allow_random: bool, what: str, remedy: str) -> None:
        if not self.loaded and layers and not allow_random:
            raise ValueError(
                f"{what} would freeze layers with random weights: {first_names(sorted(layers))}; load a backbone "
                f"first, or {remedy}"
            )

    def _freeze_unused(self) -> list[str]:
        """Freeze what has no gradient, since data parallel training would wait for it; return its names."""
        trainable = {name: value for name, value in self.named_parameters() if value.requires_grad}
        with evaluating(self.model), torch.enable_grad():
            maps = self(probe_image(self.model, probe_size(self.model)))
            unused = sorted(set(trainable) - _reached(maps.values(), trainable))
        for name in unused:
            trainable[name].requires_grad_(False)
        if unused:
            log.info(
                "%s: %d of %d parameter tensors have no effect on %s and are frozen (%s)",
                *(self.arch, len(unused), len(trainable), ", ".join(self.channels), first_names(unused)),
            )
        return unused

    def _names_below(self, at: int) -> set[str]:
        """Return the parameters that the last map of stride ``2**at`` depends on, found by its gradient."""
        if 2**at >= max(self.strides.values()):
            return {name for name, _ in self.model.named_parameters()}
        # on a copy, so that no flag and no statistic of this one is touched
        model = copy.deepcopy(self.model).eval().requires_grad_(True)
        size = probe_size(model)
        with torch.enable_grad():
            image = probe_image(model, size)
            maps = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
            last = [map_ for map_ in maps if stride_of(map_, size) == 2**at]
            if not last:
                raise ValueError(f"{self.arch} has no map of stride {2**at}, so it can't be frozen at {at}")
            return _reached(last[-1:], dict(model.named_parameters()))


def _reached(maps: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters that maps depend on, found by their gradient."""
    total = torch.stack([map_.sum() for map_ in maps]).sum()
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, grad in zip(parameters, grads) if grad is not None}


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
        if not isinstance(model, Bottomup):
            load_strict(model, state_dict, str(path))
        elif model.arch.split(".")[0] == card.arch.split(".")[0]:
            model.load_classifier(state_dict, str(path))
        else:
            raise UserError(f"{path}: holds {card.arch}, the model is {model.arch}")
    except ValueError as error:
        raise UserError(str(error)) from error
    return card


def load_recognized(
    bottom_up: Bottomup,
    path: str | Path,
    mean: Sequence[float],
    std: Sequence[float],
    order: str,
    source: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a detector's bottom-up from a classifier's weights of another program; see :func:`recognize`.

    ``mean``, ``std`` (0..255) and channel ``order`` of the detector's images must be those of the file; where it isn't
    known what those are, a warning says so.  Errors begin with ``source``.
    """
    try:
        found = recognize(path, bottom_up.arch, bottom_up.arch_kwargs, 1, tensors)
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix(f'{path}: ')}") from error
    taken = f"INPUT.FORMAT {order}, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}"
    found.check_input(partial(check_pixels, mean=mean, std=std, order=order, source=source), taken, source)
    bottom_up.load_classifier(found.tensors, str(path))
    log.info("%s: %s; the bottom-up is filled; FPN and heads start anew", path, found.says)


def classifier_from_file(path: str | Path) -> tuple[nn.Module, Card]:
    """The whole classifier in a backbone file, in evaluation mode on the CPU, and its card.

    ``path`` is a ``.safetensors`` path or ``backbone://NAME``; errors are those of :func:`load_backbone`.
    """
    state_dict, card = load_backbone(path)
    classifier = create_model(card.arch, card.num_classes, **card.arch_kwargs)
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
    from exactly what stage one trained, infinity that shapes differ.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``; errors are those of :func:`load_backbone`.
        size: side of the images of seeded noise; None takes the card's.
    """
    classifier, card = classifier_from_file(path)
    found = feature_levels(classifier)
    # where there are none, the refusal says why
    levels = own_maps(found) or found
    bottomup = bottomup_from_file(path, list(levels)).eval()
    side = size or int(card.input.get("size") or 64)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, maps = forward_outputs(classifier, images, levels).maps, bottomup(images)
    if any(maps[name].shape != wanted[name].shape for name in wanted):
        return float("inf")
    return max(float((maps[name] - wanted[name]).abs().max()) for name in wanted)
