"""Exported tokenizers give the ids of training, or are refused."""

import io
import json
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder, train_sentencepiece
from stem_jax.errors import InputError
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER, probe_texts, write_tokenizer

KINDS = ["sentencepiece", "hf", "bytes"]
CORPUS = [topics[name] for name in sorted(topics)[40:60]]


def _foreign_sentencepiece(path, **options):
    """A model as others train them, on the same text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer("sentencepiece", path)


def _byte_level(path):
    """A tokenizer.json like that of Llama 3, without a post-processor that adds bos."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(path))
    return load_tokenizer("hf", path)


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Our tokenizer, what transformers makes of its export, and the folder of that."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        train_sentencepiece(CORPUS, folder / "t.model", 900)
        ours = load_tokenizer("sentencepiece", folder / "t.model")
    else:
        ours = _byte_level(folder / "t.json") if request.param == "hf" else load_tokenizer("bytes")
    export = folder / "export"
    export.mkdir()
    write_tokenizer(ours, export, 64)
    # What the folder of a dense model says of it: Llama's tokenizer class would change the ids.
    (export / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ours, transformers.AutoTokenizer.from_pretrained(export), export


def test_ids(both):
    ours, theirs, _ = both
    for text in [*probe_texts(), *CORPUS]:
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)], text[:80]


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_ids_of_any_text(both, text):
    ours, theirs, _ = both
    # SentencePiece's own mark for a space is a space to it, in both.
    assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]


def test_text_padding_and_special_tokens(both):
    ours, theirs, _ = both
    text = "A text:\n    with  spaces, <s> and ✓"
    ids = theirs(text)["input_ids"]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    batch = theirs(["a", "a longer one"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["input_ids"][0][0] == theirs.eos_token_id == ours.eos_id
    assert (theirs.bos_token_id, theirs.model_max_length) == (ours.bos_id, 64)


def test_ours_comes_back(both):
    ours, _, export = both
    assert load_tokenizer_folder(export / NATIVE_FOLDER).fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "bpe"},
        {"model_type": "bpe", "normalization_rule_name": "identity"},
        {"model_type": "unigram", "normalization_rule_name": "identity"},
    ],
)
def test_other_ids_are_refused(options, tmp_path):
    tokenizer = _foreign_sentencepiece(tmp_path / "t.model", **options)
    with pytest.raises(InputError, match=r"exported tokenizer differs on .* give --no-tokenizer"):
        write_tokenizer(tokenizer, tmp_path, 64)
