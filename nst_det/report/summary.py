"""What a comparison found, in sentences that claim no more than its numbers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nst_det.comparison.published import PUBLISHED, Published
from nst_det.comparison.result import BASELINE, IMAGENET, MAP, ComparisonResult, RowResult
from nst_det.comparison.statistics import BETTER, NOISE, SINGLE, WORSE, Difference
from nst_det.engine.metrics import TOTALS
from nst_det.report.curves import Curves
from nst_det.report.tables import fraction, interval_text, signed

# more names than this would hide what a sentence says
MOST_NAMES = 4
# of a row that the verdict tells from ce
AGREES, CONTRADICTS = "agrees", "contradicts the paper"
UNTOLD = {NOISE: "can't be told", SINGLE: "can't be told (one seed)"}
TRANSFER = "loss_transfer_"


def question(results: ComparisonResult) -> str:
    """Return what the comparison answers."""
    return f"Which transfer method gives the better {results.measure.of}?"


def conclusion(results: ComparisonResult) -> str:
    """Return the result in some sentences, made from means and verdicts alone; with one seed it names no winner."""
    methods, leader = results.methods, results.leader
    if not methods or leader is None:
        return "No transfer method was compared: there is nothing to tell apart yet."
    return " ".join(part for part in (harm(results), published_start(results), _of_methods(results, leader)) if part)


def harm(results: ComparisonResult) -> str | None:
    """Return that a random backbone has a higher mAP than ce, or even than every method; None where it has not."""
    scratch, baseline = results.row("scratch"), results.row(BASELINE)
    if scratch is None or baseline is None or round(scratch.score - baseline.score, 3) <= 0:
        return None
    told = "did harm" if scratch.verdict == BETTER else "brought nothing"
    lowest = all(round(scratch.score - row.score, 3) > 0 for row in results.methods)
    return (
        f"Stage one {told}: a random backbone (scratch) has a mAP of {fraction(scratch.score)}, above ce "
        f"({fraction(baseline.score)}){' and every transfer method' if lowest else ''}."
    )


def published_start(results: ComparisonResult) -> str | None:
    """Return whether distillation helps a detector that begins from published weights; None where none does."""
    row = results.row(IMAGENET)
    if results.measure is not MAP or not results.methods or not (results.student_weights or row):
        return None
    known = {one.method: one.vs_imagenet for one in results.methods if one.vs_imagenet}
    lacking = ""
    if not results.student_weights:
        lacking = "the students begin from random weights; name published ones by DISTILL.STUDENT.WEIGHTS"
    elif not known:
        lacking = "no row begins from these weights without stage one; add ROWS [imagenet]"
    elif all(one.verdict == SINGLE for one in known.values()):
        best, most = max(known.items(), key=lambda item: item[1].mean)
        lacking = (
            f"one seed has no spread to judge by (the largest difference to imagenet is that of {best}, "
            f"{signed(most.mean)} mAP)"
        )
    answer = f"Not measured: {lacking}." if lacking else _against_imagenet(results, known)
    return f"Does distillation still help from published weights? {answer}"


def _against_imagenet(results: ComparisonResult, known: Mapping[str, Difference]) -> str:
    order = sorted(known, key=lambda name: -known[name].mean)
    better, worse = ([name for name in order if known[name].verdict == verdict] for verdict in (BETTER, WORSE))
    best, over = known[order[0]], f"over {len(results.seeds)} seeds"
    alone = "imagenet, the detector on these weights without stage one"
    largest = f"that of {order[0]}: {_gain(results, best.mean, best.interval)}."
    if better:
        baseline = results.row(BASELINE)
        ce = baseline and baseline.vs_imagenet
        too = f" So does ce, labels only ({signed(ce.mean)})." if ce and ce.verdict == BETTER else ""
        text = f"Yes: {over}, {listed(better)} {'beat' if len(better) > 1 else 'beats'} {alone}. The largest gain is "
        return text + largest + too + (f" Worse than imagenet: {listed(worse)}." if worse else "")
    if len(worse) == len(known):
        return f"No, it hurts: {over}, {listed(worse)} {'are' if len(worse) > 1 else 'is'} worse than {alone}."
    text = f"It can't be told from noise: {over}, no transfer method can be shown to beat {alone}. The largest"
    return f"{text} difference is {largest}" + (f" Worse than imagenet: {listed(worse)}." if worse else "")


def _gain(results: ComparisonResult, mean: float, interval: tuple[float, float] | None) -> str:
    text = interval_text(interval).strip("[]").replace(", ", " to ")
    return f"{signed(mean)} {results.measure.name}{f' (95 % interval {text})' if text else ''}"


def _of_methods(results: ComparisonResult, leader: RowResult) -> str:
    methods = results.methods
    if all(row.verdict == SINGLE for row in methods):
        return (
            f"With one seed there is no spread to judge by: of the transfer methods {leader.method} has the highest "
            f"{results.measure.name} ({fraction(leader.score)}, {signed(leader.delta_vs_ce)} against "
            f"{results.baseline}), but another seed could rank the rows differently."
        )
    ordered = sorted(methods, key=lambda row: -row.delta_vs_ce)
    better, worse, noise = ([row for row in ordered if row.verdict == verdict] for verdict in (BETTER, WORSE, NOISE))
    text = f"Over {len(results.seeds)} seeds, "
    if better:
        best = better[0]
        gain = _gain(results, best.delta_vs_ce, best.delta_interval)
        text += f"{_names(better)} {'beat' if len(better) > 1 else 'beats'} {_baseline(results)}"
        text += f". The largest gain is that of {best.method}: {gain}." if len(better) > 1 else f": {gain}."
    else:
        text += f"no transfer method {'can be shown to beat' if noise else 'beats'} {_baseline(results)}."
    if noise:
        which = f"{len(noise)} of the {len(methods)} methods" if len(noise) > MOST_NAMES else _names(noise)
        everyone = len(noise) == len(methods) > 1
        text += " Every difference lies" if everyone else f" For {which}, the difference lies"
        text += " within the noise."
    return text + (f" Worse than {results.baseline}: {_names(worse)}." if worse else "")


def _baseline(results: ComparisonResult) -> str:
    return f"{results.baseline} ({'labels only' if results.baseline == BASELINE else 'without stage one'})"


def caveats(results: ComparisonResult) -> list[str]:
    """Return what a careful reader should know before quoting the result; short sentences, the most important first."""
    notes = [f"{row} has no result: {reason}." for row, reason in (results.missing or {}).items()]
    to_baseline = {row.method: (row.verdict, row.p_holm) for row in results.methods}
    to_imagenet = {row.method: (one.verdict, one.p_holm) for row in results.methods if (one := row.vs_imagenet)}
    for reference, found in {results.baseline: to_baseline, IMAGENET: to_imagenet}.items():
        told = {name: p for name, (verdict, p) in found.items() if verdict in (BETTER, WORSE)}
        if lost := [name for name, p in told.items() if p is not None and p >= 0.05]:
            notes.append(
                "Each interval is that of its row alone. With Holm's correction for the number of rows, "
                f"{listed(lost)} would no longer count as different from {reference} (p ≥ 0.05)."
            )
    notes += [note for note in (not_above(results), unequal_weights(results)) if note]
    scratch, baseline, bare = (results.row(method) for method in ("scratch", BASELINE, "no-fpn"))
    if scratch and baseline:
        gain = signed(baseline.score - scratch.score)
        unlike = f", which is trained with {'; '.join(scratch.differs)}" if scratch.differs else ""
        notes.append(f"Stage one with labels only: the mAP of ce is {gain} against that of a random backbone{unlike}.")
    if bare:
        notes.append(
            f"FPN itself: without it the detector on the backbone of ce has mAP {fraction(bare.score)}, "
            f"{f'{signed(bare.delta_vs_ce)} {interval_text(bare.delta_interval)}'.strip()} against ce with it."
        )
    return notes


def not_above(results: ComparisonResult) -> str | None:
    """Return which methods have no higher score than ce, and by how much; None where there is nothing to compare."""
    if not results.methods:
        return None
    # by the digits that the table has
    below = [row for row in results.methods if round(row.delta_vs_ce, 3) <= 0]
    below.sort(key=lambda row: row.delta_vs_ce)
    if not below:
        return f"Each method's row has a higher {results.measure.name} than {results.baseline}."
    return f"Not above {results.baseline}: {listed([f'{row.method} ({signed(row.delta_vs_ce)})' for row in below])}."


def unequal_weights(results: ComparisonResult) -> str | None:
    """Return whether the methods' weights were found on unequal terms; None where all are alike or nothing is known."""
    by_source: dict[str, list[str]] = {}
    for row in results.methods:
        if row.weights:
            by_source.setdefault(row.weights_from, []).append(row.method)
    if len(by_source) < 2:
        return None
    parts = "; ".join(f"{source}: {', '.join(methods)}" for source, methods in by_source.items())
    return (
        f"Weights were not chosen alike ({parts}), so a difference between two methods may be one of their "
        "weights; nst-det tune searches all of them with the same budget."
    )


