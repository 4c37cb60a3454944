"""Text that no token stands for is told: where it is prepared, trained on and measured."""

import dataclasses
import io
import json
import logging

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from stem_jax.data import assembly, piece_encoder
from stem_jax.data.coverage import coverage_of, left_out_note
from stem_jax.data.documents import Document
from stem_jax.data.loader import ValidationBatches
from stem_jax.data.preparation import Preparation
from stem_jax.data.prepare import open_stores, prepare_stores, write_stores
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.prepare import main
from stem_jax.training.evaluation import summarize
from stem_jax.training.run_data import open_run_data
from tests.saved_models import BYTES
from tests.tokenizer_kinds import KINDS, load_kind, write_dummy_prefix_model

LATIN = [f"a plain line of words, number {i}" for i in range(60)]
# 9 of its bytes are of three characters that no tokenizer trained on LATIN has.
FOREIGN = "line 東京都 of words"
TEXTS = [*LATIN, FOREIGN] * 2
SHARE = 18 / sum(len(text.encode()) for text in TEXTS)
LOSSY = ("byte_level", "word_pieces", "unknown", "dropped")


def _train(model, pre_tokenizer, decoder, special=()):
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer, built.decoder = pre_tokenizer, decoder
    kinds = {"BPE": trainers.BpeTrainer, "WordPiece": trainers.WordPieceTrainer}
    trainer = kinds[type(model).__name__](
        vocab_size=150, special_tokens=["<eos>", *special], show_progress=False
    )
    built.train_from_iterator(LATIN, trainer)
    return built


def _tokenizer(kind, folder):
    """Of LATIN alone, in a tokenizer.json."""
    if kind == "byte_level":
        pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built = _train(models.BPE(), pre, decoders.ByteLevel())
    elif kind == "word_pieces":
        model, pre = models.WordPiece(unk_token="[UNK]"), pre_tokenizers.WhitespaceSplit()
        built = _train(model, pre, decoders.WordPiece(), ["[UNK]"])
    else:
        special = ["<unk>"] if kind == "unknown" else []
        model = models.BPE(unk_token="<unk>") if special else models.BPE()
        built = _train(model, pre_tokenizers.Metaspace(), decoders.Metaspace(), special)
    path = folder / "tokenizer.json"
    built.save(str(path))
    return load_tokenizer("hf", path)


def _sentencepiece(folder, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LATIN),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 60, **options},
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer("sentencepiece", path)


def _measured(tokenizer, text):
    return coverage_of(tokenizer, text, tokenizer.encode_document(text))


def _prepare(tokenizer, out, texts=TEXTS, **options):
    documents = (Document(text, str(i)) for i, text in enumerate(texts))
    settings = {"name": "n", "validation_fraction": 0.1, "seed": 0, "progress": False}
    return prepare_stores(documents, tokenizer, out, **{**settings, **options})


@pytest.mark.parametrize("kind", LOSSY)
def test_coverage_counts_what_a_tokenizer_of_tokenizers_cannot_spell(kind, tmp_path):
    tokenizer = _tokenizer(kind, tmp_path)
    found = _measured(tokenizer, FOREIGN)
    # A word piece is known or unknown as a whole.
    assert (found.text, found.left_out, found.example) == (len(FOREIGN.encode()), 9, "東")
    assert _measured(tokenizer, LATIN[0]).left_out == 0
    assert (tokenizer.spelling is None) == (kind == "word_pieces")


def test_coverage_counts_what_sentencepiece_cannot_spell(tmp_path):
    tokenizer = _sentencepiece(tmp_path, model_type="unigram")
    found = _measured(tokenizer, FOREIGN)
    assert (found.left_out, found.example) == (9, "東")


def test_coverage_of_lossless_tokenizers_is_whole(tmp_path):
    texts = [*TEXTS, "Żółta é\n\tłódź \U0001f600", "\u2581 a mark"]
    # That of the kind "unigram" has no byte fallback.
    kinds = [kind for kind in KINDS if kind != "unigram"]
    found = [BYTES, *(load_kind(kind, tmp_path / kind) for kind in kinds)]
    path = write_dummy_prefix_model(tmp_path / "tokenizer.model")
    for tokenizer in [*found, load_tokenizer("sentencepiece", path)]:
        for text in texts:
            assert _measured(tokenizer, text).left_out == 0, (tokenizer.kind, text)
        for text in TEXTS:
            assert _measured(tokenizer, text).changed == 0, (tokenizer.kind, text)


