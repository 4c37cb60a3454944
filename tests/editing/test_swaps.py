"""What an edit writes: words to tokens, strategies, and what is refused."""

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.data.word_tokens import word_ids
from stem_jax.editing.choices import STRATEGIES
from stem_jax.editing.swaps import recipes_of, swap_recipes
from stem_jax.errors import InputError

BYTES = load_tokenizer("bytes")
WORDS = st.text("abcdefghij", min_size=1, max_size=8)


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_words_stand_after_a_space_or_begin_a_text():
    assert word_ids(BYTES, "ab") == ids(" ab")
    assert word_ids(BYTES, " ab ") == ids(" ab")
    assert word_ids(BYTES, "^ab") == ids("ab")


def test_equal_counts_go_one_to_one_whatever_the_strategy():
    for strategy in STRATEGIES:
        recipes = swap_recipes(BYTES, "^abc=>^xyz", strategy)
        assert [(r.token_id, r.parts) for r in recipes] == [
            (source, ((1.0, target),)) for source, target in zip(ids("abc"), ids("xyz"))
        ]


@pytest.mark.parametrize(
    ("strategy", "swap", "expected"),
    [
        ("pad_left", "^abc=>^z", ["", "", "z"]),
        ("pad_right", "^abc=>^yz", ["y", "z", ""]),
        ("copy", "^abcde=>^yz", ["y", "z", "y", "z", "y"]),
        # Ids grow with rarity: of d, a, c the two highest are d and c.
        ("subset", "^ab=>^dac", ["d", "c"]),
    ],
)
def test_strategies(strategy, swap, expected):
    recipes = swap_recipes(BYTES, swap, strategy)
    found = ["".join(chr(token) for _, token in recipe.parts) for recipe in recipes]
    assert found == expected
    assert all(weight == 1 for recipe in recipes for weight, _ in recipe.parts)


@given(WORDS, WORDS)
def test_average_is_a_mean_of_the_target(source, target):
    source = "".join(dict.fromkeys(source))
    if source == target or len(source) == len(target):
        return
    for recipe in swap_recipes(BYTES, f"^{source}=>^{target}", "average"):
        assert sorted(token for _, token in recipe.parts) == sorted(ids(target))
        assert sum(weight for weight, _ in recipe.parts) == pytest.approx(1)


def test_injections(tmp_path):
    [recipe] = recipes_of(BYTES, [], ["^a=0.5*^b+0.25*^c+^d"], "average")
    assert recipe.token_id == ord("a")
    assert recipe.parts == ((0.5, ord("b")), (0.25, ord("c")), (1.0, ord("d")))
    [recipe] = recipes_of(BYTES, [], ["^a=1e+2*^e+^c"], "average")
    assert recipe.parts == ((100.0, ord("e")), (1.0, ord("c")))
    row = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.numpy.save_file({"row": row}, tmp_path / "row.safetensors")
    [recipe] = recipes_of(BYTES, [], [f"^a=@{tmp_path / 'row.safetensors'}"], "average")
    np.testing.assert_array_equal(recipe.given, row)
    safetensors.numpy.save_file({"row": row * np.nan}, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="not finite"):
        recipes_of(BYTES, [], [f"^a=@{tmp_path / 'nan.safetensors'}"], "average")
    with pytest.raises(InputError, match="cannot be read"):
        recipes_of(BYTES, [], [f"^a=@{tmp_path / 'none'}"], "average")


@pytest.mark.parametrize(
    ("swaps", "injections", "strategy", "message"),
    [
        (["Spain"], [], "copy", "--swap=Spain must be SOURCE=>TARGET"),
        (["a=>b=>c"], [], "copy", "must be SOURCE=>TARGET"),
        (["^=>b"], [], "copy", "has no tokens; give a word"),
        (["=>b"], [], "copy", "has no tokens; give a word"),
        (["ab=> ab "], [], "copy", "puts rows in their own place"),
        (["^aba=>^xyz"], [], "copy", "comes twice in it"),
        (["^ab=>^xyz"], [], "copy", "copy needs a target with fewer tokens than the source's 2"),
        (["^abc=>^yz"], [], "subset", "subset needs a target with more tokens than the source's 3"),
        (["^ab=>^c"], [], "middle", "--strategy=middle must be one of pad_left"),
        (["^ab=>^xy", "^cb=>^zw"], [], "copy", r"two edits write the rows of token 98 \('b'\)"),
        ([], ["^a"], "copy", "must be WORD="),
        ([], ["^a=x*^b"], "copy", "'x' is not a number"),
        ([], ["^a=^bc"], "copy", "'\\^bc' has 2 tokens; give words of one token"),
    ],
)
def test_refusals(swaps, injections, strategy, message):
    with pytest.raises(InputError, match=message):
        recipes_of(BYTES, swaps, injections, strategy)


def test_unknown_characters_are_refused(tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog"] * 50
    train_sentencepiece(texts, tmp_path / "bytes.model", 320)
    # Characters that were not trained are bytes here, and nothing in a model without them.
    assert word_ids(load_tokenizer("sentencepiece", tmp_path / "bytes.model"), "été")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "plain"),
        model_type="bpe",
        vocab_size=40,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "plain.model")
    assert word_ids(tokenizer, "fox")
    with pytest.raises(InputError, match="'été' has characters that the tokenizer does not know"):
        word_ids(tokenizer, "été")