def _names(rows: Sequence[RowResult]) -> str:
    return listed([row.method for row in rows])


def listed(names: Sequence[str]) -> str:
    """Return ``a``, ``a and b``, or ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def published(results: ComparisonResult) -> list[Published]:
    """Return the tables of papers beside this one that have one of its methods."""
    tables = [PUBLISHED[name] for name in results.published if name in PUBLISHED]
    return [table for table in tables if any(row.method in {*table.figures, *table.top1} for row in results.methods)]


def against_paper(results: ComparisonResult, table: Published) -> list[dict[str, Any]]:
    """Return each row that a published table has, with the numbers of both, fractions.

    ``paper`` and ``here`` are the differences in the score to ce.
    """
    lines = []
    for row in results.rows:
        figure, top1 = table.figures.get(row.method), table.top1.get(row.method)
        if figure is None and top1 is None:
            continue
        gain = None if figure is None or not row.is_method else (figure - table.figures[BASELINE]) / 100
        missing = "the baseline" if row.method == BASELINE else f"no {table.measure.name} in the paper"
        line = {
            "method": row.method,
            "paper_score": None if figure is None else figure / 100,
            "score": row.score,
            "paper": gain,
            "here": row.delta_vs_ce if row.is_method else None,
            "paper_top1": None if top1 is None else top1 / 100,
            "top1": row.top1,
            "direction": missing if gain is None else _direction(row, gain),
        }
        lines.append(line)
    return lines


def _direction(row: RowResult, gain: float) -> str:
    """Return whether a row told from ce is on the side of it on which the paper has it."""
    return UNTOLD.get(row.verdict) or (AGREES if (row.verdict == BETTER) == (gain > 0) else CONTRADICTS)


def paper_order(results: ComparisonResult, table: Published) -> str | None:
    """Return whether the rows are in the paper's order by their score; None with fewer than two of its methods."""
    rows = [row for row in results.methods if row.method in table.figures]
    if len(rows) < 2:
        return None
    here = [row.method for row in sorted(rows, key=lambda row: (-row.score, row.method))]
    paper = sorted(here, key=lambda method: -table.figures[method])
    text = f"By {table.measure.name} the paper has {' > '.join(paper)}, "
    if here == paper:
        return text + "and so has this comparison."
    return text + f"this comparison {' > '.join(here)}: the paper's order is not reproduced here."


