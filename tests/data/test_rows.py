"""Rows of whole documents: each is in one of them, alone in its segment, by a fixed rule."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.loader import GlobalBatches, Share, ValidationBatches
from stem_jax.data.rows import WholeRows, _packed, rows_of
from stem_jax.data.token_store import TokenStore
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.errors import InputError

BOS, EOS = 0, 1


def _write(folder, lengths, scored=None):
    """Documents of so many tokens, bos and eos among them; no other token occurs twice."""
    first = 2
    fields = {"vocab_size": 60000, "fingerprint": "f", "bos_id": BOS, "eos_id": EOS}
    has = scored is not None
    with TokenStoreWriter(folder, **fields, name="n", split="s", has_scored=has) as writer:
        for index, length in enumerate(lengths):
            ids = [BOS, *range(first, first + length - 2), EOS]
            first += length - 2
            mask = np.array(scored[index], bool) if has else None
            counts = np.array([length]), np.array([7 * length])
            writer.extend(np.array(ids, writer.dtype), *counts, mask)
    return TokenStore.open(folder)


def _documents(row):
    """(inputs, targets, scored) of each document in a row, which lies at its beginning."""
    segments = row["segment_ids"]
    used = int((segments > 0).sum())
    assert not any(array[used:].any() for array in row.values())
    assert sorted(segments[:used]) == segments[:used].tolist()
    found = []
    for segment in range(1, int(segments.max()) + 1):
        there = segments == segment
        assert row["positions"][there].tolist() == list(range(there.sum()))
        names = ("tokens", "targets", "loss_mask")
        found.append(tuple(row[name][there].tolist() for name in names))
    return found


def test_the_rows_of_the_docstring(tmp_path):
    store = _write(tmp_path / "s", [4, 8, 3, 3])
    rows = rows_of(store, 6, "whole")
    sizes = [[len(inputs) for inputs, _, _ in _documents(rows[i])] for i in range(len(rows))]
    assert sizes == [[3, 2], [6], [2]]
    assert rows[0]["tokens"].tolist() == [BOS, 2, 3, BOS, 10, 0]
    assert rows[0]["targets"].tolist() == [2, 3, EOS, 10, EOS, 0]
    assert rows.note == (
        "4 documents in 3 rows of 6 tokens (data.packing=whole), 72.2% full; 1 of them are longer "
        "than train.seq_len and cut there, 1 tokens are not read"
    )
    assert rows_of(store, 7, "whole").note.endswith("% full")


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40), seq_len=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_each_document_lies_whole_in_one_row(tmp_path_factory, lengths, seq_len):
    store = _write(tmp_path_factory.mktemp("s") / "s", lengths)
    rows = WholeRows(store, seq_len)
    again = WholeRows(store, seq_len)
    found = []
    for index in range(len(rows)):
        documents = _documents(rows[index])
        assert documents
        found.append(documents)
        for name, array in rows[index].items():
            assert np.array_equal(array, again[index][name])
    expected = []
    for index in range(store.num_documents):
        ids = store.document_ids(index).tolist()[: seq_len + 1]
        expected.append((ids[:-1], ids[1:], [1.0] * (len(ids) - 1)))
    flat = sorted(document for documents in found for document in documents)
    assert flat == sorted(expected)
    firsts = [min(expected.index(d) for d in documents) for documents in found if documents]
    unique = len({tuple(d[0]) for d in expected}) == len(expected)
    assert firsts == sorted(firsts) or not unique
    # No two rows could be one.
    free = sorted(seq_len - sum(len(d[0]) for d in documents) for documents in found)
    used = [seq_len - n for n in free]
    assert len(found) == 1 or used[-1] > free[-1] or used[-1] + min(used[:-1]) > seq_len


def test_what_is_scored_goes_with_the_documents(tmp_path):
    masks = [[0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 1, 1, 1]]
    store = _write(tmp_path / "s", [4, 3, 6], masks)
    rows = WholeRows(store, 5)
    found = {tuple(i): mask for n in range(len(rows)) for i, _, mask in _documents(rows[n])}
    expected = {
        tuple(store.document_ids(n).tolist()[:-1]): mask[1:] for n, mask in enumerate(masks)
    }
    assert found == expected
    cut = WholeRows(store, 3)
    kept = sum(mask for n in range(len(cut)) for _, _, of in _documents(cut[n]) for mask in of)
    assert kept == 4 and cut.note.endswith("2 tokens are not read, 2 of 6 scored ones among them")
    behind = _write(tmp_path / "t", [4, 6], [[0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    with pytest.raises(InputError, match="no scored token within the first 3 of a conversation"):
        WholeRows(behind, 2)


def test_batches_are_those_of_any_number_of_processes_and_read_each_row_once(tmp_path):
    rng = np.random.default_rng(0)
    stores = [_write(tmp_path / str(n), rng.integers(2, 20, 60).tolist()) for n in range(2)]
    fields = {"seq_len": 24, "global_batch_size": 8, "seed": 3, "packing": "whole"}
    mixed = [(stores[0], 0.75), (stores[1], 0.25)]
    whole = GlobalBatches(mixed, **fields)
    parts = [GlobalBatches(mixed, **fields, share=Share((p,), 4)) for p in range(4)]
    with whole.iterate(5) as ahead:
        for step in range(5, 9):
            batch = whole.batch(step)
            shares = [part.batch(step) for part in parts]
            following = next(ahead)
            for name, array in batch.items():
                assert np.array_equal(array, np.concatenate([share[name] for share in shares]))
                assert np.array_equal(array, following[name])
    alone = GlobalBatches([(stores[0], 1.0)], **fields)
    rows = len(alone.rows[0])
    steps = rows  # 8 epochs
    [times] = alone.times_read(steps)
    assert times.tolist() == [8] * rows
    seen = [tuple(row) for step in range(steps) for row in alone.batch(step)["tokens"]]
    assert {seen.count(row) for row in set(seen)} == {8} and len(set(seen)) == rows


def test_validation_reads_all_rows_and_counts_their_bytes(tmp_path):
    lengths = [4, 9, 3, 3, 12, 5]
    stores = [_write(tmp_path / "a", lengths), _write(tmp_path / "b", [4, 4])]
    held_out = ValidationBatches(stores, seq_len=8, global_batch_size=4, packing="whole")
    assert not held_out.scores_all
    scored = sum(float(batch["loss_mask"].sum()) for batch in held_out)
    # Of the document of 12 tokens, three inputs are not read.
    assert scored == sum(n - 1 for n in lengths) - 3 + 6
    read = 7 * (sum(lengths) - 12 + 8) + 7 * 12 * 8 / 11
    assert held_out.num_bytes == round(read)
    first = ValidationBatches(
        stores, seq_len=8, global_batch_size=2, packing="whole", max_batches=1
    )
    rows = WholeRows(stores[0], 8)
    assert first.num_rows == 2
    assert first.num_bytes == round(rows.scored_bytes(2)) < held_out.num_bytes


def test_refused(tmp_path):
    store = _write(tmp_path / "s", [4])
    with pytest.raises(InputError, match=r"data\.packing='best' is unknown: use one of cut, whole"):
        rows_of(store, 4, "best")
    with pytest.raises(InputError, match="seq_len 0 must be at least 1"):
        WholeRows(store, 0)


def test_one_row_of_several_documents(tmp_path):
    store = _write(tmp_path / "s", [7, 3, 3])
    assert WholeRows(store, 6).packed_row() == 1
    assert WholeRows(store, 2).packed_row() is None
    assert rows_of(store, 6).packed_row() == store.packed_row(6) is not None


def test_packing_many_takes_seconds():
    sizes = np.random.default_rng(0).lognormal(5.5, 1.0, 200_000).astype(np.int64).clip(1, 4096)
    began = time.monotonic()
    row_n = _packed(sizes, 4096)
    assert time.monotonic() - began < 5
    used = np.bincount(row_n, sizes)
    assert used.max() <= 4096 and used.sum() / (len(used) * 4096) > 0.99
