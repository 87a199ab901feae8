"""Weights into and out of the torchvision engine's detector: whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detection.config import BEST, LAST
from nst_det.detection.torchvision import Detector
from nst_det.detection.zoo import PREDICTOR, ClassNames, by_own_names, new_predictor, read_detector, unlike
from nst_det.engine.config import expand_path
from nst_det.engine.safetensors_io import read_metadata, write_tensors
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import THRESHOLDS
from nst_det.models import load_into, load_plain, load_strict, resolve
from nst_det.models.bottomup import load_recognized
from nst_det.models.card import check_pixels
from nst_det.models.io import card_path, trusting_pickles
from nst_det.models.registry import PREFIX
from nst_det.models.weights import are_of_detector

log = logging.getLogger(__name__)
WEIGHTS_SUFFIX = ".safetensors"
BEST_FILE = "model_best.safetensors"
# of the metadata in it
RECORD_KEY = "validation"


def load_weights(
    detector: Detector,
    config: CfgNode,
    classes: Sequence[str] = (),
    key: str = "MODEL.WEIGHTS",
    starts: bool = False,
) -> str:
    """Fill a detector from MODEL.WEIGHTS; return what filled it: ``random``, ``timm``, ``backbone``, ``detector``.

    ``backbone://NAME``, a ``.safetensors`` file with its card, or a classifier's weights from elsewhere fill the
    bottom-up and leave the rest as it was drawn.  Any other file must hold a whole detector, named as here and in
    Detectron2, or as in torchvision or Detectron2's own ResNet.  At the start of a training (``starts``), a detector of
    other classes fills everything but the box predictor, of which MODEL.KEEP_CLASSES says what is kept.
    """
    names = ClassNames.of(config.MODEL) if starts else None
    filled = _load(detector, config, classes, key, names)
    if names and names.keep and filled != "detector":
        raise UserError(f"MODEL.KEEP_CLASSES: {key} names no detector's weights; name some, or set it False")
    return filled


def _load(detector: Detector, config: CfgNode, classes: Sequence[str], key: str, names: ClassNames | None) -> str:
    named = config.MODEL.WEIGHTS
    if not named:
        return "timm" if config.MODEL.TIMM.PRETRAINED else "random"
    source = named if named.startswith(PREFIX) else expand_path(named, key)
    path = resolve(source)
    pixels = (config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD, config.INPUT.FORMAT)
    if source.startswith(PREFIX) or (path.suffix == WEIGHTS_SUFFIX and card_path(path).is_file()):
        card = load_into(detector.backbone.bottom_up, source)
        check_pixels(card, *pixels, f"{key} {source}")
        log.info("%s: the bottom-up is filled (method %s); FPN and heads start anew", source, card.method or "unknown")
        return "backbone"
    with trusting_pickles(config.TRUST_PICKLE):
        own = detector.state_dict()
        state_dict = read_detector(path, own)
        if not are_of_detector(state_dict):
            load_recognized(detector.backbone.bottom_up, path, *pixels, f"{key} {path}", state_dict)
            return "backbone"
        other = unlike(state_dict, path, config) if names else ""
        state_dict = by_own_names(path, state_dict, own, detector.backbone.bottom_up, pixels, f"{key} {path}")
        entries, filled = detector_entries(path, state_dict, own, classes, key, names)
        try:
            load_strict(detector, entries, str(path))
        except ValueError as error:
            raise UserError(f"{key}: {error}{other}") from error
    log.log(logging.WARNING if other else logging.INFO, "%s: %s%s", path, filled, other)
    detector.backbone.bottom_up.loaded = True
    return "detector"


def detector_entries(
    path: Path,
    state_dict: dict[str, Tensor],
    own: Mapping[str, Tensor],
    classes: Sequence[str],
    key: str,
    names: ClassNames | None,
) -> tuple[dict[str, Tensor], str]:
    """Return a whole detector's entries, for one of these ``classes`` ([] if unknown) and with the entries ``own``.

    One that was trained on others is refused without ``names``; with them it comes with a box predictor of ``own``.
    Also return what is filled by it, for the log.
    """
    listed = list(names.listed) if names else []
    named = listed or saved_classes(path)
    if named and classes:
        other = named != list(classes)
        if other and (names is None or (sorted(named) == sorted(classes) and not names.keep)):
            raise UserError(
                f"{key}: {path} was trained on the classes {', '.join(named)}, these data have {', '.join(classes)}; "
                f"set DATASETS.CLASSES to [{', '.join(named)}]"
            )
    else:
        shapes = {name: value.shape for name, value in state_dict.items()}
        predictor = {name: value for name, value in own.items() if name.startswith(PREDICTOR)}
        other = bool(names) and any(shapes.get(name, v.shape) != v.shape for name, v in predictor.items())
    if names is None or not other:
        return state_dict, "the whole detector is filled"
    predictor, kept = new_predictor(state_dict, own, classes, named, names, str(path))
    theirs = f"the classes {', '.join(named)}" if named else "another number of classes"
    anew = f"which starts anew but for {kept}" if kept else "which starts anew"
    return state_dict | predictor, f"trained on {theirs}: all but the box predictor is filled, {anew}"


def save_weights(
    path: str | Path, detector: nn.Module, classes: Sequence[str], extra: Mapping[str, str] | None = None
) -> None:
    """Write a detector's state dict and its classes, atomically, with their checksum; ``extra`` joins the metadata."""
    write_tensors(path, detector.state_dict(), {"classes": json.dumps(list(classes)), **(extra or {})})


