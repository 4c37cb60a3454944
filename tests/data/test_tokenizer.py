"""Tokenizers: exact round trips, deterministic training, and refusals that name a remedy."""

import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data import sentencepiece_training
from stem_jax.data.corpora import read_corpus
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from tests.tokenizer_kinds import write_dummy_prefix_model, write_kind

# All text but lone surrogates, which UTF-8 does not have, and SentencePiece's mark for a space.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"))
FACTS = [*read_corpus("facts"), "In 2026 and 2026, and again in 2026. " * 50]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_sentencepiece(FACTS, path, 1000)
    return path


@pytest.fixture(scope="module")
def trained(model_path):
    return load_tokenizer("sentencepiece", model_path)


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def any_tokenizer(request, model_path):
    return load_tokenizer(request.param, model_path if request.param == "sentencepiece" else None)


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_decode_inverts_encode(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert all(0 <= token < any_tokenizer.vocab_size for token in ids)


PROBES = [
    "  leading and trailing  ",
    "tabs\t\tand\n\n\nnewlines\r\n",
    "    four\n        eight",
    "e\u0301 \u00e9 \ufb01 \u00a0\u3000",
    "<s> </s> <unk> <0x41>",
    "\x00\x1c\u2028\ufeff\U0001f600",
    "",
]


@pytest.mark.parametrize("text", PROBES)
def test_decode_inverts_encode_where_tokenizers_normalize(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
    assert {any_tokenizer.bos_id, any_tokenizer.eos_id}.isdisjoint(any_tokenizer.encode(text))


def test_batch_encoding_equals_single_encoding(any_tokenizer):
    texts = [*PROBES, *FACTS[:5]]
    assert any_tokenizer.encode_batch(texts) == [any_tokenizer.encode(text) for text in texts]
    assert any_tokenizer.encode_batch([]) == []


def test_digits_are_single_tokens(trained):
    assert [trained.decode([token]) for token in trained.encode("2026")] == ["2", "0", "2", "6"]


def test_decode_replaces_what_is_not_text(any_tokenizer):
    emoji = any_tokenizer.encode("\U0001f600")
    assert len(emoji) == 4  # byte fallback
    assert "\ufffd" in any_tokenizer.decode(emoji[:2])
    outside = [*any_tokenizer.encode("a"), any_tokenizer.vocab_size + 7, *any_tokenizer.encode("b")]
    assert any_tokenizer.decode(outside) == "a\ufffdb"
    assert any_tokenizer.decode([any_tokenizer.bos_id, any_tokenizer.eos_id]) == ""


def test_a_lone_surrogate_is_refused(any_tokenizer):
    with pytest.raises(InputError, match=r"lone surrogate '\\ud800' at character 2"):
        any_tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="replace it"):
        any_tokenizer.encode_batch(["fine", "ab\ud800"])


def test_save_and_load(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer_folder(tmp_path / "saved")
    assert loaded == any_tokenizer
    assert loaded.encode(FACTS[0]) == any_tokenizer.encode(FACTS[0])


def test_a_changed_model_file_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    train_sentencepiece(FACTS, tmp_path / "tokenizer.model", 900)
    with pytest.raises(InputError, match=r"fingerprint .* records .* restore the original"):
        load_tokenizer_folder(tmp_path)


def test_training_is_deterministic(model_path, tmp_path):
    train_sentencepiece(iter(FACTS), tmp_path / "again.model", 1000)
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    train_sentencepiece(FACTS, tmp_path / "other.model", 999)
    fingerprints = {
        load_tokenizer("sentencepiece", path).fingerprint
        for path in (model_path, tmp_path / "again.model", tmp_path / "other.model")
    }
    assert len(fingerprints) == 2


def test_training_samples_evenly_within_its_bound(monkeypatch):
    monkeypatch.setattr(sentencepiece_training, "TRAINING_BYTES", 1000)
    pieces = sentencepiece_training._sample_pieces(f"{i:010d}\n" for i in range(5000))
    numbers = [int(piece) for piece in pieces]
    assert 500 <= sum(map(len, pieces)) <= 1000
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    assert len(steps) == 1 and numbers[0] < steps.pop() and numbers[-1] > 4900


def test_training_uses_lines_longer_than_the_trainer_accepts(tmp_path):
    line = "the quick brown fox jumps over the lazy dog " * 2000  # one line of 88 kB, no newline
    train_sentencepiece([line], tmp_path / "long.model", 310)
    assert len(load_tokenizer("sentencepiece", tmp_path / "long.model").encode("the quick")) < 6


@pytest.mark.parametrize("vocab_size, side", [(50_000, "at most"), (10, "at least")])
def test_training_names_a_vocabulary_that_works(tmp_path, vocab_size, side):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(
        InputError, match=rf"vocab_size {vocab_size} is too .* {side} \d+"
    ) as caught:
        train_sentencepiece(FACTS[:20], path, vocab_size)
    assert not path.exists()
    works = int(str(caught.value).split(side)[1].split(",")[0])
    train_sentencepiece(FACTS[:20], path, works)
    assert load_tokenizer("sentencepiece", path).vocab_size == works


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_training_without_text_is_refused(tmp_path, texts):
    with pytest.raises(InputError, match="got no text"):
        train_sentencepiece(texts, tmp_path / "tokenizer.model", 300)


def test_refusals_name_value_and_remedy(tmp_path):
    with pytest.raises(InputError, match="'word' is unknown: use one of sentencepiece, hf, bytes"):
        load_tokenizer("word")
    with pytest.raises(InputError, match="needs a model file"):
        load_tokenizer("sentencepiece")
    with pytest.raises(InputError, match=r"none\.model cannot be read .* check the path"):
        load_tokenizer("sentencepiece", tmp_path / "none.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.model is not a SentencePiece model"):
            load_tokenizer("sentencepiece", tmp_path / "bad.model")
    with pytest.raises(InputError, match=r"no readable tokenizer_meta\.json"):
        load_tokenizer_folder(tmp_path)


def test_missing_tokenizers_package_names_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        load_tokenizer("hf", tmp_path / "tokenizer.json")


def test_hf_tokenizer(tmp_path):
    library = pytest.importorskip("tokenizers", reason="optional package of the hf kind")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built = library.Tokenizer(
        library.models.BPE(
            vocab={c: i for i, c in enumerate(sorted(byte_level.alphabet()))}, merges=[]
        )
    )
    built.pre_tokenizer, built.decoder = byte_level, library.decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    with pytest.raises(InputError, match="no end-of-text token that is marked special"):
        load_tokenizer("hf", path)

    built.add_special_tokens(["<|end_of_text|>"])
    built.save(str(path))
    tokenizer = load_tokenizer("hf", path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)
    forged = "a <|end_of_text|> b\n\n  \U0001f600"
    assert tokenizer.eos_id not in tokenizer.encode(forged)
    assert tokenizer.decode(tokenizer.encode(forged)) == forged
    assert tokenizer.encode_batch([forged, "x"]) == [
        tokenizer.encode(forged),
        tokenizer.encode("x"),
    ]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer_folder(tmp_path / "saved") == tokenizer

    path.write_text(json.dumps({"version": "none"}))
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer("hf", path)


@pytest.mark.parametrize("flags", [{"eos": "97"}, {"bos": "10"}, {"stop": ("257", "255")}])
def test_a_byte_of_text_is_no_special_token_of_the_bytes_tokenizer(flags):
    with pytest.raises(InputError, match=r"--\w+=(97|10|255) is a byte of text.*give 256 or 257"):
        load_tokenizer("bytes", flags=SpecialFlags(**flags))
    swapped = load_tokenizer("bytes", flags=SpecialFlags(bos="none", eos="256"))
    assert (swapped.bos_id, swapped.eos_id) == (256, 256)


def test_a_byte_that_ends_documents_of_an_earlier_folder_is_read(tmp_path):
    load_tokenizer("bytes").save(tmp_path)
    path = tmp_path / "tokenizer_meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "eos_id": 97, "stop_ids": [97]}))
    assert load_tokenizer_folder(tmp_path).eos_id == 97


def test_a_file_of_another_kind_names_the_kind_that_reads_it(tmp_path):
    model = write_dummy_prefix_model(tmp_path / "a.model")
    with pytest.raises(InputError, match=r"but a SentencePiece model: give .*--tokenizer=sent"):
        load_tokenizer("hf", model)
    (tmp_path / "b.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for kind in ("hf", "sentencepiece"):
        with pytest.raises(InputError, match=r"is of tiktoken.*TikTokenConverter.*b\.model"):
            load_tokenizer(kind, tmp_path / "b.model")
    whole = write_kind("gpt2", tmp_path / "gpt2") / "tokenizer.json"
    with pytest.raises(InputError, match=r"but a tokenizer\.json: give it with --tokenizer=hf$"):
        load_tokenizer("sentencepiece", whole)
    (tmp_path / "c.txt").write_text("words")
    with pytest.raises(InputError, match=r"c\.txt is not a tokenizer\.json: give the tokenizer\."):
        load_tokenizer("hf", tmp_path / "c.txt")


def test_a_folder_names_the_tokenizer_in_it(tmp_path):
    with pytest.raises(InputError, match=r"is a folder: give a file; there is no tokenizer in it$"):
        load_tokenizer("sentencepiece", tmp_path)
    for name in ("a.model", "tokenizer.json"):
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match=f"is a folder: give a file, such as .*/{name}$"):
            load_tokenizer("hf", tmp_path)
