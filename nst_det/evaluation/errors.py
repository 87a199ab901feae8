"""What is wrong with the detections above a score: a confusion matrix, and errors by kind.

The kinds are TIDE's (Bolya et al. 2020, arXiv 2008.08115), in the order of its code: of a detection that isn't a hit,
with its largest overlap with objects of its own class and of the others,

- localization: the own class has .1 to .5;
- class: another class has .5 or more;
- duplicate: the own class has .5 or more, but a better detection has that object;
- background: below .1 with everything;
- both: what is left, .1 to .5 with another class;

and an object that isn't found is missed unless a localization or class error is made on it.  Hits are those of VOC AP
at IoU .5, and so are the overlaps; ``difficult`` objects are neither found nor missed, and detections that VOC matches
to them are no errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.voc import best_match, best_pairs, judge, overlap_of, pairs_of

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("class", "localization", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class ErrorAnalysis:
    """Of K classes.

    Every object that isn't difficult is in one cell of ``confusion`` and every detection that counts too: a hit, an
    object with the best detection that takes it for another class, or one of the two alone.
    """

    # (K + 1, K + 1): true class by predicted class; last are detections on nothing new, and objects not found
    confusion: np.ndarray
    # (6,) their number, in the order of KINDS
    kinds: np.ndarray


def analyze_errors(detections: Detections, truth: GroundTruth, least: Sequence[float]) -> ErrorAnalysis:
    """Return the errors of detections that score at least what their class has in ``least``, K scores by label."""
    image, label = detections.indices(truth)
    order = np.lexsort((-detections.score, label))
    order = order[detections.score[order] >= np.asarray(least, dtype=np.float64)[label[order]]]
    image, label, box, score = image[order], label[order], detections.box[order], detections.score[order]
    own, own_object = best_match(image, label, box, truth)
    hit, counted = judge(own >= FOREGROUND, own_object, truth.difficult)
    rows, target = pairs_of(image, truth.image)
    other = label[rows] != truth.label[target]
    rows, target = rows[other], target[other]
    others, other_object = best_pairs(rows, target, overlap_of(box[rows], truth.box[target]), len(label))
    is_kind = {
        "localization": (own >= BACKGROUND) & (own < FOREGROUND),
        "class": others >= FOREGROUND,
        "duplicate": own >= FOREGROUND,
        "background": np.maximum(own, others) < BACKGROUND,
        "both": np.ones(len(label), dtype=bool),
    }
    left, by_kind = counted & ~hit, {}
    for kind, which in is_kind.items():
        by_kind[kind] = left & which
        left = left & ~which
    found = np.zeros(len(truth.label), dtype=bool)
    found[own_object[hit]] = True
    touched = found | truth.difficult
    confused = np.flatnonzero(by_kind["class"] & ~touched[other_object])
    confused = confused[np.argsort(-score[confused], kind="stable")]
    # each object with the best of its detections
    confused = confused[np.unique(other_object[confused], return_index=True)[1]]
    count = len(truth.classes)
    confusion = np.zeros((count + 1, count + 1), dtype=np.int64)
    as_other = np.zeros(len(label), dtype=bool)
    as_other[confused] = True
    not_found = ~touched
    not_found[other_object[confused]] = False
    np.add.at(confusion, (label[hit], label[hit]), 1)
    np.add.at(confusion, (truth.label[other_object[confused]], label[confused]), 1)
    np.add.at(confusion, (count, label[counted & ~hit & ~as_other]), 1)
    np.add.at(confusion, (truth.label[not_found], count), 1)
    touched[own_object[by_kind["localization"]]] = True
    touched[other_object[by_kind["class"]]] = True
    numbers = {kind: which.sum() for kind, which in by_kind.items()} | {"missed": (~touched).sum()}
    return ErrorAnalysis(confusion, np.array([numbers[kind] for kind in KINDS], dtype=np.int64))
