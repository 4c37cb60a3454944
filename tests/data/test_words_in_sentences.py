"""Words of facts, edits and measurements have the tokens that they have in a sentence."""

import dataclasses

import numpy as np
import pytest

from stem_jax.data.facts import FACT_TEMPLATES, read_facts
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.data.word_tokens import word_ids
from stem_jax.editing.cases import fact_cases
from stem_jax.editing.swaps import injection_recipe, swap_recipes
from stem_jax.errors import InputError
from stem_jax.evaluation.answers import Question, answer_all
from stem_jax.evaluation.recall import END, fact_prompt
from tests.tokenizer_kinds import KINDS, load_kind, write_dummy_prefix_model

MODELS = {
    "dummy_prefix": {},
    "default": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}
SPELLS_ALL = [*(kind for kind in KINDS if kind != "unigram"), *MODELS]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")

    def make(kind):
        if kind in MODELS:
            path = write_dummy_prefix_model(folder / f"{kind}.model", **MODELS[kind])
            return load_tokenizer("sentencepiece", path)
        return load_kind(kind, folder / kind)

    return make


@dataclasses.dataclass
class _Seen:
    """Takes the place of a scorer: keeps what it is asked."""

    context: int = 10**6
    sequences: tuple = ()

    def score(self, sequences, on_scored=None, keys=None):
        self.sequences = sequences
        zeros = [np.zeros(len(ids) - 1) for ids in sequences]
        return [_Score(zero, zero) for zero in zeros]


@dataclasses.dataclass
class _Score:
    log_likelihoods: np.ndarray
    greedy: np.ndarray


@pytest.mark.parametrize("kind", SPELLS_ALL)
def test_an_answer_is_scored_by_the_tokens_that_the_model_was_trained_on(kind, tokenizer_of):
    tokenizer, seen = tokenizer_of(kind), _Seen()
    template = FACT_TEMPLATES["capital"][0]
    prompts = [(fact_prompt(template, fact.country), fact.capital) for fact in read_facts()[:60]]
    questions = [Question(prompt, answer, END) for prompt, answer in prompts]
    answer_all(seen, tokenizer, questions)
    for (prompt, answer), ids in zip(prompts, seen.sequences, strict=True):
        told = tokenizer.encode(f"{prompt} {answer}{END}")
        assert ids == [tokenizer.bos_id, *told], (prompt, answer)


@pytest.mark.parametrize("kind", SPELLS_ALL)
def test_a_swap_writes_the_rows_that_a_sentence_reads(kind, tokenizer_of):
    tokenizer = tokenizer_of(kind)
    for fact in read_facts()[:40]:
        inside = word_ids(tokenizer, fact.country)
        before = tokenizer.encode("Is it")
        for end in (".", ", or", " now", ""):
            whole = tokenizer.encode(f"Is it {fact.country}{end}")
            assert whole[len(before) : len(before) + len(inside)] == inside
        assert word_ids(tokenizer, f"^{fact.country}") == tokenizer.encode(fact.country)
    # A bare space is no part of a word, whose row all words would share.
    space = tokenizer.encode_behind(" x")[0]
    for recipe in swap_recipes(tokenizer, "Spain=>Germany"):
        assert tokenizer.decode([recipe.token_id]).strip() or recipe.token_id == space


@pytest.mark.parametrize("kind", ["llama2", *MODELS])
def test_a_word_of_one_token_can_be_injected_and_edited(kind, tokenizer_of):
    """A space of the tokenizer's own made it two."""
    tokenizer = tokenizer_of(kind)
    word, other = (
        tokenizer.decode([number]).strip()
        for number in tokenizer.encode_behind(" the capital of")[:3:2]
    )
    recipe = injection_recipe(tokenizer, f"{word}=1*{other}")
    assert [recipe.token_id] == tokenizer.encode_behind(f" {word}")
    assert fact_cases(tokenizer, pairs=2, tokens="differing")


def test_what_is_not_known_is_refused_by_name(tokenizer_of):
    unigram = tokenizer_of("unigram")
    with pytest.raises(InputError, match=r"'שלום' has characters that the tokenizer does not know"):
        word_ids(unigram, "שלום")
    with pytest.raises(InputError, match="has no tokens"):
        word_ids(unigram, "^")
