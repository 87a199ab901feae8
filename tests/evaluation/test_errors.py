"""Errors by kind, confusion and counts of objects, against plain loops and by hand."""

import numpy as np
import pytest

from nst_det.evaluation.boxes import ObjectCounts, count_objects
from nst_det.evaluation.errors import KINDS, analyze_errors
from nst_det.evaluation.voc import evaluate_voc
from tests.helpers.boxes import CLASSES, found, overlap, truth

A, B, C = (1, 1, 20, 20), (41, 41, 60, 60), (81, 1, 100, 20)


def by_loops(objects, rows, least):
    """({kind: number}, {(true, predicted): number}), one detection after another; None is background or nothing."""
    rows = sorted((row for row in rows if row[3] >= least[row[1]]), key=lambda row: -row[3])
    kinds, cells = dict.fromkeys(KINDS, 0), {}
    found_objects, excused, taken_for = set(), set(), {}
    alone = []
    for place, (image, name, box, _) in enumerate(rows):
        there = [(overlap(box, o[2]), m) for m, o in enumerate(objects) if o[0] == image]
        own, mine = max(((v, -m) for v, m in there if objects[m][1] == name), default=(0.0, 1))
        other, theirs = max(((v, -m) for v, m in there if objects[m][1] != name), default=(0.0, 1))
        mine, theirs = -mine, -theirs
        if own >= 0.5 and objects[mine][3]:
            continue
        if own >= 0.5 and mine not in found_objects:
            found_objects.add(mine)
            cells[name, name] = cells.get((name, name), 0) + 1
            continue
        alone.append((place, name))
        if 0.1 <= own < 0.5:
            kinds["localization"] += 1
            excused.add(mine)
        elif other >= 0.5:
            kinds["class"] += 1
            excused.add(theirs)
            taken_for.setdefault(theirs, (place, name))
        elif own >= 0.5:
            kinds["duplicate"] += 1
        elif max(own, other) < 0.1:
            kinds["background"] += 1
        else:
            kinds["both"] += 1
    for m, (_, name, _, difficult) in enumerate(objects):
        if difficult or m in found_objects:
            taken_for.pop(m, None)
            continue
        kinds["missed"] += m not in excused
        place, as_name = taken_for.get(m, (None, None))
        cells[name, as_name] = cells.get((name, as_name), 0) + 1
        if as_name:
            alone.remove((place, as_name))
    for _, name in alone:
        cells[None, name] = cells.get((None, name), 0) + 1
    return kinds, cells


def random_case(seed):
    rng = np.random.default_rng(seed)
    places = [(image, (x, y, x + 19, y + 23)) for image in "abc" for x in (1, 15, 61) for y in (1, 12, 51)]
    objects = [(*places[i][:1], CLASSES[rng.integers(2)], places[i][1], bool(rng.random() < 0.2))
               for i in rng.permutation(len(places))[:13]]  # fmt: skip
    rows = []
    for number in range(60):
        image, box = places[rng.integers(len(places))]
        box = np.add(box, rng.integers(-9, 10, 4) * (number % 3) // 2)
        rows.append((image, CLASSES[rng.integers(2)], tuple(box.tolist()), float(rng.permutation(1000)[0] / 1000)))
    return objects, rows


@pytest.mark.parametrize("seed", range(12))
def test_errors_equal_those_of_loops(seed):
    objects, rows = random_case(seed)
    least = {"cat": 0.3, "dog": 0.55}
    analysis = analyze_errors(found(rows), truth(objects), [least[name] for name in CLASSES])
    kinds, cells = by_loops(objects, rows, least)
    assert dict(zip(KINDS, analysis.kinds.tolist())) == kinds
    names = [*CLASSES, None]
    there = {(names[i], names[j]): n for (i, j), n in np.ndenumerate(analysis.confusion) if n}
    assert there == cells
    # each object is in one row, each detection that counts in one column
    gold = truth(objects)
    counting = gold.label[~gold.difficult]
    assert analysis.confusion[:2].sum(axis=1).tolist() == [int((counting == label).sum()) for label in (0, 1)]
    curves = evaluate_voc(found(rows), gold).curves[0]
    counted = [int((curve.score >= least[name]).sum()) for name, curve in zip(CLASSES, curves)]
    assert analysis.confusion[:, :2].sum(axis=0).tolist() == counted
    assert analysis.kinds[:-1].sum() == sum(counted) - np.trace(analysis.confusion)


def test_the_cases_have_every_kind():
    all_kinds = sum(
        analyze_errors(found(rows), truth(objects), [0.3, 0.55]).kinds for objects, rows in map(random_case, range(12))
    )
    assert (all_kinds > 0).all()


@pytest.mark.parametrize(
    ("rows", "kind", "cell"),
    [
        ([], "missed", ("cat", None)),
        ([("a", "dog", A, 0.9)], "class", ("cat", "dog")),
        ([("a", "cat", (1, 1, 20, 8), 0.9)], "localization", (None, "cat")),
        ([("a", "dog", (1, 1, 20, 8), 0.9)], "both", (None, "dog")),
        ([("a", "cat", A, 0.9), ("a", "cat", A, 0.8)], "duplicate", (None, "cat")),
        ([("a", "dog", C, 0.9)], "background", (None, "dog")),
        # too low a score is as if it weren't there
        ([("a", "cat", A, 0.4)], "missed", ("cat", None)),
        ([("a", "cat", A, 0.9), ("a", "cat", B, 0.9)], None, None),
    ],
)
def test_each_kind_by_hand(rows, kind, cell):
    gold = truth([("a", "cat", A), ("a", "cat", B, True)])
    analysis = analyze_errors(found(rows), gold, [0.5, 0.5])
    numbers = dict(zip(KINDS, analysis.kinds.tolist()))
    # what is neither the object nor an answer to it leaves it missed
    missed = kind in ("missed", "both", "background")
    assert numbers == {name: int(name == kind) if name != "missed" else int(missed) for name in KINDS}
    if cell:
        names = [*CLASSES, None]
        assert analysis.confusion[names.index(cell[0]), names.index(cell[1])] == 1
    assert analysis.confusion[0].sum() == 1


def test_objects_are_counted_by_size_of_the_pixels_of_both_ends():
    sides = [32, 33, 96, 97]
    objects = [("a", "cat", (1, 1, side, side)) for side in sides] + [("a", "cat", (1, 1, 9, 9), True)]
    counts = count_objects(truth(objects))
    assert counts == {"cat": ObjectCounts(1, 2, 1, 1, (33 + 96) / 2), "dog": ObjectCounts(0, 0, 0, 0, None)}
    assert counts["cat"].objects == 4
    # two corners of one side are swapped
    assert count_objects(truth([("a", "cat", (30, 1, 10, 20))]))["cat"].side == 0
