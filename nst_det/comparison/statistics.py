"""Paired differences between rows over seeds, and what is noise among them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

CONFIDENCE = 0.95
Verdict = Literal["reference", "single seed", "noise", "better", "worse"]
REFERENCE: Verdict = "reference"
SINGLE: Verdict = "single seed"
NOISE: Verdict = "noise"
BETTER: Verdict = "better"
WORSE: Verdict = "worse"
EXPLANATION = (
    "delta_vs_ce is the mean over seeds of (row - ce) within one seed; delta_interval is its two-sided 95 % "
    "t-interval. 'better' and 'worse': the interval leaves out 0; 'noise': it holds 0; 'single seed': there is no "
    "spread to judge by. Verdicts are not corrected for the number of rows; p_holm is (Holm, over all rows but ce). "
    "vs_imagenet is the same against the row imagenet, where the students begin from its weights."
)


@dataclass(frozen=True)
class Difference:
    """A paired difference; ``interval`` and the two-sided ``p_value`` are None where only one seed is common."""

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    verdict: Verdict
    p_holm: float | None = None  # the same, corrected for the number of rows


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (divisor n - 1; None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Return the difference ``row - baseline`` with Student's t-interval over the seeds that both have."""
    seeds = sorted(set(row) & set(baseline))
    mean, std = mean_std([row[seed] - baseline[seed] for seed in seeds])
    if std is None:
        return Difference(mean, None, None, SINGLE)
    # scipy takes a second to import
    from scipy import stats

    # not scipy's ttest_rel, which gives NaN and a warning where all differences are equal
    freedom, error = len(seeds) - 1, std / math.sqrt(len(seeds))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    verdict: Verdict = BETTER if mean - reach > 0 else WORSE if mean + reach < 0 else NOISE
    return Difference(mean, (mean - reach, mean + reach), p_value, verdict)


def differences_to(reference: str, scores: Mapping[str, Mapping[int, float]]) -> dict[str, Difference]:
    """Return the difference of each row (row -> seed -> score) to one of them, itself among them."""
    found = {row: paired_difference(values, scores[reference]) for row, values in scores.items()}
    found[reference] = Difference(0.0, None, None, REFERENCE)
    corrected = holm([difference.p_value for difference in found.values()])
    return {row: replace(one, p_holm=p_holm) for (row, one), p_holm in zip(found.items(), corrected)}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected step-down (S. Holm, 1979), in the order given; None stays None and doesn't count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[index] = highest
    return corrected
