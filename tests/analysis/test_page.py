"""The page without a browser: everything is escaped, numbers read as they should."""

import re

import pytest

from stem_jax.analysis.page import Beside, Picture, Row, Section, Table, render
from stem_jax.analysis.readable import count, plural

NASTY = '"><script>x</script>&'


def test_every_text_is_escaped():
    picture = Picture("a", b"png", NASTY)
    table = Table([NASTY], [[NASTY]], title=NASTY, note=NASTY, text=True)
    blocks = [NASTY, picture, Beside(picture, table), Row([picture], NASTY)]
    section = Section(NASTY, NASTY, blocks)
    page = render(NASTY, NASTY, [(NASTY, NASTY)], [section], NASTY)
    assert "<script" not in page
    plain = re.sub(r"&(quot|gt|lt|amp);", "", page)
    assert "&" not in plain
    # Title twice; subtitle, fact, link, section, blocks and foot.
    assert page.count("&lt;script&gt;") == 2 + 1 + 2 + 1 + 2 + 1 + 2 + (2 + 4) + 2 + 1
    assert [p.name for p in section.pictures()] == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (980, "980"),
        (12.5, "12.5"),
        (999.6, "1.00 k"),
        (1234, "1.23 k"),
        (45_600, "45.6 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (5_253_370_000, "5.25 G"),
        (2.5e12, "2.50 T"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(number, text):
    assert count(number) == text


def test_nouns_agree():
    assert [plural(n, "spike") for n in (0, 1, 2000)] == ["no spikes", "1 spike", "2,000 spikes"]
