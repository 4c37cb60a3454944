"""Text that comes token by token is the text of all tokens, and never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.generation.completion import TextStream

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def pieces_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    train_sentencepiece(["the cat and the dog sat on the mat; naïve café"] * 20, path, 300)
    return load_tokenizer("sentencepiece", path)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(text=st.text(max_size=12), noise=st.lists(st.integers(0, 255), max_size=8))
@settings(max_examples=60)
def test_streamed_pieces_are_the_text(kind, pieces_tokenizer, text, noise):
    tokenizer = BYTES if kind == "bytes" else pieces_tokenizer
    text = text.replace("\u2581", "")
    ids = tokenizer.encode(text)
    prompt = tokenizer.encode("the cat")
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in ids]
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text
    # Ids 3..258 are the byte pieces of SentencePiece: text goes on with broken characters.
    broken = [byte + (3 if kind == "sentencepiece" else 0) for byte in noise]
    pieces += [stream.push(token) for token in broken] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(prompt + ids + broken)[len("the cat") :]


def test_a_character_waits_for_its_last_byte():
    stream = TextStream(BYTES, BYTES.encode("x"))
    assert [stream.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"