def saved_classes(path: str | Path) -> list[str]:
    """Return the classes in a detector's file, or [] where it has none."""
    if Path(path).suffix != WEIGHTS_SUFFIX:
        return []
    try:
        return [str(name) for name in json.loads(read_metadata(path).get("classes", "[]"))]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its list of classes is damaged; write the file again") from error


def keep_best(
    folder: Path, student: nn.Module, classes: Sequence[str], step: int, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Write :data:`BEST_FILE` if these weights have a higher mAP on the validation split than those in it.

    Return the record of these weights: ``step``, and of ``figures`` ``map`` and ``map_area``, 0..1 or None, and
    ``thresholds`` (see :mod:`nst_det.evaluation.thresholds`).
    """
    record = {"step": step, **{name: figures.get(name) for name in ("map", "map_area", THRESHOLDS)}}
    before = read_best(folder)
    # of equal ones the first; the record is in the file itself, so that a kill can't part the two
    if before is None or (record["map"] or 0.0) > (before["map"] or 0.0):
        save_weights(folder / BEST_FILE, student, classes, {RECORD_KEY: json.dumps(record)})
    return record


def read_best(folder: Path) -> dict[str, Any] | None:
    """Return the record of the weights in :data:`BEST_FILE`; None where there are none."""
    path = folder / BEST_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(read_metadata(path).get(RECORD_KEY, "")))
    except ValueError as error:
        raise UserError(f"{path}: has no record of its mAP; remove it and start this run again") from error


def patience_is_over(folder: Path, step: int, test: CfgNode) -> bool:
    """Return whether TEST.PATIENCE validations in a row, of which the last was after ``step``, had no higher mAP."""
    best = read_best(folder) if test.PATIENCE else None
    if best is None or step - best["step"] < test.PATIENCE * test.EVAL_PERIOD:
        return False
    log.info("stopped early at step %d: no higher mAP on the validation split since step %d", step, best["step"])
    return True


def settle(folder: Path, student: nn.Module, last: Mapping[str, Any], select: str) -> dict[str, Any]:
    """Return what ``result.json`` has of both: ``checkpoints``, and ``thresholds`` of the tested ones.

    ``checkpoints`` are the records of the ``best`` and the ``last`` weights, and which are ``tested``, by TEST.SELECT.
    With ``best`` the student takes up those weights; the last ones have been offered to :func:`keep_best` before.
    """
    best = read_best(folder) or dict(last)
    if select == BEST and best["step"] != last["step"]:
        load_strict(student, load_plain(folder / BEST_FILE), str(folder / BEST_FILE))
    records = {BEST: best, LAST: dict(last)}
    thresholds = {name: record.pop(THRESHOLDS, None) for name, record in records.items()}
    return {"checkpoints": {**records, "tested": select}, THRESHOLDS: thresholds[select]}
