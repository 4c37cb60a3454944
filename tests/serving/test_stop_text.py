"""Stop strings: the same text however it is cut, and nothing of one goes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.serving.stop_text import StopText

LETTERS = st.text("ab", min_size=1, max_size=4)


def _expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first place where one is whole, the longest of those that end there."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=6),
    stops=st.lists(LETTERS, max_size=4),
)
def test_the_text_ends_before_the_first_that_is_whole(pieces, stops):
    stop = StopText(stops)
    expected, found = _expected("".join(pieces), stops)
    given_out = ""
    for piece in pieces:
        given_out += stop.push(piece)
        assert expected.startswith(given_out)
    assert stop.found == found
    assert given_out + stop.flush() == expected


@pytest.mark.parametrize(
    ("stops", "certain"),
    [([], "xab"), (["abc"], "x"), (["bq"], "xa"), (["q"], "xab")],
)
def test_only_what_may_begin_a_stop_string_is_held_back(stops, certain):
    assert StopText(stops).push("xab") == certain
