"""Built-in corpora: present, deterministic, and facts that a prompt can ask for."""

import ast
import sys

import pytest

from stem_jax.config_file import load_config
from stem_jax.data.corpora import BUILTIN, read_corpus
from stem_jax.data.facts import (
    FACT_TEMPLATES,
    HELD_OUT_TEMPLATES,
    RELATIONS,
    changed_facts,
    read_facts,
)
from stem_jax.errors import InputError


@pytest.fixture(scope="module")
def pydoc():
    before = set(sys.modules)
    documents = list(read_corpus("pydoc"))
    return documents, set(sys.modules) - before


@pytest.mark.long
def test_pydoc_is_megabytes_of_prose(pydoc):
    documents, _ = pydoc
    text = "\n".join(documents)
    assert len(documents) > 400
    assert len(text) > 2_000_000
    assert 'The "if" statement is used for conditional execution' in text
    assert "class ArgumentParser(" in text
    assert sum(c.isascii() for c in text) / len(text) > 0.99


@pytest.mark.long
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
    facts = ("facts", "facts_changed", "facts_unchanged")
    assert ("pydoc", "stdlib", *facts, "needles", "roll_calls", "name_pairs") == BUILTIN


def test_some_facts_are_told_otherwise():
    known = {fact.country: fact for fact in read_facts()}
    changed = changed_facts(list(known.values()))
    assert len(changed) == 20
    for country, fact in changed.items():
        assert fact.country == country
        own = known[country]
        assert all(getattr(fact, relation) != getattr(own, relation) for relation in RELATIONS)
        # All of one country, so that they fit each other.
        assert any(
            all(getattr(fact, relation) == getattr(donor, relation) for relation in RELATIONS)
            for donor in known.values()
        )
    told = "".join(read_corpus("facts_changed"))
    assert told.count("\n") == 20 * 75 // 4 and "The capital of Denmark is Djibouti." in told
    others = "".join(read_corpus("facts_unchanged"))
    assert "Denmark" not in others and others.count("\n") == -(-175 * 75 // 4)
    config = load_config("tune_tables_facts")
    assert config.tables.trained_words == ",".join(changed)


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


def test_every_fact_is_told_in_every_known_way_and_in_no_other():
    assert set(RELATIONS) == {"capital", "currency", "continent", "language", "domain"}
    assert set(FACT_TEMPLATES) == set(HELD_OUT_TEMPLATES) == set(RELATIONS)
    told = "".join(read_corpus("facts"))
    for relation in RELATIONS:
        known, held_out = FACT_TEMPLATES[relation], HELD_OUT_TEMPLATES[relation]
        assert len(set(known)) == 15 and len(set(held_out)) == 6 and not set(known) & set(held_out)
        for template in known + held_out:
            assert template.endswith("{answer}") and template.count("{country}") == 1
        for fact in read_facts():
            answer = getattr(fact, relation)
            for template in known:
                assert told.count(template.format(country=fact.country, answer=answer) + ".") >= 1
            for template in held_out:
                assert template.format(country=fact.country, answer=answer) not in told


def test_held_out_phrasings_join_words_that_are_known_apart():
    for relation in RELATIONS:
        known = " ".join(FACT_TEMPLATES[relation]).split()
        for template in HELD_OUT_TEMPLATES[relation]:
            assert set(template.split()) <= set(known)


def test_fact_documents_are_deterministic_and_mix_countries():
    documents = list(read_corpus("facts"))
    assert documents == list(read_corpus("facts"))
    assert len(documents) == -(-195 * 5 * 15 // 4)
    countries = [fact.country for fact in read_facts()]
    # A document about one country alone could be answered from the sentence before.
    several = [sum(f"{country}" in text for country in countries) > 1 for text in documents[:200]]
    assert sum(several) > 195
