"""Tokenizers as people ship them: streams give the text, and special tokens stay out of texts."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.generation.completion import TextStream
from tests.tokenizer_kinds import CORPUS, KINDS, load_kind, special_texts, write_dummy_prefix_model

# Documents of a kind, in examples of so many.
_DOCUMENTS, _AT_ONCE = 1000, 20
_MODELS = {
    "dummy_prefix_model": {},
    "default_model": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "plain_model": {"add_dummy_prefix": False},
}
ALL = [*KINDS, *_MODELS]
_DECODES_EXACTLY = {"llama2", "llama3_instruct", "gpt2", "gemma", "smollm2", "deepseek"}


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    made = {}

    def make(kind):
        if kind not in made and kind in _MODELS:
            path = write_dummy_prefix_model(folder / f"{kind}.model", **_MODELS[kind])
            made[kind] = load_tokenizer("sentencepiece", path)
        elif kind not in made:
            made[kind] = load_kind(kind, folder / kind)
        return made[kind]

    return make


def _documents(kind: str) -> st.SearchStrategy[list[str]]:
    """Unicode mixed with the texts of special tokens, with and without spaces."""
    texts = ["</s>", "<s>", "<unk>"] if kind in _MODELS else special_texts(kind)
    special = st.sampled_from([*texts, *(f" {text} " for text in texts), "<|im_end|>", "</s>"])
    # Without SentencePiece's own mark for a space, which decodes to one.
    characters = st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")
    plain = st.text(characters, max_size=8) | st.sampled_from([" ", "  ", "\n", "é", "日本", "😀"])
    word = st.sampled_from(CORPUS[0].split()[:40])
    document = st.lists(special | plain | word, max_size=8).map("".join)
    return st.lists(document, min_size=_AT_ONCE, max_size=_AT_ONCE)


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
@settings(max_examples=_DOCUMENTS // _AT_ONCE, deadline=None)
def test_a_stream_gives_the_text_and_no_special_token(kind, tokenizer_of, data):
    tokenizer = tokenizer_of(kind)
    texts = data.draw(_documents(kind))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if kind == "unigram" and tokenizer.hidden_id(ids) is not None:
            # Its model has no other way to spell this text; such a record is bad.
            assert any(special in text for special in special_texts(kind))
            continue
        assert tokenizer.hidden_id(ids) is None, text
        decoded = tokenizer.decode(ids)
        assert _streamed(tokenizer, ids, []) == decoded
        assert decoded == _decoded_by_the_library(tokenizer, ids)
        if kind in _DECODES_EXACTLY:
            assert decoded == text


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_completion_is_what_it_adds_at_every_cut(kind, tokenizer_of, data):
    tokenizer = tokenizer_of(kind)
    start = ["x", "A word", "é", "日本"]
    prompt = tokenizer.encode(data.draw(st.sampled_from([*start, *(f"{one} " for one in start)])))
    piece = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=4)
    pieces = data.draw(
        st.lists(piece | st.sampled_from([" naïve", "日本語", "😀", "  "]), max_size=5)
    )
    ids = tokenizer.encode_behind("".join(pieces)) if pieces else []
    for cut in range(len(ids) + 1):
        both, before = (tokenizer.decode(part) for part in (prompt + ids[:cut], prompt))
        text = _streamed(tokenizer, ids[:cut], prompt)
        # A prompt of spaces alone may have no text of its own yet.
        assert before + text == both
        whole = _decoded_by_the_library(tokenizer, prompt + ids[:cut])
        if "\ufffd" not in whole:
            assert both == whole


@pytest.mark.parametrize("kind", ALL)
def test_a_character_goes_out_with_its_last_byte(kind, tokenizer_of):
    tokenizer = tokenizer_of(kind)
    # Side by side: the library shows both as U+FFFD while the second is incomplete.
    ids = tokenizer.encode_behind(" 𒀀𒀁")
    if kind == "unigram":
        # It has no bytes: what it does not know it does not spell.
        assert tokenizer.decode(ids).strip() == ""
        return
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    pieces = [stream.push(token) for token in ids]
    assert [piece.strip() for piece in pieces if piece.strip()] == ["𒀀", "𒀁"]
    assert pieces[-1] == "𒀁" and stream.flush() == ""
    # The last character lacks a byte; the first one is whole all the same.
    assert _streamed(tokenizer, ids[:-1], tokenizer.encode("a")).strip() == "𒀀\ufffd"


LETTERS = st.text(
    st.characters(categories=("Lu", "Ll", "Lo", "Lt"), max_codepoint=0x2FFF),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_word_has_the_ids_that_it_has_in_a_sentence(kind, tokenizer_of, data):
    tokenizer = tokenizer_of(kind)
    word = unicodedata.normalize("NFC", data.draw(LETTERS))
    inside, first = tokenizer.encode_behind(f" {word}"), tokenizer.encode(word)
    for end in (" more", ", more", ".", ""):
        for before in ("The", "I saw"):
            whole = tokenizer.encode(f"{before} {word}{end}")
            start = len(tokenizer.encode(before))
            assert whole[start : start + len(inside)] == inside, (before, word, end)
        assert tokenizer.encode(f"{word}{end}")[: len(first)] == first


def _streamed(tokenizer, ids, prompt) -> str:
    stream = TextStream(tokenizer, prompt)
    return "".join([*(stream.push(token) for token in ids), stream.flush()])


def _decoded_by_the_library(tokenizer, ids) -> str:
    if tokenizer.kind == "hf":
        return tokenizer.processor.decode(ids, skip_special_tokens=True)
    return tokenizer.processor.decode(ids)
