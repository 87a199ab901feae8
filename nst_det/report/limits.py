"""What a comparison can't tell, each only where it applies and with the numbers that say so."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean, variance

from nst_det.comparison.result import MAP, MEASURES, TEACHER, TOP1, ComparisonResult
from nst_det.comparison.statistics import SINGLE
from nst_det.report.curves import Curve, Curves
from nst_det.report.summary import MOST_NAMES, listed
from nst_det.report.tables import fraction, signed

# test objects of a class, below which its AP moves by two hundredths or more with each object
FEW_OBJECTS = 50
# standard error of a top-1 by its number of images alone
COARSE = 0.02
# 11-point AP of a class is 1/11 once its most certain detection is right; below two such points nothing is ranked
WEAK = 2 / 11
# the part of its whole fall that a flat loss makes in the last quarter of the steps at most
FLAT = 0.1
# rise of an accuracy between the last two evaluations
RISE = 0.02
NAMES = {measure.key: measure.name for measure in (*MEASURES.values(), TOP1, MAP)}


def limits(results: ComparisonResult, distill: dict[str, Curves], detect: dict[str, Curves]) -> list[str]:
    """Return short sentences, the most important first; the curves are those of ``read_curves`` for each stage."""
    # rows with terms of stage two share the backbone of another row
    backbones = {next(iter(row.per_seed.values())).distill_run: row.method for row in reversed(results.rows)}
    found = (
        _weak(results),
        _spread(results),
        _teacher(results),
        _objects(results),
        _validation(results),
        _unfinished("Stage one", distill, ("loss/ce", "loss/total"), list(backbones.values())),
        _unfinished("Stage two", detect, ("total_loss", "loss"), [row.method for row in results.rows]),
    )
    return [line for lines in found for line in lines]


def _some(parts: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = len(parts) - MOST_NAMES
    return listed(list(parts) if more < 2 else [*parts[:MOST_NAMES], f"{more} more"])


def _weak(results: ComparisonResult) -> Iterator[str]:
    best = max((row for row in results.rows if row.method != TEACHER), key=lambda row: row.score)
    if results.measure is MAP and best.score < WEAK:
        yield (
            f"The highest mAP is {fraction(best.score)} ({best.method}). A class has an 11-point AP of .091 once its "
            "most certain detection is right, so detectors this weak can't rank methods."
        )


def _spread(results: ComparisonResult) -> Iterator[str]:
    seeds, single = results.seeds, [row.method for row in results.rows if row.verdict == SINGLE]
    if len(seeds) == 1:
        yield f"One seed ({seeds[0]}): nothing says how far another one would be from these numbers."
    elif single:
        yield f"Only one seed is shared with {results.baseline} by {listed(single)}: no spread to judge by."
    if len(seeds) == 2:
        yield "Two seeds give very wide intervals; three or more tell differences apart far better."
    if sum(row.delta_interval is not None for row in results.methods) > 1:
        yield f"Intervals compare a method with {results.baseline}, not two methods with each other."


def _teacher(results: ComparisonResult) -> Iterator[str]:
    taught = results.teacher.top1 if results.teacher else None
    known = {row.method: row.top1 for row in results.rows if row.method != TEACHER and row.top1 is not None}
    # by the digits that are shown
    better = [name for name, top1 in known.items() if taught is not None and round(top1 - taught, 3) > 0]
    if better:
        better.sort(key=lambda name: -known[name])
        names = _some([f"{name} ({fraction(known[name])})" for name in better])
        yield (
            f"The teacher's top-1 is {fraction(taught)}, below that of {names}: what imitates it is held back by "
            "it, and a better teacher could rank the methods differently."
        )
    upper = results.row(TEACHER)
    above = sorted(
        (row for row in results.rows if upper and round(row.score - upper.score, 3) > 0), key=lambda row: -row.score
    )
    if upper and above:
        names = _some([f"{row.method} ({fraction(row.score)})" for row in above])
        yield f"The detector on the teacher's backbone has mAP {fraction(upper.score)}, below {names}: no upper mark."


def _objects(results: ComparisonResult) -> Iterator[str]:
    counts = next((row.objects_per_class for row in results.rows if row.objects_per_class), {})
    if none := [name for name, count in counts.items() if not count]:
        yield f"No test object of {_some(none)}: mAP says nothing about {'it' if len(none) == 1 else 'them'}."
    few = sorted(((count, name) for name, count in counts.items() if 0 < count < FEW_OBJECTS), key=lambda one: one[0])
    if few:
        smallest, rarest = few[0]
        yield (
            f"Few test objects (below {FEW_OBJECTS}): {_some([f'{name} {count}' for count, name in few])}. One object "
            f"found or missed is {fraction(1 / smallest)} of the recall of {rarest}."
        )


def _validation(results: ComparisonResult) -> Iterator[str]:
    known = [
        (seed.val_images, seed.top1)
        for row in results.rows
        for seed in row.per_seed.values()
        if seed.val_images and seed.top1 is not None
    ]
    if known:
        images, top1 = min(known, key=lambda one: one[0])
        error = math.sqrt(top1 * (1 - top1) / images)
        if error > COARSE:
            yield (
                f"Top-1 of stage one is that of {images} validation images (or crops): at "
                f"{fraction(top1)} its standard error is {fraction(error)} by their number alone."
            )


def _unfinished(stage: str, curves: dict[str, Curves], losses: Sequence[str], rows: Collection[str]) -> Iterator[str]:
    """Return which losses still fell and which accuracies still rose when training ended."""
    by_method = next((curves["loss"][name] for name in losses if name in curves["loss"]), {})
    shares = {name: late_fall(curve) for name, curve in by_method.items() if name in rows}
    falling = {name: share for name, share in shares.items() if share > FLAT}
    if falling:
        parts = [f"{name} ({100 * share:.0f} %)" for name, share in sorted(falling.items(), key=lambda one: -one[1])]
        yield (
            f"{stage} was still learning when it ended: more than a tenth of the total drop in loss came in the last "
            f"quarter of the steps, for {_some(parts)}. A longer schedule could rank the rows differently."
        )
    for name, methods in curves["accuracy"].items():
        known = {method: last_rise(curve) for method, curve in methods.items() if method in rows}
        rises = {method: rise for method, rise in known.items() if rise > RISE}
        if rises and (what := NAMES.get(name.rsplit("/", 1)[-1])):
            parts = [f"{method} ({signed(rise)})" for method, rise in sorted(rises.items(), key=lambda one: -one[1])]
            yield f"{stage}: {what} still rose between the last two evaluations, for {_some(parts)}."


def late_fall(curve: Curve) -> float:
    """Return the part of a loss's whole fall, between its first and last eighth of steps, made in the last quarter.

    It is 0 where that is less than twice its standard error, or where there are too few points to tell.
    """
    eighths = (curve.steps - curve.steps[0]) * 8 / max(curve.steps[-1] - curve.steps[0], 1)
    first, before, last = (curve.mean[(eighths >= low) & (eighths <= low + 1)].tolist() for low in (0, 5, 7))
    if min(map(len, (first, before, last))) < 2 or (whole := fmean(first) - fmean(last)) <= 0:
        return 0.0
    fall = fmean(before) - fmean(last)
    error = math.sqrt(sum(variance(part) / len(part) for part in (before, last)))
    return fall / whole if fall > 2 * error else 0.0


def last_rise(curve: Curve) -> float:
    """Return by how much an accuracy rose between its last two evaluations; 0 where there is one."""
    return float(curve.mean[-1] - curve.mean[-2]) if len(curve.mean) > 1 else 0.0