def test_coverage_takes_another_form_for_no_loss(tmp_path):
    _tokenizer("byte_level", tmp_path)
    path = tmp_path / "tokenizer.json"
    built = tokenizers.Tokenizer.from_file(str(path))
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    built.normalizer = normalizers.Sequence([*steps, normalizers.Strip()])
    built.save(str(path))
    tokenizer = load_tokenizer("hf", path)
    found = _measured(tokenizer, " A Fïne １ \u2460 line  ")
    assert found.left_out == 0
    # A, F, ï, １, ①, and the spaces at both ends.
    assert found.changed == 1 + 1 + 2 + 3 + 3 + 3
    assert _measured(tokenizer, "A 東").left_out == 3


def test_coverage_is_told_by_prepare_and_kept_with_the_store(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    _tokenizer("byte_level", tmp_path)
    flags = [f"--input={source}", f"--out={out}", "--json"]
    main([*flags, "--tokenizer=hf", f"--tokenizer-path={tmp_path / 'tokenizer.json'}"])
    printed = capsys.readouterr()
    note = f"note: {left_out_note(SHARE)}, first '東': bits per byte count the whole text"
    assert note in printed.err and "byte fallback or all 256 bytes" in printed.err
    assert json.loads(printed.out)["left_out_share"] == pytest.approx(SHARE, abs=1e-6)
    for split in ("train", "validation"):
        meta = TokenStore.open(out / split, verify=True).meta
        assert (meta.left_out, meta.left_out_example) == (pytest.approx(SHARE), "東")
    main([*flags, "--tokenizer=bytes"])
    printed = capsys.readouterr()
    assert printed.err == "" and "left_out" not in printed.out
    # The file is that of versions that knew nothing of it.
    assert "left_out" not in (out / "train" / "meta.json").read_text()


def test_coverage_tells_a_change_of_form_and_goes_on(tmp_path):
    texts = [text.upper() for text in LATIN]
    options = {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True}
    lower = _sentencepiece(tmp_path, vocab_size=320, **options)
    meta = _prepare(lower, tmp_path / "out", texts)["train"].meta
    assert meta.left_out == 0 and meta.changed > 0.5
    assert "(case, width, accents or spaces)" in meta.coverage_note


@pytest.mark.parametrize("processes", [1, 2])
def test_coverage_is_that_of_one_go_after_a_stop(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 300)
    monkeypatch.setattr(assembly, "_RECORD_SECONDS", 0)
    tokenizer = _tokenizer("byte_level", tmp_path)
    settings = {"name": "n", "validation_fraction": 0.1, "seed": 0, "progress": False}

    def write():
        documents = (Document(text, str(i)) for i, text in enumerate(TEXTS))
        with Preparation(tmp_path / "out", {"a": "job"}) as place:
            return write_stores(place, documents, tokenizer, processes=processes, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            assembly.Assembly, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        write()
    found, resumed = write()
    assert 1 < resumed == found
    for store in open_stores(tmp_path / "out", tokenizer).values():
        assert store.meta.left_out == pytest.approx(SHARE)


def test_text_of_which_nothing_is_left_is_refused(tmp_path):
    tokenizer = _tokenizer("byte_level", tmp_path)
    with pytest.raises(InputError, match=r"stand for nothing of its text, first '東': take a"):
        _prepare(tokenizer, tmp_path / "out", ["東京", "京都"])
    assert not (tmp_path / "out").exists()


def test_bits_per_byte_of_a_validation_say_what_is_left_out(tmp_path):
    store = _prepare(_tokenizer("byte_level", tmp_path), tmp_path / "out")["validation"]
    held_out = ValidationBatches([store], seq_len=16, global_batch_size=4)
    assert held_out.left_out == pytest.approx(SHARE)
    caution = summarize([(1.0, 2)], 3, held_out.left_out).caution
    assert caution == f" ({left_out_note(SHARE)})"
    assert summarize([(1.0, 2)], 3).caution == ""


def test_coverage_is_told_where_a_training_prepares_its_text(tmp_path, tiny_config, caplog):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    _tokenizer("byte_level", tmp_path)
    config = tiny_config(**{"model.vocab_size": 300, "train.seq_len": 16})
    data = {"sources": str(source), "tokenizer": "hf", "validation_fraction": 0.1}
    path = str(tmp_path / "tokenizer.json")
    data = dataclasses.replace(config.data, tokenizer_path=path, **data)
    with caplog.at_level(logging.INFO, "stem_jax"):
        open_run_data(dataclasses.replace(config, data=data), tmp_path / "run")
    assert f"{source}: {left_out_note(SHARE)}, first '東'" in caplog.text
