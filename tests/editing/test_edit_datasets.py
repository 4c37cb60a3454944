"""Edits from files as they are published: which records find a donor, and what is refused."""

import json

import pytest

from stem_jax.editing.datasets import read_edit_dataset
from stem_jax.editing.trial import Trial, TrialResult
from stem_jax.errors import InputError
from tests.saved_models import BYTES


def zsre(subject, src, answer, alt, **more):
    """A record with the fields that those of zsRE for editing have, and no others."""
    return {
        "subject": subject,
        "src": src,
        "pred": "something",
        "rephrase": f"Tell me: {src}",
        "alt": alt,
        "answers": [answer],
        "loc": "nq question: who wrote the story",
        "loc_ans": "Somebody",
        "cond": f"something >> {alt} || {src}",
        **more,
    }


RECORDS = [
    zsre("Watts Humphrey", "What university did Watts Humphrey attend?", "Illinois", "Michigan"),
    zsre("Ada Lovelace", "What university did Ada Lovelace attend?", "Michigan", "Leeds"),
    # The answer is true of a subject of whom something else is asked.
    zsre("Alan Turing", "Which city was Alan Turing born in?", "Leeds", "Illinois"),
    zsre("Grace Hopper", "what university did  Grace Hopper attend?", "Yale", "Illinois"),
    # Of nobody else can be asked what names no subject.
    zsre("Nobody", "What is it?", "Red", "Blue"),
    zsre("Somebody", "What is it?", "Blue", "Red"),
]


def _read(path, records):
    path.write_text(json.dumps(records))
    return read_edit_dataset(path)


def test_records_of_zsre_find_donors_by_their_question(tmp_path):
    found = _read(tmp_path / "zsre.json", RECORDS)
    assert [(case.subject, case.donor, case.old, case.new) for case in found.cases] == [
        ("Watts Humphrey", "Ada Lovelace", "Illinois", "Michigan"),
        ("Grace Hopper", "Watts Humphrey", "Yale", "Illinois"),
    ]
    assert (found.without_donor, {case.relation for case in found.cases}) == (4, {"any"})
    [probe] = found.cases[0].locality
    assert probe.prompt.endswith("attend? Illinois. nq question: who wrote the story")


def test_a_named_relation_comes_before_the_question(tmp_path):
    relations = ["school", "school", "school", "other"]
    records = [zsre_ | {"relation": name} for zsre_, name in zip(RECORDS, relations)]
    found = _read(tmp_path / "zsre.json", records)
    # In other words, and no more of one relation, though in the same words.
    assert [(case.subject, case.donor) for case in found.cases] == [
        ("Watts Humphrey", "Ada Lovelace"),
        ("Ada Lovelace", "Alan Turing"),
        ("Alan Turing", "Watts Humphrey"),
    ]


def test_names_that_cannot_be_swapped_are_counted(tmp_path):
    names = [("abc", "xyz"), ("aba", "xyz"), ("ab", "xyz")]
    records = [zsre(x, f"Who is {x}?", "old", "new", donor=y) for x, y in names]
    found = _read(tmp_path / "x.json", records)
    # Every byte is a token, and the space before a name is one.
    assert [case.subject for case in found.swappable(BYTES, "average")] == ["abc", "ab"]
    assert [case.subject for case in found.swappable(BYTES, "copy")] == ["abc"]
    only = _read(tmp_path / "y.json", records[1:2])
    with pytest.raises(InputError, match=r"no edit of --measure .*average; the first: .*'aba'"):
        only.swappable(BYTES, "average")
    result = TrialResult(Trial("x.json"), 1, "", [], None, 4, 1)
    assert result.note == (
        "records without a donor, left out: 4; records whose names average does not fit, or with "
        "a token twice, left out: 1"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "is nested deeper than 200 levels"),
        ("\ufeff{}", "is not a list of records"),
        (json.dumps([RECORDS[0] | {"alt": " "}]), "record 0 is wrong: ' ' is no text"),
        (json.dumps([RECORDS[0] | {"answers": []}]), "record 0 lacks list index out of range"),
        (json.dumps([RECORDS[0] | {"subject": 5}]), "record 0 is wrong: 5 is no text"),
        (json.dumps(RECORDS[:1]), "none of its 1 records has a donor"),
    ],
)
def test_files_that_are_refused(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_edit_dataset(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is not JSON"),
        ("{}", "is not a list of records"),
        ("[" * 100_000, "is nested deeper than 200"),
        ('[{"subject": "Spain"}]', "record 0 lacks 'src'"),
        ('[{"subject": "a", "src": "b", "answers": [1], "alt": "d"}]', "record 0 is wrong: 1 is"),
        (
            '[{"subject": "a", "src": "b", "answers": ["c"], "alt": "c"}]',
            "record 0 wants 'c', which is the answer already",
        ),
        (
            json.dumps([{"subject": "a", "src": "b", "answers": ["c"], "alt": "d"}]),
            "none of its 1 records has a donor",
        ),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"--measure={path}.*{message}"):
        read_edit_dataset(path)
    with pytest.raises(InputError, match=r"--measure=nowhere.json cannot be read"):
        read_edit_dataset("nowhere.json")
