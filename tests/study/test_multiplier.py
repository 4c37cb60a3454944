"""Compute multipliers of curves that are known."""

import itertools
import math

import numpy as np
import pytest

from stem_jax.study.multiplier import multipliers, reach
from stem_jax.study.panels import panels_of
from tests.study_records import record, runs

CURVE = [(1000, 3.0), (2000, 2.0), (4000, 1.5)]


def test_tokens_are_interpolated_in_their_logarithm():
    assert reach(CURVE, 2.0) == (pytest.approx(2000), "")
    # Half of the bits are half of the logarithm.
    assert reach(CURVE, 2.5) == (pytest.approx(1000 * math.sqrt(2)), "")
    assert reach(CURVE, 1.75) == (pytest.approx(2000 * math.sqrt(2)), "")


def test_nothing_is_said_beyond_the_lengths():
    assert reach(CURVE, 1.4) == (4000, "at least")
    assert reach(CURVE, 3.1) == (1000, "at most")
    assert reach(CURVE, 3.0) == (1000, "")
    assert reach(CURVE, 1.5)[1] == ""


def test_a_curve_that_rises_again_is_reached_the_first_time():
    assert reach([(1000, 3.0), (2000, 2.0), (4000, 2.2), (8000, 1.0)], 2.1)[0] < 2000


def _dense(noise=0.0):
    found = []
    for seed in range(1, 6):
        shift = noise * (seed - 3)
        found.append(record("dense", seed, 2.0 + shift))
        for tokens, bits in ((2000, 2.4), (3000, 2.2), (5000, 1.9), (6000, 1.8)):
            found.append(record("dense", seed, bits + shift, tokens=tokens, purpose="length"))
    return found


def test_flops_are_counted_in_two_ways():
    size = {"active_parameters": 500, "compiled_flops_per_token": 6100.0 * 0.8}
    records = [*_dense(), *(record("stem_half", s, 1.9, size=size) for s in range(1, 6))]
    found = multipliers(records, panels_of(records)[0])
    assert [point["tokens"] for point in found["lengths"]] == [2000, 3000, 4000, 5000, 6000]
    spent = found["variants"]["stem_half"]
    # Dense ends there after 5000 tokens, stem half after 4000 at a part of the cost for each.
    assert spent["active"]["multiplier"] == pytest.approx(5000 / 4000 / 0.5)
    assert spent["compiled"]["multiplier"] == pytest.approx(5000 / 4000 / 0.8)
    assert spent["active"]["low"] == pytest.approx(spent["active"]["high"])
    assert list(found["variants"]) == ["stem_half"]


def test_the_interval_is_over_seeds_and_knows_its_bounds():
    values = {1: 1.88, 2: 1.90, 3: 1.92, 4: 1.91, 5: 1.89}
    records = [*_dense(), *(record("stem_half", s, bits) for s, bits in values.items())]
    spent = multipliers(records, panels_of(records)[0])["variants"]["stem_half"]["active"]
    assert spent["low"] < spent["multiplier"] < spent["high"]
    assert (spent["bound"], spent["low_bound"], spent["high_bound"]) == ("", "", "")
    # All 3,125 draws of five, which the 2,000 are a sample of.
    means = [sum(draw) / 5 for draw in itertools.product(values.values(), repeat=5)]
    low, high = np.percentile(means, [2.5, 97.5])
    curve = [(2000, 2.4), (3000, 2.2), (4000, 2.0), (5000, 1.9), (6000, 1.8)]
    assert spent["low"] == pytest.approx(reach(curve, high)[0] / 4000, rel=0.002)
    assert spent["high"] == pytest.approx(reach(curve, low)[0] / 4000, rel=0.002)
    # Beyond the longest in some draws only: the multiplier stands, its upper end is a bound.
    nearer = {1: 1.84, 2: 1.75, 3: 1.84, 4: 1.84, 5: 1.74}
    records = [*_dense(), *(record("stem_half", s, bits) for s, bits in nearer.items())]
    spent = multipliers(records, panels_of(records)[0])["variants"]["stem_half"]["active"]
    assert (spent["bound"], spent["low_bound"], spent["high_bound"]) == ("", "", "at least")
    assert spent["high"] == pytest.approx(1.5)


def test_seeds_are_drawn_in_pairs():
    # Dense and stem half have the same large swings: the interval does not see them.
    shift = 0.3
    records = _dense(shift)
    records += [record("stem_half", s, 1.9 + shift * (s - 3)) for s in range(1, 6)]
    spent = multipliers(records, panels_of(records)[0])["variants"]["stem_half"]["active"]
    assert spent["low"] == pytest.approx(spent["high"]) == pytest.approx(1.25)


def test_what_cannot_be_said():
    records = [*runs("dense", 0), *runs("stem_half", -0.02)]
    assert multipliers(records, panels_of(records)[0])["variants"] == {}
    records = [*_dense(), record("stem_half", 1, 1.9)]
    spent = multipliers(records, panels_of(records)[0])["variants"]["stem_half"]["active"]
    assert spent["low"] is None and spent["multiplier"] == pytest.approx(1.25)
    records[-1]["diverged"] = 3
    assert multipliers(records, panels_of(records)[0])["variants"] == {}
