"""What a comparison found, in sentences that claim no more than its numbers do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from nst_det.engine.metrics import TOTALS
from nst_det.report.curves import Curve, Curves, Training
from nst_det.report.schema import BASELINE, BETTER, LOWER_MARK, NO_FPN, NOISE, SINGLE, WORSE, Results, Row
from nst_det.report.tables import fraction, interval_text, signed

QUESTION = "Which transfer method gives the better detector?"
# more names than this would hide what a sentence says
MOST_NAMES = 4
# mAP in percent on PASCAL VOC 2007 test; Huang & Wang, "Like What You Like: Knowledge Distill via Neuron
# Selectivity Transfer", table 4 (Faster R-CNN, Inception-BN student).  NST is the polynomial kernel.
PAPER = {"ce": 75.6, "kd": 76.0, "fitnet": 76.6, "at": 76.5, "nst-poly": 76.8, "kd+nst-poly": 77.2}
# top-1 error in percent on ImageNet's validation set, table 3 (the same students, single crop)
PAPER_ERROR = {
    "ce": 25.74,
    "kd": 24.56,
    "fitnet": 25.30,
    "at": 25.10,
    "nst-poly": 24.82,
    "kd+fitnet": 24.48,
    "kd+at": 24.64,
    "kd+nst-poly": 24.34,
}
TRANSFER = "loss_transfer_"


def conclusion(results: Results) -> str:
    """The result in one or two sentences, made from the verdicts alone.

    With a single seed it says that there is no spread to judge by and names no winner.
    """
    methods = [row for row in results.rows if row.is_method]
    leader = results.leader
    if not methods or leader is None:
        return "No transfer method was compared: there is nothing to tell apart yet."
    if results.row(BASELINE) is None:
        return f"{leader.method} has the highest mAP ({fraction(leader.map)}), but there is no row ce to compare with."
    if all(row.verdict == SINGLE for row in methods):
        return (
            f"With one seed there is no spread to judge by: {leader.method} has the highest mAP "
            f"({fraction(leader.map)}, {signed(leader.delta)} against ce), "
            "but another seed may order the rows otherwise."
        )
    better, worse, noise = (_ordered(methods, verdict) for verdict in (BETTER, WORSE, NOISE))
    seeds = f"Over {len(results.seeds)} seeds"
    if better:
        best = better[0]
        interval = f" (95 % interval {interval_text(best).strip('[]').replace(', ', ' to ')})" if best.interval else ""
        gain = f"{signed(best.delta)} mAP{interval}"
        text = f"{seeds}, {_names(better)} {_verb(better, 'beats', 'beat')} ce (labels only)"
        text += f". The largest gain is that of {best.method}: {gain}." if len(better) > 1 else f": {gain}."
    elif noise:
        text = f"{seeds}, no transfer method can be told to beat ce (labels only)."
    else:
        text = f"{seeds}, no transfer method beats ce (labels only)."
    if noise:
        which = f"{len(noise)} of the {len(methods)} methods" if len(noise) > MOST_NAMES else _names(noise)
        everyone = len(noise) == len(methods) > 1
        text += " Every difference lies" if everyone else f" For {which}, the difference lies"
        text += " within the noise."
    if worse:
        text += f" Worse than ce: {_names(worse)}."
    return text


def caveats(results: Results) -> list[str]:
    """What a careful reader should know before quoting the result; short sentences, the weightiest first."""
    notes = []
    corrected = [row for row in results.rows if row.is_method and row.verdict in (BETTER, WORSE) and row.p_holm]
    lost = [row for row in corrected if row.p_holm is not None and row.p_holm >= 0.05]
    if lost:
        notes.append(
            f"Each interval stands for its row alone. With Holm's correction for the number of rows, "
            f"{_names(lost)} would no longer count as told from ce (p ≥ 0.05)."
        )
    notes += [note for note in (not_above(results), unequal_weights(results)) if note]
    scratch, baseline = results.row(LOWER_MARK), results.row(BASELINE)
    if scratch and baseline:
        gain = baseline.map - scratch.map
        notes.append(
            f"Stage one itself: a backbone trained with labels only (ce) gives {signed(gain)} mAP against a random one."
        )
    bare = results.row(NO_FPN)
    if bare and baseline and bare.delta is not None:
        interval = "" if bare.interval is None else f" {interval_text(bare)}"
        notes.append(
            f"FPN itself: without it the detector on the backbone of ce has mAP {fraction(bare.map)}, "
            f"{signed(bare.delta)}{interval} against ce with it."
        )
    single = [row for row in results.rows if row.verdict == SINGLE]
    if single and len(results.seeds) > 1:
        notes.append(f"Only one seed is shared with ce by {_names(single)}: no spread to judge by.")
    if len(results.seeds) == 2:
        notes.append("Two seeds give very wide intervals; three or more tell differences apart far better.")
    if sum(row.is_method and row.interval is not None for row in results.rows) > 1:
        notes.append("Intervals compare a method with ce, not two methods with each other.")
    return notes


def not_above(results: Results) -> str | None:
    """Which methods have no higher mAP than ce, and by how much; None where there is nothing to compare."""
    methods = [row for row in results.rows if row.is_method and row.delta is not None]
    if not methods or results.row(BASELINE) is None:
        return None
    below = sorted((row for row in methods if (row.delta or 0.0) <= 0), key=lambda row: row.delta or 0.0)
    if not below:
        return "Each method's row has a higher mAP than ce."
    return f"Not above ce: {_listed([f'{row.method} ({signed(row.delta)})' for row in below])}."


def unequal_weights(results: Results) -> str | None:
    """Whether the methods' weights were found on unequal terms; None where all are alike or nothing is known."""
    by_source: dict[str, list[str]] = {}
    for row in results.rows:
        if row.is_method and row.weights:
            by_source.setdefault(row.weights, []).append(row.method)
    if len(by_source) < 2:
        return None
    parts = "; ".join(f"{source}: {', '.join(methods)}" for source, methods in by_source.items())
    return (
        f"Weights are not of equal standing ({parts}), so a difference between two methods may be one of their "
        "weights; nst-det tune searches all of them with the same budget."
    )


