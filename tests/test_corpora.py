"""Built-in corpora: present, deterministic, and facts that a prompt can ask for."""

import ast
import sys

import pytest

from stem_jax.data.corpora import (
    BUILTIN,
    FACT_TEMPLATES,
    HELD_OUT_TEMPLATES,
    read_corpus,
    read_facts,
)
from stem_jax.errors import InputError


@pytest.fixture(scope="module")
def pydoc():
    before = set(sys.modules)
    documents = list(read_corpus("pydoc"))
    return documents, set(sys.modules) - before


def test_pydoc_is_megabytes_of_prose(pydoc):
    documents, _ = pydoc
    text = "\n".join(documents)
    assert len(documents) > 400
    assert len(text) > 2_000_000
    assert 'The "if" statement is used for conditional execution' in text
    assert "class ArgumentParser(" in text
    assert sum(c.isascii() for c in text) / len(text) > 0.99


def test_pydoc_imports_no_module_it_documents(pydoc):
    _, imported = pydoc
    # Codecs to decode a file with; and what `sysconfig` looks its paths up in.
    allowed = ("pydoc_data", "encodings.", "_sysconfigdata")
    assert [name for name in imported if not name.startswith(allowed)] == []


def test_stdlib_is_parseable_source_without_tests():
    documents = list(read_corpus("stdlib"))
    assert len(documents) > 400
    assert documents == list(read_corpus("stdlib"))
    assert sum(map(len, documents)) > 5_000_000
    ast.parse(documents[0])
    assert not any("test.support" in text and "unittest.main()" in text for text in documents)


def test_unknown_corpus_names_the_known_ones():
    with pytest.raises(InputError, match="'wiki' is not built in: use one of pydoc, stdlib, facts"):
        read_corpus("wiki")
    assert BUILTIN == ("pydoc", "stdlib", "facts", "needles", "roll_calls", "name_pairs")


def test_facts_cover_the_sovereign_countries():
    facts = {fact.country: fact for fact in read_facts()}
    assert len(facts) == len(read_facts()) == 195
    spain = facts["Spain"]
    assert (spain.capital, spain.currency, spain.continent) == ("Madrid", "euro", "Europe")
    assert (spain.language, spain.domain) == ("Spanish", ".es")
    assert facts["South Korea"].capital == "Seoul"
    assert {fact.continent for fact in facts.values()} == {
        "Africa", "Asia", "Europe", "North America", "South America", "Oceania",
    }  # fmt: skip
    assert "Greenland" not in facts and "Hong Kong" not in facts


def test_templates_end_in_the_answer_and_held_out_ones_are_held_out():
    relations = {"capital", "currency", "continent", "language", "domain"}
    assert set(FACT_TEMPLATES) == set(HELD_OUT_TEMPLATES) == relations
    text = "\n".join(read_corpus("facts"))
    for relation in relations:
        train, held_out = FACT_TEMPLATES[relation], HELD_OUT_TEMPLATES[relation]
        assert len(set(train)) == 6 and len(set(held_out)) == 2
        assert not set(train) & set(held_out)
        for template in train + held_out:
            assert template.endswith("{answer}") and template.count("{country}") == 1
        for fact in read_facts():
            answer = getattr(fact, relation)
            for template in train:
                assert template.format(country=fact.country, answer=answer) + "." in text
            for template in held_out:
                assert template.format(country=fact.country, answer=answer) not in text


def test_facts_are_one_deterministic_shuffled_document_per_country():
    documents = list(read_corpus("facts"))
    assert documents == list(read_corpus("facts"))
    assert len(documents) == 195
    first_words = {
        document.split(fact.country)[0] for document, fact in zip(documents, read_facts())
    }
    assert len(first_words) > 10
