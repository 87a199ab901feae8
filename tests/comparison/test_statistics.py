import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nst_det.comparison.statistics import differences_to, holm, mean_std, paired_difference


def test_mean_and_sample_deviation_by_hand():
    # deviations -2, -1, 3: squares sum to 14, divided by n - 1 = 2
    assert mean_std([1.0, 2.0, 6.0]) == (3.0, math.sqrt(7.0))
    assert mean_std([0.25]) == (0.25, None)


def test_interval_of_three_seeds_by_hand():
    # differences .1 .2 .3: mean .2, deviation .1, error .1/sqrt(3); with 2 degrees t(.975) = .95 sqrt(2 / (1 - .95^2))
    row, base = {0: 0.6, 1: 0.5, 2: 0.9}, {0: 0.5, 1: 0.3, 2: 0.6}
    difference = paired_difference(row, base)
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.1 / math.sqrt(3)
    assert reach == pytest.approx(4.3027 * 0.057735, rel=1e-4)
    assert difference.mean == pytest.approx(0.2, abs=1e-15)
    assert difference.interval == pytest.approx((0.2 - reach, 0.2 + reach), abs=1e-12)
    assert difference.verdict == "noise"  # .2 - .2484 < 0
    # the t distribution with 2 degrees has the closed form P(|T| > t) = 1 - t / sqrt(t*t + 2)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert difference.p_value == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-12)


@pytest.mark.parametrize(("shift", "verdict"), [(0.3, "better"), (-0.3, "worse"), (0.0, "noise")])
def test_verdict_follows_the_interval(shift, verdict):
    base = {0: 0.50, 1: 0.60, 2: 0.55}
    row = {0: 0.51 + shift, 1: 0.60 + shift, 2: 0.54 + shift}
    assert paired_difference(row, base).verdict == verdict


def test_one_common_seed_has_no_spread_to_judge_by():
    difference = paired_difference({0: 0.75, 7: 0.1}, {0: 0.5, 1: 0.25})
    assert (difference.mean, difference.interval, difference.p_value) == (0.25, None, None)
    assert difference.verdict == "single seed"


def test_equal_differences_leave_no_doubt():
    assert paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25}).interval == (0.25, 0.25)
    assert paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25}).verdict == "better"
    same = paired_difference({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25})
    assert (same.verdict, same.p_value) == ("noise", 1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_interval_and_p_value_are_scipys(pairs):
    row = {seed: pair[0] for seed, pair in enumerate(pairs)}
    base = {seed: pair[1] for seed, pair in enumerate(pairs)}
    difference = paired_difference(row, base)
    spread = {a - b for a, b in pairs}
    if max(spread) - min(spread) > 1e-6:
        oracle = stats.ttest_rel(*zip(*pairs))
        assert difference.p_value == pytest.approx(oracle.pvalue, rel=1e-6)
        assert difference.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=1e-6, abs=1e-9)
        if abs(difference.p_value - 0.05) > 1e-9:
            assert (difference.p_value < 0.05) == (difference.verdict in ("better", "worse"))


def test_differences_to_one_of_the_rows():
    scores = {"a": {0: 0.75, 1: 0.5}, "b": {0: 0.5, 1: 0.25}, "c": {0: 0.5, 1: 0.5}}
    found = differences_to("b", scores)
    assert {name: (one.mean, one.verdict) for name, one in found.items()} == {
        "a": (0.25, "better"), "b": (0.0, "reference"), "c": (0.125, "noise"),
    }  # fmt: skip
    # p of c is .5 (t = 1 with one degree of freedom), that of a 0: Holm doubles the smaller alone
    assert [found[name].p_holm for name in "abc"] == [0.0, None, pytest.approx(0.5)]


def test_holm_by_hand():
    # sorted .01 .02 .04 times 3, 2, 1 -> .03 .04 .04
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # a later one is never smaller than an earlier one, and none is above 1
    assert holm([0.5, 0.9, 0.01]) == pytest.approx([1.0, 1.0, 0.03])
    assert holm([None, 0.02, None]) == [None, 0.02, None]
    assert holm([]) == []
