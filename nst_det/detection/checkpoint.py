"""Weights into and out of the torchvision engine's detector: whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from nst_det.detection.config import BEST, LAST
from nst_det.detection.torchvision import Detector
from nst_det.engine.config import expand_path
from nst_det.engine.safetensors_io import read_metadata, write_tensors
from nst_det.errors import UserError
from nst_det.models import check_input_contract, load_into, load_plain, load_strict, resolve
from nst_det.models.io import trusting_pickles
from nst_det.models.registry import PREFIX

log = logging.getLogger(__name__)
CARD_SUFFIX, WEIGHTS_SUFFIX = ".json", ".safetensors"
BEST_FILE = "model_best.safetensors"
_KEY = "validation"
_FIGURES = ("map", "map_area")


def load_weights(detector: Detector, config: CfgNode, classes: Sequence[str] = (), key: str = "MODEL.WEIGHTS") -> str:
    """Fill a detector from MODEL.WEIGHTS.

    ``backbone://NAME``, or a ``.safetensors`` file with a card beside it, fills the bottom-up and leaves the rest as
    it was drawn.  Any other file must hold a whole detector by this engine's names, which are Detectron2's.

    Args:
        detector: as built.
        config: reads MODEL.WEIGHTS, and MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT against the card.
        classes: compared with those in a detector's file, where it has them.
        key: named in errors.

    Returns:
        ``random``, ``timm``, ``backbone`` or ``detector``: what the detector begins with.

    Raises:
        UserError: no such file, weights that don't fit whole, or another input contract.
    """
    named = config.MODEL.WEIGHTS
    if not named:
        return "timm" if config.MODEL.TIMM.PRETRAINED else "random"
    source = named if named.startswith(PREFIX) else expand_path(named, key)
    path = resolve(source)
    if source.startswith(PREFIX) or (path.suffix == WEIGHTS_SUFFIX and path.with_suffix(CARD_SUFFIX).is_file()):
        card = load_into(detector.backbone.bottom_up, source)
        try:
            mean, std = (
                [value / 255 for value in values] for values in (config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD)
            )
            check_input_contract(card, mean, std, config.INPUT.FORMAT)
        except UserError as error:
            wanted = card.input
            raise UserError(
                f"{key} {source}: {error} (INPUT.FORMAT {wanted['channel_order']}, "
                f"MODEL.PIXEL_MEAN {[round(255 * value, 3) for value in wanted['mean']]}, "
                f"MODEL.PIXEL_STD {[round(255 * value, 3) for value in wanted['std']]})"
            ) from error
        log.info("%s: the bottom-up is filled (method %s); FPN and heads start anew", source, card.method or "unknown")
        return "backbone"
    with trusting_pickles(config.TRUST_PICKLE):
        _load_detector(detector, path, classes, key)
    log.info("%s: the whole detector is filled", source)
    return "detector"


def _load_detector(detector: Detector, path: Path, classes: Sequence[str], key: str) -> None:
    state_dict = load_plain(path)
    named = saved_classes(path)
    if named and classes and list(classes) != named:
        raise UserError(
            f"{key}: {path} was trained on the classes {', '.join(named)}, these data have {', '.join(classes)}; "
            "set DATASETS.CLASSES to the former"
        )
    try:
        load_strict(detector, state_dict, str(path))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    detector.backbone.bottom_up.loaded = True


def save_weights(
    path: str | Path, detector: nn.Module, classes: Sequence[str], extra: Mapping[str, str] | None = None
) -> None:
    """Write a detector's state dict and its classes as a ``.safetensors`` file, atomically, with their checksum.

    Args:
        path: the file.
        detector: as it is.
        classes: its class names in order.
        extra: more to write into the file's metadata.

    Raises:
        UserError: the file can't be written.
    """
    write_tensors(path, detector.state_dict(), {"classes": json.dumps(list(classes)), **(extra or {})})


def saved_classes(path: str | Path) -> list[str]:
    """The classes in a detector's file, or [] where it has none.

    Raises:
        UserError: the file is damaged.
    """
    if Path(path).suffix != WEIGHTS_SUFFIX:
        return []
    text = read_metadata(path).get("classes", "[]")
    try:
        classes = json.loads(text)
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: its list of classes is damaged; write the file again")
    return classes


def keep_best(
    folder: Path, student: nn.Module, classes: Sequence[str], step: int, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Write :data:`BEST_FILE` if these weights have a higher mAP on the validation split than those in it.

    Args:
        folder: of the run.
        student: the detector.
        classes: its classes.
        step: steps done.
        figures: on the validation split; ``map`` and ``map_area`` are read, 0..1 or None.

    Returns:
        The record of these weights: ``step``, ``map`` and ``map_area``.
    """
    record = {"step": step, **{name: figures.get(name) for name in _FIGURES}}
    before = read_best(folder)
    # of equal ones the first; the record stands in the file itself, so that a kill can't part the two
    if before is None or (record["map"] or 0.0) > (before["map"] or 0.0):
        save_weights(folder / BEST_FILE, student, classes, {_KEY: json.dumps(record)})
    return record


def read_best(folder: Path) -> dict[str, Any] | None:
    """The record of the weights in :data:`BEST_FILE`; None where there are none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / BEST_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(read_metadata(path).get(_KEY, ""))
    except ValueError as error:
        raise UserError(f"{path}: has no record of its mAP; remove it and start this run again") from error
    return dict(record)


def settle(folder: Path, student: nn.Module, last: Mapping[str, Any], select: str) -> dict[str, Any]:
    """What is known of the checkpoints after the last step; with ``best`` the student takes up those weights.

    Args:
        folder: of the run; :data:`BEST_FILE` has been offered the last weights too.
        student: with the weights of the last step.
        last: record of these.
        select: TEST.SELECT.

    Returns:
        ``best`` and ``last`` (``step``, ``map`` and ``map_area`` on the validation split), and ``tested``: which of
        them is evaluated on the test split, once.
    """
    best = read_best(folder) or dict(last)
    if select == BEST and best["step"] != last["step"]:
        load_strict(student, load_plain(folder / BEST_FILE), str(folder / BEST_FILE))
    return {BEST: best, LAST: dict(last), "tested": select}
