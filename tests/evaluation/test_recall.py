"""Facts by the tokens of a country's name: which row could know them alone."""

from types import SimpleNamespace

import pytest

from stem_jax.data.facts import RELATIONS, read_facts
from stem_jax.data.word_tokens import word_ids
from stem_jax.evaluation import recall
from stem_jax.evaluation.answers import Verdict
from tests.tokenizer_kinds import load_kind


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(knows, limit): what is found of a model that answers some (country, phrasing)."""
    run = SimpleNamespace(tokenizer=load_kind("llama2", tmp_path))
    told = {
        recall.fact_prompt(template, fact.country)
        for templates in recall.FACT_TEMPLATES.values()
        for template in templates
        for fact in read_facts()
    }
    # The longest first: "Guinea" is in "Papua New Guinea".
    countries = sorted((fact.country for fact in read_facts()), key=len, reverse=True)

    def answers(knows):
        def answer_all(scorer, tokenizer, questions, on_scored):
            for question in questions:
                country = next(name for name in countries if name in question.prompt)
                yield Verdict(knows(country, question.prompt in told), 0.0)

        return answer_all

    def ask(knows, limit=None):
        monkeypatch.setattr(recall, "Scorer", lambda *_: None)
        monkeypatch.setattr(recall, "answer_all", answers(knows))
        return run.tokenizer, recall.recall(run, limit=limit, progress=False)

    return ask


def test_names_of_one_token_are_told_from_others(asked):
    tokenizer, _ = asked(lambda *_: True, 1)
    one = {f.country for f in read_facts() if len(word_ids(tokenizer, f.country)) == 1}
    assert 0 < len(one) < 195 and not any(" " in country for country in one)
    _, found = asked(lambda country, told: told or country in one)
    assert found["names"]["one_token"] == {
        "trained": 1.0,
        "held_out": 1.0,
        "questions": len(one) * 21 * len(RELATIONS),
        "countries": len(one),
    }
    several = found["names"]["several_tokens"]
    assert (several["trained"], several["held_out"]) == (1.0, 0.0)
    assert several["countries"] == 195 - len(one)
    lines = recall.format_recall(found).splitlines()
    assert lines[-1].split()[:4] == ["several", "tokens", "100.0%", "0.0%"]


def test_a_share_of_no_questions_is_none(asked):
    _, found = asked(lambda *_: True, 1)
    # Afghanistan alone.
    assert found["names"]["one_token"]["held_out"] is None
    assert found["names"]["several_tokens"]["countries"] == 1
    assert recall.format_recall(found).splitlines()[-2].split()[2:] == ["-", "-", "0", "0"]
