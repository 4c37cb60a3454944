"""Dense against itself: Student's intervals find little, normal ones too much."""

import itertools

import numpy as np
import pytest

from stem_jax.study.panels import panels_of
from stem_jax.study.resampling import MOST_RESOLVED, planted, resample, share_resolved, splits
from tests.study_records import record, runs


def test_all_splits_are_there():
    found = splits()
    assert len(found) == 126
    assert all(sorted(half + other) == list(range(10)) for half, other in found)
    # No split is another one with its halves exchanged.
    assert len({frozenset((tuple(half), tuple(other))) for half, other in found}) == 126


def _normal(name="normal"):
    draw = np.random.RandomState(sum(map(ord, name)))
    return draw.randn(20, 10)


def test_intervals_of_student_resolve_as_often_as_they_say():
    shares = [share_resolved(values) for values in _normal()]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.02)
    assert max(shares) <= MOST_RESOLVED


def test_the_bar_is_missed_with_a_normal_factor():
    shares = [share_resolved(values, lambda level, degrees: 1.96) for values in _normal()]
    assert np.mean(shares) > 0.11
    assert np.mean([share > MOST_RESOLVED for share in shares]) > 0.8


def test_an_interval_of_each_split_is_that_of_the_pairs():
    # One random pairing of two runs each, by hand.
    values = [0.0, 1.0, 3.0, 7.0]
    draw, hits = np.random.RandomState(0), 0
    for half, other in splits(4):
        difference = np.subtract(
            [values[x] for x in half], [values[x] for x in draw.permutation(other)]
        )
        low, high = (
            difference.mean() + side * 12.706 * difference.std(ddof=1) / 2**0.5 for side in (-1, 1)
        )
        hits += not low <= 0 <= high
    assert share_resolved(values, pairings=1) == hits / 3


def test_measures_that_ten_runs_have():
    ten = [
        record("dense", seed, bits, measures={"spikes": 1.0, "gap": 0.01 * bits})
        for seed, bits in zip(itertools.count(1), _normal("ten")[0])
    ]
    ten[3]["measures"].pop("gap")
    (panel,) = panels_of(ten)
    found = resample(panel)
    # Spikes are the same in all: nothing can differ.
    assert sorted(found["shares"]) == ["dev_bits_per_byte", "test_bits_per_byte"]
    assert found["passes"] is True and found["splits"] == 126
    (panel,) = panels_of(ten[:9])
    assert resample(panel) == {**found, "runs": 9, "shares": {}, "passes": None}


def test_a_planted_difference_is_found():
    dense = runs("dense", 0)
    shorter = runs("dense", 0.02, tokens=3600, purpose="planted", noise=0.002)
    found = planted([*dense, *shorter], panels_of(dense)[0])
    assert found["found"] is True
    assert (found["tokens"], found["dense_tokens"]) == (3600, 4000)
    assert found["difference"]["mean"] == pytest.approx(0.02, abs=0.002)
    none = runs("dense", 0.0, tokens=3600, purpose="planted", noise=0.01)
    assert planted([*dense, *none], panels_of(dense)[0])["found"] is False
    assert planted(dense, panels_of(dense)[0]) is None
