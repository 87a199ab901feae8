"""Backbone files: ``NAME.safetensors`` with the whole classifier, ``NAME.json`` with its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nst_det.backbones.card import Card, card_from_json
from nst_det.backbones.levels import feature_levels
from nst_det.backbones.models import count_parameters, create_model
from nst_det.backbones.pickles import as_tensors, load_pickled
from nst_det.backbones.registry import resolve
from nst_det.backbones.strict import check_shapes
from nst_det.errors import UserError
from nst_det.runtime.files import (
    SEAL,
    atomic_path,
    read_sealed_json,
    remove_left_over,
    sha256_of_file,
    write_sealed_json,
)
from nst_det.runtime.provenance import package_versions
from nst_det.runtime.tensor_files import read_tensors

LARGEST_CARD = 16 << 20
LARGEST_WEIGHTS = 16 << 30


def save_backbone(path: str | Path, model: nn.Module, card: Card) -> Card:
    """Write a classifier and its card, both atomically; the card goes last, so a file without one is unfinished.

    Args:
        path: ends in ``.safetensors``; the card stands beside it.
        model: the whole timm classifier, head included.
        card: levels, params, versions, date and sha256 are filled in where they are empty.

    Returns:
        The card as written.

    Raises:
        UserError: the folder can't be written or the disk is full.
        ValueError: the path doesn't end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a backbone file ends in .safetensors")
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in model.state_dict().items()}
    remove_left_over(path.parent)
    card_path(path).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        # one entry alone: safetensors writes several in any order, and equal backbones are equal files
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    levels = {name: {"stride": info.stride, "channels": info.channels} for name, info in feature_levels(model).items()}
    card = replace(
        card,
        levels=card.levels or levels,
        params=card.params or count_parameters(model),
        versions=card.versions or package_versions(),
        date=card.date or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=sha256_of_file(path),
    )
    write_sealed_json(card_path(path), card.to_json())
    return card


def card_path(path: str | Path) -> Path:
    """The card's path of a backbone file."""
    return Path(path).with_name(Path(path).name.removesuffix(".safetensors") + ".json")


def load_card(path: str | Path) -> Card:
    """Read and check the card beside a backbone file, or of ``backbone://NAME``.

    A card without its checksum (``content_sha256``), by an earlier version or by hand, is read as well.

    Raises:
        UserError: missing, too large, not a card, or not as it was written.
    """
    path = resolve(path)
    beside = card_path(path)
    if not beside.exists():
        if path.exists():
            raise UserError(f"{path}: its card {beside.name} is missing; put it beside the weights")
        raise UserError(f"{path}: no such backbone file; nst-det backbones lists those there are")
    if beside.stat().st_size > LARGEST_CARD:
        raise UserError(f"{beside}: {beside.stat().st_size} bytes is too large for a card")
    remedy = f"get it again, or if you edited it, remove the field '{SEAL}'"
    return card_from_json(read_sealed_json(beside, remedy), str(beside))


def load_backbone(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """Read a backbone file; names, shapes and checksum are compared before a tensor is believed.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``.

    Returns:
        The state dict of the whole classifier (on the CPU), and the card.

    Raises:
        UserError: no such file, damaged, not what its card says, or weights that don't fit the architecture.
    """
    path = resolve(path)
    card = load_card(path)
    if not path.exists():
        raise UserError(f"{path}: its card is here, the weights are not; put them beside the card")
    shapes = _header(path)
    try:
        with torch.device("meta"):
            own = create_model(card.arch, card.num_classes, **card.arch_kwargs).state_dict()
        check_shapes(shapes, own, str(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {_without(str(error), str(path))}") from error
    if sha256_of_file(path) != card.sha256:
        raise UserError(f"{path}: the weights are not those of the card (sha256 differs); get both files again")
    return load_file(str(path)), card


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    if path.stat().st_size > LARGEST_WEIGHTS:
        raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a backbone")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error}); get it again") from error


def load_plain(path: str | Path) -> dict[str, Tensor]:
    """A bare state dict from somebody else's file, by an architecture that the user names.

    ``.safetensors`` is read as such, all else by :func:`~nst_det.backbones.pickles.load_pickled`: nothing in the file
    is executed.  torchvision's ResNet files fit timm's ResNets as they are.

    Raises:
        UserError: no such file, damaged, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; correct the path")
    if path.stat().st_size > LARGEST_WEIGHTS:
        raise UserError(f"{path}: {path.stat().st_size} bytes is too large for weights; correct the path")
    if path.suffix == ".safetensors":
        _header(path)
        return read_tensors(path)
    value: Any = load_pickled(path)
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    value = as_tensors(value)
    fits = isinstance(value, Mapping) and value
    if not fits or not all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()):
        raise UserError(f"{path}: not a state dict (a mapping of names to tensors); name a file of weights")
    return {key.removeprefix("module."): item for key, item in value.items()}


def _without(text: str, prefix: str) -> str:
    return text.removeprefix(f"{prefix}: ")