def _ordered(rows: list[Row], verdict: str) -> list[Row]:
    return sorted((row for row in rows if row.verdict == verdict), key=lambda row: -(row.delta or 0.0))


def _names(rows: list[Row]) -> str:
    return _listed([row.method for row in rows])


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(rows: list[Row], one: str, many: str) -> str:
    return one if len(rows) == 1 else many


@dataclass(frozen=True)
class PaperLine:
    """One row beside the paper's; all numbers are fractions, None where the paper or the comparison has none.

    Attributes:
        method: its word.
        paper_map: mAP on VOC 2007 test (table 4).
        map: mAP here.
        paper: the paper's difference in mAP to its baseline; None for the baseline.
        here: the same here.
        paper_top1: top-1 accuracy on ImageNet (table 3).
        top1: top-1 accuracy of stage one here.
        says: what the two differences say together.
    """

    method: str
    paper_map: float | None
    map: float
    paper: float | None
    here: float | None
    paper_top1: float
    top1: float | None
    says: str


def against_paper(results: Results) -> list[PaperLine]:
    """Each row that the paper has, with the paper's numbers: does the difference to the baseline point the same way?

    In the paper every method beats the baseline, with one number each and no spread; so a row contradicts it
    only where the row is told to be worse than ce.  Empty where no method of the paper was compared.
    """
    words = {
        BETTER: "agrees",
        WORSE: "contradicts the paper",
        NOISE: "can't be told",
        SINGLE: "can't be told (one seed)",
    }
    lines = []
    for row in results.rows:
        if row.method in PAPER_ERROR:
            paper_map = PAPER[row.method] / 100 if row.method in PAPER else None
            told = row.is_method and paper_map is not None
            lines.append(
                PaperLine(
                    method=row.method,
                    paper_map=paper_map,
                    map=row.map,
                    paper=(PAPER[row.method] - PAPER[BASELINE]) / 100 if told else None,
                    here=row.delta if row.is_method else None,
                    paper_top1=1 - PAPER_ERROR[row.method] / 100,
                    top1=row.top1,
                    says=words[row.verdict] if told else "the baseline" if row.method == BASELINE else "not in table 4",
                )
            )
    return lines if any(line.method != BASELINE for line in lines) else []


