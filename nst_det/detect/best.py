"""The weights that did best on the validation split; the test split is never read to choose them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nst_det.backbones import load_plain, load_strict
from nst_det.detect.config import BEST, LAST
from nst_det.detect.weights import save_weights
from nst_det.errors import UserError
from nst_det.runtime.tensor_files import read_metadata

BEST_FILE = "model_best.safetensors"
_KEY = "validation"
_FIGURES = ("map", "map_area")


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
