"""The score that the detections of a class need for the best F1, and F1 against that score."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nst_det.engine.io import from_json
from nst_det.engine.run_dir import RunFolder
from nst_det.evaluation.voc import Curve, VocResult

# at which a curve is kept
SCORES = np.arange(51) / 50
# the least score of a class for which none is known
DEFAULT = 0.5
# of result.json
THRESHOLDS = "thresholds"


@dataclass(frozen=True)
class ScoreThreshold:
    """Of one class: which least score gives the best F1.

    F1 is that of VOC matching at IoU 0.5, ``2 hits / (counted detections + objects)``; difficult objects don't count.
    """

    score: float  # 0..1: halfway between the last score that is taken and the next lower one (or 0)
    f1: float  # there, above 0 and at most 1
    curve: list[float]  # F1 at SCORES


def best_thresholds(result: VocResult) -> dict[str, ScoreThreshold]:
    """Return the threshold of each class at the first overlap of ``result``; the highest of those with the best F1.

    A class of which nothing is found has none.
    """
    by_class = zip(result.classes, result.curves[0], result.positives.tolist())
    found = {name: best_threshold(curve, objects) for name, curve, objects in by_class}
    return {name: one for name, one in found.items() if one is not None}


def best_threshold(curve: Curve, objects: int) -> ScoreThreshold | None:
    """Return the threshold of one class with so many ``objects`` that count; None where no detection is a hit."""
    if not objects:
        return None
    taken = np.arange(len(curve.score) + 1)
    hits = np.append(0, np.rint(curve.recall * objects))
    f1 = 2 * hits / (taken + objects)
    score = np.append(curve.score, 0.0)
    # equal scores are taken together
    last = np.append(True, score[1:] != score[:-1])
    best = int(np.argmax(np.where(last, f1, 0.0)))
    if not f1[best]:
        return None
    at = np.searchsorted(-curve.score, -SCORES, side="right")
    return ScoreThreshold(float(score[best - 1] + score[best]) / 2, float(f1[best]), f1[at].round(4).tolist())


def to_json(thresholds: Mapping[str, ScoreThreshold]) -> dict[str, Any]:
    """Return what a run's ``result.json`` holds of them under ``thresholds``."""
    return {name: asdict(one) for name, one in thresholds.items()}


def read_thresholds(run: str | Path) -> dict[str, ScoreThreshold]:
    """Return those of a finished run's folder; {} where nothing was validated, or it isn't finished."""
    folder = RunFolder(run)
    found = folder.result().get(THRESHOLDS) if folder.done else None
    kind, remedy = dict[str, ScoreThreshold] | None, "remove the file to run this again"
    return from_json(kind, found, str(folder.result_path), remedy, THRESHOLDS) or {}
