"""What of a file is text, and which files are none."""

import pytest

from stem_jax.study.text_documents import text_of
from tests.study.archives import prose


def test_prose_loses_indentation_rules_and_licences():
    said = prose(1)
    raw = f"\ufeff.. Licensed under the Some License\n\nTitle\n======\r\n\r\n    {said}\n\tlast\n"
    assert text_of("prose", "docs/a.rst", raw.encode()) == f"Title\n===\n\n{said}\nlast\n"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("docs/a.py", prose(1)),
        ("docs/LICENSE.txt", prose(1)),
        ("docs/short.rst", prose(1)[:490]),
        ("docs/versions.rst", prose(1) + "1.2.3 a1b2c3d4 " * 150),
        ("docs/other.rst", prose(1) + "слово " * 10),
        ("docs/binary.rst", prose(1) + "\0"),
    ],
)
def test_what_is_no_prose_is_left_out(path, text):
    assert text_of("prose", "docs/a.rst", prose(1).encode()) is not None
    assert text_of("prose", path, text.encode()) is None


def test_prose_that_is_no_utf8_is_left_out():
    assert text_of("prose", "docs/a.rst", (prose(1) + "é").encode("latin-1")) is None


_CODE = "def area(width, height):\n    if width:\n      return width * height\n" * 10


def test_code_begins_with_its_first_line_and_is_indented_by_tabs():
    raw = f"#!/usr/bin/python\n# Licence\n\n{_CODE}"
    tabbed = "def area(width, height):\n\tif width:\n\t  return width * height\n" * 10
    assert text_of("code", "one/a.py", raw.encode()) == tabbed


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("one/a.rst", _CODE),
        ("one/tests/a.py", _CODE),
        ("one/data.py", _CODE + "values = [\n" + "0123456789,\n" * 30 + "]\n"),
        ("one/long.py", _CODE + f"value = '{'x' * 500}'\n"),
    ],
)
def test_what_is_no_code_is_left_out(path, text):
    assert text_of("code", "one/a.py", _CODE.encode()) is not None
    assert text_of("code", path, text.encode()) is None
