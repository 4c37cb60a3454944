"""Runs of words, duplicates among documents, and what training holds of held-out text."""

import sys

import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.study.held_runs import overall, overlap_of
from stem_jax.study.near_duplicates import find_duplicates, shared
from stem_jax.study.word_runs import WordRuns
from tests.study.archives import prose


def _words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def _found(*texts: str) -> list[tuple[str, int]]:
    runs = WordRuns()
    return find_duplicates(texts, [runs.of(text) for text in texts])


def test_a_run_is_of_13_words_whatever_stands_between_them():
    runs = WordRuns()
    assert len(runs.of(_words(*range(20)))) == 8
    assert len(runs.of(_words(*range(13)))) == len(runs.of(_words(1, 2))) == 1
    assert len(runs.of("")) == len(runs.of("... ---")) == 0
    np.testing.assert_array_equal(runs.of("One, TWO\n(three)"), runs.of("one two three"))
    # Each word counts at its place.
    first = _words(*range(13))
    for place in range(13):
        other = _words(*(99 if i == place else i for i in range(13)))
        assert runs.of(first) != runs.of(other)
    assert runs.of(first) != runs.of(_words(*reversed(range(13))))
    # Equal runs are counted once.
    assert len(runs.of(_words(*list(range(13)) * 3))) == 13


def test_duplicates_name_the_first_that_stays():
    one, other = prose(1), prose(2)
    # One word in the middle of 240: 13 runs of 228 differ.
    near = one.split()
    near[120] = "changed"
    changed = " ".join(near)
    assert _found(one, other, one, changed, changed) == [
        ("", -1),
        ("", -1),
        ("exact", 0),
        ("near", 0),
        ("exact", 0),
    ]


@pytest.mark.parametrize(("kept", "kind"), [(150, ""), (170, "near")])
def test_documents_are_near_from_half_of_their_runs(kept, kind):
    """Of 240 words the first 150 or 170: 138 of 318 runs (.43), or 158 of 298 (.53)."""
    one = prose(1).split()
    other = one[:kept] + prose(3).split()[kept:]
    assert _found(" ".join(one), " ".join(other))[1][0] == kind


def test_the_shared_part_is_counted_on_the_runs():
    one_n, other_n = np.arange(0, 6, dtype=np.uint64), np.arange(4, 10, dtype=np.uint64)
    assert shared(one_n, other_n) == 0.2
    empty_n = np.empty(0, np.uint64)
    assert shared(empty_n, empty_n) == 0.0


def test_overlap_by_hand():
    """Of 8 runs of a document, training holds the 3 that lie in its first 15 words."""
    runs = WordRuns()
    training = [runs.of(_words(*range(15))), runs.of(_words(*range(100, 120)))]
    held_out = [runs.of(_words(*range(20))), runs.of(_words(*range(100, 120))), runs.of("")]
    shares = overlap_of(held_out, training)
    assert shares == [3 / 8, 1.0, 0.0]
    assert overall(shares, held_out) == 11 / 16
    assert overlap_of(held_out, []) == [0.0, 0.0, 0.0]
    assert overall([0.0], [runs.of("")]) == 0.0


def test_a_missing_datasketch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(InputError, match="pip install datasketch"):
        _found(prose(1))
