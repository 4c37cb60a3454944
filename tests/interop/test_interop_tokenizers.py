"""Exported tokenizers give the ids of training, or are refused."""

import io
import json
from pydoc_data.topics import topics

import hypothesis
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.interop.tokenizer_export import (
    NATIVE_FOLDER,
    padding_id,
    probe_texts,
    write_tokenizer,
)

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


def _expected(ours, text):
    return [ours.bos_id, *ours.encode(text)]


def _is_plain(theirs, text):
    return not any(special in text for special in theirs.all_special_tokens)


def test_ids(both):
    ours, theirs, _ = both
    texts = [*probe_texts(), *CORPUS]
    for text in texts:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == _expected(ours, text), text[:80]
        if _is_plain(theirs, text):
            assert theirs(text)["input_ids"] == ids, text[:80]
    assert not all(_is_plain(theirs, text) for text in texts) or ours.kind == "hf"


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_ids_of_any_text(both, text):
    ours, theirs, _ = both
    # SentencePiece's own mark for a space is a space to it, in both.
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ids == _expected(ours, text)
    assert theirs(text)["input_ids"] == ids or not _is_plain(theirs, text)


@given(
    parts=st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=4),
    names=st.lists(st.sampled_from(["bos_token", "eos_token"]), min_size=3, max_size=3),
    space=st.sampled_from(["", " ", "\n"]),
)
def test_special_tokens_are_special(both, parts, names, space):
    """The text of a special token is that token, wherever it stands."""
    ours, theirs, _ = both
    hypothesis.assume(all(_is_plain(theirs, part) for part in parts))
    text, ids = parts[0], [ours.bos_id, *ours.encode(parts[0])]
    for part, name in zip(parts[1:], names, strict=False):
        part = space + part
        text += getattr(theirs, name) + part
        ids += [getattr(ours, name.replace("token", "id")), *ours.encode(part)]
    text += theirs.eos_token
    assert theirs(text)["input_ids"] == [*ids, ours.eos_id]
    assert theirs(text, split_special_tokens=True)["input_ids"] == _expected(ours, text)
    # That is no setting that stays.
    assert theirs(text)["input_ids"] == [*ids, ours.eos_id]


def test_text_padding_and_eos(both):
    ours, theirs, _ = both
    text = "A text:\n    with  spaces, <s> and ✓"
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    batch = theirs(["a", "a longer one"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    padding = {"sentencepiece": 0, "hf": ours.bos_id, "bytes": 256}[ours.kind]
    assert batch["input_ids"][0][0] == theirs.pad_token_id == padding != theirs.eos_token_id
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.model_max_length == 64


def test_eos_is_a_label(both):
    """What a collator takes out of the labels is padding alone."""
    _, theirs, _ = both
    collator = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)
    texts = ["one" + theirs.eos_token, "a longer one" + theirs.eos_token]
    labels = collator([theirs(text) for text in texts])["labels"]
    assert (labels[:, -1] == theirs.eos_token_id).all()
    assert (labels[0] == -100).any()


def test_ours_comes_back(both):
    ours, _, export = both
    assert load_tokenizer_folder(export / NATIVE_FOLDER).fingerprint == ours.fingerprint


def _with_tokens(path, special, *, unknown=None, padding=None):
    """A tokenizer.json of characters and these special tokens."""
    vocabulary = {token: number for number, token in enumerate([*"abc ", *special])}
    kind = tokenizers.models.BPE(vocabulary, [], unk_token=unknown)
    model = tokenizers.Tokenizer(kind)
    model.add_special_tokens(special)
    if padding is not None:
        model.enable_padding(pad_id=vocabulary[padding], pad_token=padding)
    model.save(str(path))
    return load_tokenizer("hf", path)


@pytest.mark.parametrize(
    ("special", "options", "expected"),
    [
        (["<s>", "</s>", "<pad>"], {}, "<pad>"),
        (["<s>", "</s>", "<unk>", "<pad>"], {"unknown": "<unk>"}, "<pad>"),
        (["<s>", "</s>", "<unk>"], {"unknown": "<unk>"}, "<unk>"),
        (["<s>", "</s>", "<x>", "<unk>"], {"unknown": "<unk>", "padding": "<x>"}, "<x>"),
        # What a file pads with may be its eos.
        (["<s>", "</s>", "<unk>"], {"unknown": "<unk>", "padding": "</s>"}, "<unk>"),
        (["<s>", "</s>"], {"unknown": "</s>"}, "<s>"),
        (["<s>", "</s>"], {}, "<s>"),
        # One token for bos and eos: nothing can pad.
        (["<|endoftext|>"], {}, None),
    ],
)
def test_padding_is_never_eos(special, options, expected, tmp_path):
    tokenizer = _with_tokens(tmp_path / "t.json", special, **options)
    number = padding_id(tokenizer)
    vocabulary = tokenizer.processor.get_vocab(with_added_tokens=True)
    assert number == (None if expected is None else vocabulary[expected])


@pytest.mark.parametrize(("options", "expected"), [({"pad_id": 3}, 3), ({}, 0)])
def test_padding_of_sentencepiece(options, expected, tmp_path):
    tokenizer = _foreign_sentencepiece(tmp_path / "t.model", model_type="bpe", **options)
    assert padding_id(tokenizer) == expected


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
