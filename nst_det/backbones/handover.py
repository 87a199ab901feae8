"""From the file into a model, and the proof that nothing changed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nst_det.backbones.bottomup import Bottomup
from nst_det.backbones.card import Card
from nst_det.backbones.files import load_backbone
from nst_det.backbones.levels import LEVELS, feature_levels, forward_outputs
from nst_det.backbones.models import create_model, same_maps
from nst_det.backbones.strict import load_strict
from nst_det.errors import UserError


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