def checkpoint_lines(results: ComparisonResult) -> list[dict[str, Any]]:
    """Return mAP (means over seeds) of the best and last checkpoint on the validation split, and steps of the best."""
    lines = []
    for row in results.rows:
        known = [one for seed in row.per_seed.values() if (one := seed.checkpoints)]
        known = [one for one in known if one.best.map is not None and one.last.map is not None]
        if known:
            best, last = (fmean(getattr(one, name).map for one in known) for name in ("best", "last"))
            line = {"method": row.method, "best": best, "last": last, "steps": [one.best.step for one in known]}
            lines.append({**line, "tested": known[0].tested})
    return lines


def term_shares(distill_losses: Curves, detect_losses: Curves) -> list[dict[str, Any]]:
    """Return the terms, means over seeds, of all methods that have a term besides the task's own loss.

    In stage two the detector's own losses are one line, because they are what the transfer terms work against.
    """
    lines = []
    for method, terms in _ends_by_method(distill_losses).items():
        lines += _shares("one", method, terms)
    for method, terms in _ends_by_method(detect_losses).items():
        own = [ends for name, ends in terms.items() if not name.startswith(TRANSFER)]
        taught = {name.removeprefix(TRANSFER): ends for name, ends in terms.items() if name.startswith(TRANSFER)}
        if taught and own:
            first, last = zip(*own)
            taught = {"the detector's own": (sum(first), sum(last)), **taught}
        lines += _shares("two", method, taught)
    return lines


def _ends_by_method(curves: Curves) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the first and last value of each term, by method; sums of terms are left out."""
    methods: dict[str, dict[str, tuple[float, float]]] = {}
    for name, by_method in curves.items():
        if (name := name.removeprefix("loss/")) not in TOTALS:
            for method, curve in by_method.items():
                methods.setdefault(method, {})[name] = (float(curve.mean[0]), float(curve.mean[-1]))
    return methods


def _shares(stage: str, method: str, ends: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Return the value of each term at the start and at the end, and its share of the sum there, 0..1."""
    if len(ends) < 2:
        return []
    first, last = (sum(value[at] for value in ends.values()) or 1.0 for at in (0, 1))
    line = {"stage": stage, "method": method}
    return [
        {**line, "term": term, "first": a, "last": b, "first_share": a / first, "last_share": b / last}
        for term, (a, b) in ends.items()
    ]
