"""Intervals and verdicts, against the t test of scipy and figures from tables."""

import math

import numpy as np
import pytest
from scipy import stats

from stem_jax.study.intervals import (
    SIDES,
    Interval,
    correlation,
    half_width_to_come,
    holm_levels,
    interval_of,
    paired,
    resolving_p,
    verdict_of,
)


def test_pairs_are_of_seeds_that_both_have():
    values = {3: 2.0, 1: 1.0, 2: None, 5: math.nan, 6: math.inf}
    against = {1: 0.5, 3: 0.0, 2: 1.0, 4: 1.0, 5: 1.0, 6: 1.0}
    assert list(paired(values, against).items()) == [(1, 0.5), (3, 2.0)]


def test_half_widths_of_tables():
    # 1.24 and 2.48 standard deviations of the differences, with 5 seeds and with 3.
    for values, factor in (([1.0, 2.0, 3.0, 4.0, 5.0], 1.2417), ([1.0, 2.0, 3.0], 2.4841)):
        found = interval_of(values)
        deviation = np.std(values, ddof=1)
        assert found.half_width == pytest.approx(factor * deviation, rel=1e-4)
        assert found.mean == np.mean(values) and found.seeds == len(values)
        assert (found.low + found.high) / 2 == pytest.approx(found.mean)


def test_half_widths_can_be_foreseen():
    first = [0.010, 0.014, 0.009]
    # 1.2417 standard deviations with five.
    found = half_width_to_come(first, 5)
    assert found == pytest.approx(1.2417 * np.std(first, ddof=1), rel=1e-4)
    assert half_width_to_come(first, 3) == pytest.approx(interval_of(first).half_width)
    assert half_width_to_come(first[:1], 5) is None and half_width_to_come(first, 1) is None


def test_fewer_than_two_seeds_have_no_interval():
    assert interval_of([]) is None
    assert interval_of([0.3]) == Interval(0.3, None, 1, 0.95)
    for side in SIDES:
        assert verdict_of(interval_of([-5.0]), side, 0.005) == "unresolved"
        assert verdict_of(None, side, 0.005) == "unresolved"
        assert resolving_p([-5.0], side, 0.005) == 1


@pytest.mark.parametrize(
    ("low", "high", "side", "verdict"),
    [
        (-0.02, -0.01, "below", "confirmed"),
        (0.01, 0.02, "below", "refuted"),
        (-0.01, 0.01, "below", "unresolved"),
        (0.01, 0.02, "above", "confirmed"),
        (-0.02, -0.01, "above", "refuted"),
        (-0.02, 0.01, "above", "unresolved"),
        (-0.004, 0.004, "equal", "confirmed"),
        (0.001, 0.004, "equal", "confirmed"),
        (0.006, 0.009, "equal", "refuted"),
        (-0.009, -0.006, "equal", "refuted"),
        (0.004, 0.006, "equal", "unresolved"),
        (-0.009, 0.009, "equal", "unresolved"),
        (-0.009, 0.004, "no_worse", "confirmed"),
        (-0.009, -0.007, "no_worse", "confirmed"),
        (0.006, 0.009, "no_worse", "refuted"),
        (0.001, 0.006, "no_worse", "unresolved"),
    ],
)
def test_verdicts(low, high, side, verdict):
    interval = Interval((low + high) / 2, (high - low) / 2, 5, 0.95)
    assert verdict_of(interval, side, 0.005) == verdict


@pytest.mark.parametrize("side", SIDES)
def test_an_interval_resolves_from_its_p_on(side):
    draw = np.random.RandomState(0)
    for _ in range(20):
        values = (draw.randn() * 0.01 + 0.004 * draw.randn(5)).tolist()
        p = resolving_p(values, side, 0.005)
        wider, narrower = interval_of(values, 1 - 0.99 * p), interval_of(values, 1 - 1.01 * p)
        assert verdict_of(wider, side, 0.005) == "unresolved"
        assert verdict_of(narrower, side, 0.005) != "unresolved"
        if side in ("below", "above"):
            assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_values_without_spread():
    assert resolving_p([0.0, 0.0], "below", 0) == 1
    assert resolving_p([-1.0, -1.0], "below", 0) == 0
    assert verdict_of(interval_of([0.0, 0.0]), "below", 0) == "unresolved"
    assert verdict_of(interval_of([-1.0, -1.0]), "below", 0) == "confirmed"


def test_holm_gives_each_claim_its_level():
    # .05 / 4, / 3, / 2: the third stops, and the fourth is read as it.
    levels = holm_levels([0.03, 0.001, 0.04, 0.01])
    np.testing.assert_allclose(levels, [1 - 0.025, 1 - 0.0125, 1 - 0.025, 1 - 0.05 / 3])
    np.testing.assert_allclose(holm_levels([0.02, 0.9, 0.8]), [1 - 0.05 / 3] * 3)
    np.testing.assert_allclose(holm_levels([0.0, 0.0, 0.0]), [1 - 0.05 / 3, 1 - 0.025, 0.95])
    assert holm_levels([]) == []


def test_correlation():
    pairs = [(1.0, 2.0), (2.0, 3.5), (4.0, 1.0), (5.0, 6.0)]
    assert correlation(pairs) == pytest.approx(np.corrcoef(*zip(*pairs))[0, 1])
    assert correlation(pairs[:2]) is None
    assert correlation([(1.0, 2.0)] * 4) is None
