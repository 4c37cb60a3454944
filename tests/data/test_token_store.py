"""The token store: each pair inside a document is scored once, and damage is refused."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.token_store import TokenStore
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.errors import InputError

BOS, EOS = 98, 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 97), max_size=12), min_size=1, max_size=8)


def _writer(folder, vocab_size=100, **kwargs):
    fields = {"fingerprint": "f" * 64, "bos_id": BOS, "eos_id": EOS, "name": "n", "split": "train"}
    return TokenStoreWriter(folder, vocab_size=vocab_size, **{**fields, **kwargs})


def _write(folder, documents, **kwargs):
    with _writer(folder, **kwargs) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=3 * len(ids))
    return TokenStore.open(folder)


@pytest.fixture
def store(tmp_path):
    return _write(tmp_path / "store", [[1, 2], [3, 4, 5]])


def test_round_trip(store, tmp_path):
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (2, 9, 15)
    assert store.document_ids(0).tolist() == [BOS, 1, 2, EOS]
    assert store.document_ids(1).tolist() == [BOS, 3, 4, 5, EOS]
    assert store.document_bytes.tolist() == [6, 9]
    raw = (tmp_path / "store" / "tokens.bin").read_bytes()
    assert raw == np.array([BOS, 1, 2, EOS, BOS, 3, 4, 5, EOS], "<u2").tobytes()
    assert np.fromfile(tmp_path / "store" / "documents.bin", "<u8").tolist() == [0, 4, 9]
    assert TokenStore.open(tmp_path / "store", fingerprint="f" * 64, vocab_size=128, verify=True)


def test_the_rows_of_the_docstring(store):
    first, second = store.row(0, 4), store.row(1, 4)
    assert first["tokens"].tolist() == [BOS, 1, 2, EOS]
    assert first["targets"].tolist() == [1, 2, EOS, BOS]
    assert first["loss_mask"].tolist() == [1, 1, 1, 0]
    assert second["targets"].tolist() == [3, 4, 5, EOS]
    assert second["loss_mask"].tolist() == [1, 1, 1, 1]
    assert store.num_rows(4, drop_last=False) == 2


def test_a_short_last_row_is_padded(store):
    assert (store.num_rows(5, drop_last=True), store.num_rows(5, drop_last=False)) == (1, 2)
    row = store.row(1, 5)
    assert row["tokens"].tolist() == [3, 4, 5, 0, 0]
    assert row["targets"].tolist() == [4, 5, EOS, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 0]
    assert row["loss_mask"].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32), (128256, np.uint32)]
)
def test_the_smallest_dtype_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    store = _write(tmp_path / "store", [[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert store.tokens.dtype == dtype
    assert store.row(0, 3)["tokens"].tolist() == [BOS, vocab_size - 1, 0]


def _check_row(row, documents, start, seq_len):
    """The row against a direct walk over the documents, one token at a time."""
    walk = [
        (token, document, place)
        for document, ids in enumerate(documents)
        for place, token in enumerate([BOS, *ids, EOS])
    ]
    for i in range(seq_len):
        at = start + i
        if at + 1 >= len(walk):
            assert [row[key][i] for key in row] == [0] * len(row)
            continue
        (token, document, place), (target, target_document, _) = walk[at], walk[at + 1]
        assert row["tokens"][i] == token and row["targets"][i] == target
        assert row["loss_mask"][i] == (document == target_document)
        assert row["segment_ids"][i] == 1 + document - walk[start][1]
        assert row["positions"][i] == min(place, i) < seq_len


@given(documents=DOCUMENTS, seq_len=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_every_pair_inside_a_document_is_scored_exactly_once(tmp_path_factory, documents, seq_len):
    store = _write(tmp_path_factory.mktemp("stores") / "store", documents)
    scored = []
    for index in range(store.num_rows(seq_len, drop_last=False)):
        row = store.row(index, seq_len)
        dtypes = {key: value.dtype.name for key, value in row.items()}
        assert dtypes.pop("loss_mask") == "float32" and set(dtypes.values()) == {"int32"}
        assert all(value.shape == (seq_len,) for value in row.values())
        _check_row(row, documents, index * seq_len, seq_len)
        mask = row["loss_mask"] == 1
        scored += zip(row["tokens"][mask].tolist(), row["targets"][mask].tolist(), strict=True)
    wrapped = [[BOS, *ids, EOS] for ids in documents]
    assert scored == [pair for ids in wrapped for pair in itertools.pairwise(ids)]
    with pytest.raises(IndexError):
        store.row(store.num_rows(seq_len, drop_last=False), seq_len)


@given(documents=DOCUMENTS)
@settings(max_examples=30, deadline=None)
def test_dropping_the_last_row_leaves_only_full_ones(tmp_path_factory, documents):
    store = _write(tmp_path_factory.mktemp("stores") / "store", documents)
    for seq_len in range(1, store.num_tokens):
        full = store.num_rows(seq_len, drop_last=True)
        assert (store.row(full - 1, seq_len)["segment_ids"] > 0).all()
        assert full * seq_len + seq_len + 1 > store.num_tokens


def test_a_folder_is_no_store_before_it_is_whole(tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(RuntimeError, match="interrupted"), _writer(folder) as writer:
        writer.add([1, 2], 2)
        raise RuntimeError("interrupted")
    with pytest.raises(InputError, match="holds no token store"):
        TokenStore.open(folder)
    with pytest.raises(InputError, match="would be empty"), _writer(tmp_path / "empty"):
        pass
    with pytest.raises(InputError, match="holds no token store"):
        TokenStore.open(tmp_path / "empty")


def test_a_store_is_not_written_over(store):
    with pytest.raises(InputError, match="holds a token store: write elsewhere"):
        _writer(store.folder)


def test_a_writer_goes_on_with_what_is_said_to_be_written(tmp_path, store):
    folder = tmp_path / "again"
    with pytest.raises(RuntimeError), _writer(folder) as writer:
        writer.add([1, 2], 6)
        kept = writer.size
        writer.add([50], 3)
        raise RuntimeError
    with _writer(folder, written=kept) as writer:
        writer.add([3, 4, 5], 9)
    assert TokenStore.open(folder, verify=True).meta == store.meta
    with pytest.raises(InputError, match=r"tokens\.bin has 0 bytes, not the 8 that were written"):
        _writer(tmp_path / "none", written=kept)


@pytest.mark.parametrize("wrong", [100, -1, 70000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    match = f"token id {wrong} in document 1 is outside the vocabulary of 100 ids"
    with pytest.raises(InputError, match=match), _writer(tmp_path / "store") as writer:
        writer.add([5], 1)
        writer.add([1, wrong], 2)
    assert not (tmp_path / "store" / "meta.json").exists()


def _set_meta(store, **changes):
    path = store.folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_and_foreign_folders_are_refused(tmp_path, store):
    with pytest.raises(InputError, match=r"none holds no token store .*: run prepare"):
        TokenStore.open(tmp_path / "none")
    _set_meta(store, surprise=1)
    with pytest.raises(InputError, match=r"does not know \(surprise\): a newer one wrote it"):
        TokenStore.open(store.folder)
    for text, match in (
        ("{}", "is not a token store's"),
        ("[]", "is not a token store's"),
        ("{cut", "is not JSON"),
        ('{"format_version": 1, "name": "n"}', "lacks split, dtype"),
    ):
        (store.folder / "meta.json").write_text(text)
        with pytest.raises(InputError, match=rf"meta\.json {match}.*prepare the text again"):
            TokenStore.open(store.folder)


def test_a_newer_format_is_refused(store):
    _set_meta(store, format_version=2, added_later=True)
    with pytest.raises(InputError, match="format version 2, this program reads 1"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "bytes.bin"])
def test_truncated_and_missing_files_are_refused(store, name):
    path = store.folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    match = f"{re.escape(name)} has {len(raw) - 2} bytes where its meta.json needs {len(raw)}"
    with pytest.raises(InputError, match=match):
        TokenStore.open(store.folder)
    path.unlink()
    with pytest.raises(InputError, match="has 0 bytes"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "bytes.bin"])
@pytest.mark.parametrize("earlier", [False, True])
def test_verify_finds_one_changed_byte(store, name, earlier):
    if earlier:
        # As written by versions without this field.
        record = json.loads((store.folder / "meta.json").read_text())
        del record["bytes_checksum"]
        (store.folder / "meta.json").write_text(json.dumps(record))
    TokenStore.open(store.folder, verify=True)
    path = store.folder / name
    raw = bytearray(path.read_bytes())
    raw[8] ^= 1
    path.write_bytes(raw)
    TokenStore.open(store.folder)
    match = r"bytes\.bin adds up" if earlier and name == "bytes.bin" else "not match its checksum"
    with pytest.raises(InputError, match=rf"{match} .* prepare the text again"):
        TokenStore.open(store.folder, verify=True)


def test_another_tokenizer_or_a_smaller_model_is_refused(store):
    with pytest.raises(InputError, match=r"tokenizer ffffffffffff, not .* 000000000000: prepare"):
        TokenStore.open(store.folder, fingerprint="0" * 64)
    with pytest.raises(InputError, match=r"100 ids, the model only 99: set model\.vocab_size"):
        TokenStore.open(store.folder, vocab_size=99)


def test_a_row_longer_than_the_store_is_refused(store):
    assert store.num_rows(8, drop_last=True) == 1
    with pytest.raises(InputError, match=r"seq_len 9 is longer .* 9 tokens: use at most 8"):
        store.num_rows(9, drop_last=True)
    assert store.num_rows(9, drop_last=False) == 1
    with pytest.raises(InputError, match="seq_len 0 must be at least 1"):
        store.num_rows(0, drop_last=True)
