"""What rows teach: counted pairs and pieces of documents, against what the rows hold."""

import itertools

import numpy as np
import pytest

from stem_jax.data.token_store import TokenStore
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.data.trained_pairs import count_pairs, pieces_of

BOS, EOS, V, L = 0, 1, 9, 4


def _write(folder, documents):
    names = {"name": "n", "split": "s", "fingerprint": "f", "bos_id": BOS, "eos_id": EOS}
    with TokenStoreWriter(folder, vocab_size=V, **names) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=len(ids))
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of one to a few rows; one ends with a row, another one before its end."""
    rng, lengths = np.random.default_rng(0), [3, 1, 2, 0, 9, 4, 1, 1, 16, 2]
    documents = [rng.integers(2, V, n).tolist() for n in lengths]
    return _write(tmp_path_factory.mktemp("store") / "store", documents)


def test_pairs_by_hand(tmp_path):
    # B 2 3 E | B 4 E B | 2 E
    store = _write(tmp_path / "store", [[2, 3], [4], [2]])
    counts = count_pairs(store, np.array([1, 3]), L, V)
    # Row 0: B-2, 2-3, 3-E. Row 1, three times: B-4, 4-E; it ends with a beginning: B-2.
    assert counts.inputs_V.tolist() == [1 + 6, 0, 1, 1, 3, 0, 0, 0, 0]
    assert counts.targets_V.tolist() == [0, 1 + 3, 1 + 3, 1, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("tokens_at_a_time", [1, 9, 1 << 20])
def test_pairs_are_those_that_rows_score(store, monkeypatch, tokens_at_a_time):
    monkeypatch.setattr("stem_jax.data.trained_pairs._PIECE_TOKENS", tokens_at_a_time)
    times_R = np.arange(store.num_rows(L, drop_last=True)) % 3
    inputs_V, targets_V = np.zeros((2, V), int)
    for row, times in enumerate(times_R):
        found = store.row(row, L)
        scored = found["loss_mask"] == 1
        np.add.at(inputs_V, found["tokens"][scored], times)
        np.add.at(targets_V, found["targets"][scored], times)
    counts = count_pairs(store, times_R, L, V)
    np.testing.assert_array_equal(counts.inputs_V, inputs_V)
    np.testing.assert_array_equal(counts.targets_V, targets_V)


def test_pieces_hold_each_scored_pair_once(store):
    rows = range(store.num_rows(L, drop_last=False))
    for row in rows:
        found = store.row(row, L)
        pairs = [
            (int(token), int(target))
            for token, target, mask in zip(*(found[k] for k in ("tokens", "targets", "loss_mask")))
            if mask
        ]
        pieces = list(pieces_of(store, L, [row]))
        ids = [piece.ids.tolist() for piece in pieces]
        assert [pair for n in ids for pair in itertools.pairwise(n)] == pairs
        assert [piece.scored for piece in pieces] == [len(n) - 1 for n in ids]
        for piece, n in zip(pieces, ids, strict=True):
            whole = store.document_ids(piece.document).tolist()
            first = piece.start - int(store.document_starts[piece.document])
            assert whole[first : first + len(n)] == n
            assert piece.ids_behind(2).tolist() == whole[max(first - 2, 0) : first + len(n)]
    assert len(list(pieces_of(store, L, rows))) > len(rows)
