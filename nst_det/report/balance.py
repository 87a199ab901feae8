"""How much of a method's loss each of its terms makes up, at the start and at the end of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nst_det.report.curves import Curve, Curves, Training
from nst_det.runtime.metrics import TOTALS

TRANSFER = "loss_transfer_"


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