def paper_order(results: Results) -> str | None:
    """Whether the rows are in the paper's order by mAP; None with fewer than two of its methods."""
    rows = [row for row in results.rows if row.is_method and row.method in PAPER]
    if len(rows) < 2:
        return None
    here = [row.method for row in sorted(rows, key=lambda row: (-row.map, row.method))]
    paper = sorted(here, key=lambda method: -PAPER[method])
    text = f"By mAP the paper has {' > '.join(paper)}, "
    if here == paper:
        return text + "and so has this comparison."
    return text + f"this comparison {' > '.join(here)}: the paper's order is not reproduced here."


@dataclass(frozen=True)
class CheckpointLine:
    """A row's checkpoints on the validation split; mAP are means over seeds, 0..1.

    Attributes:
        method: its word.
        best: mAP of the best checkpoint.
        steps: of the best checkpoint, one a seed.
        last: mAP of the last one.
        tested: which of them was tested, ``best`` or ``last``.
    """

    method: str
    best: float
    steps: tuple[int, ...]
    last: float
    tested: str


def checkpoint_lines(results: Results) -> list[CheckpointLine]:
    """Best and last checkpoint of each row that was looked at on a validation split."""
    lines = []
    for row in results.rows:
        known = [run.checkpoints for run in row.runs if run.checkpoints is not None]
        if known:
            best, last = (fmean(getattr(one, name).map for one in known) for name in ("best", "last"))
            steps = tuple(one.best.step for one in known)
            lines.append(CheckpointLine(row.method, best, steps, last, known[0].tested))
    return lines


@dataclass(frozen=True)
class TermShare:
    """One weighted term of one method: its value at the start and at the end, and its share of the sum there, 0..1."""

    stage: str
    method: str
    term: str
    first: float
    last: float
    first_share: float
    last_share: float


def term_shares(training: Training) -> list[TermShare]:
    """The terms of all methods that have a term beside the task's own loss; means over seeds.

    In stage two the detector's own losses are one line, because they are what the transfer terms work against.
    """
    lines = []
    for method, terms in _by_method(training.distill_losses).items():
        lines += _shares("one", method, terms)
    for method, terms in _by_method(training.detect_losses).items():
        taught = {name.removeprefix(TRANSFER): curve for name, curve in terms.items() if name.startswith(TRANSFER)}
        own = [curve for name, curve in terms.items() if not name.startswith(TRANSFER)]
        lines += _shares("two", method, taught, own)
    return lines


def _by_method(curves: Curves) -> dict[str, dict[str, Curve]]:
    methods: dict[str, dict[str, Curve]] = {}
    for name, by_method in curves.items():
        if name.removeprefix("loss/") not in TOTALS:
            for method, curve in by_method.items():
                methods.setdefault(method, {})[name.removeprefix("loss/")] = curve
    return methods


def _shares(stage: str, method: str, terms: Mapping[str, Curve], own: list[Curve] | None = None) -> list[TermShare]:
    ends = {name: (float(curve.mean[0]), float(curve.mean[-1])) for name, curve in terms.items()}
    if own and ends:
        sums = [sum(float(curve.mean[at]) for curve in own) for at in (0, -1)]
        ends = {"the detector's own": (sums[0], sums[1]), **ends}
    if len(ends) < 2:
        return []
    first, last = (sum(value[at] for value in ends.values()) or 1.0 for at in (0, 1))
    return [TermShare(stage, method, name, a, b, a / first, b / last) for name, (a, b) in ends.items()]
