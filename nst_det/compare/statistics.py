"""Means, spreads and paired differences over seeds, and when a difference is no more than noise.

Runs of one seed share the batches of stage one, the data order of stage two and the initialization of the
detector's heads, so the difference to the baseline is taken within each seed and its spread judged over seeds
(paired t-test).  The verdict is that of the 95 % interval of each row by itself, with no correction for the
number of rows; Holm's corrected p-value stands beside it for who reads many rows at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
REFERENCE, SINGLE, NOISE, BETTER, WORSE = "reference", "single seed", "noise", "better", "worse"
EXPLANATION = (
    "delta_vs_ce is the mean over seeds of (row - ce) within one seed; delta_interval is its two-sided 95 % "
    "t-interval. 'better' and 'worse': the interval leaves out 0; 'noise': it holds 0; 'single seed': there is no "
    "spread to judge by. Verdicts are not corrected for the number of rows; p_holm is (Holm, over all rows but ce)."
)


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline over ``n`` common seeds.

    ``interval`` (low, high) and ``p_value`` (two-sided) are None where fewer than two seeds are common.
    """

    mean: float
    n: int
    interval: tuple[float, float] | None
    p_value: float | None
    verdict: str


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1; None for a single value).

    Example:
        >>> mean_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
        >>> mean_std([1.0])
        (1.0, None)

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    row: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference:
    """The difference ``row - baseline`` by seed, with Student's t-interval over the seeds that both have.

    Args:
        row: value by seed.
        baseline: value by seed.
        confidence: of the two-sided interval, between 0 and 1.

    Example:
        >>> paired_difference({0: 0.75}, {0: 0.5}).verdict
        'single seed'

    Raises:
        ValueError: no seed is common to both.
    """
    seeds = sorted(set(row) & set(baseline))
    mean, std = mean_std([row[seed] - baseline[seed] for seed in seeds])
    if std is None:
        return Difference(mean, 1, None, None, SINGLE)
    n = len(seeds)
    error = std / math.sqrt(n)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    interval = (mean - reach, mean + reach)
    verdict = BETTER if interval[0] > 0 else WORSE if interval[1] < 0 else NOISE
    return Difference(mean, n, interval, _p_value(mean, error, n), verdict)


def _p_value(mean: float, error: float, n: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down corrected p-values, in the order given; None stays None and doesn't count.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.02, 0.25, None])
        [0.04, 0.25, None]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[index] = highest
    return corrected
