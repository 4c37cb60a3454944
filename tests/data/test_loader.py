"""Batches: a pure function of (seed, step), the same for any number of processes."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.loader import GlobalBatches, Share, ValidationBatches
from stem_jax.data.token_store import TokenStore
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.errors import InputError

KEYS = {"tokens", "targets", "segment_ids", "positions", "loss_mask"}


def _write(folder, documents):
    with TokenStoreWriter(
        folder, vocab_size=60000, fingerprint="f", bos_id=0, eos_id=1, name=folder.name, split="s"
    ) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=10 * len(ids))
    return TokenStore.open(folder)


def _numbered(folder, first, documents=40, length=18):
    """A store of documents in which no token but bos and eos occurs twice."""
    ids = itertools.count(first)
    return _write(folder, [[next(ids) for _ in range(length)] for _ in range(documents)])


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return _numbered(folder / "a", 1000), _numbered(folder / "b", 30000, documents=25)


def _batches(stores, weights=(0.75, 0.25), **kwargs):
    fields = {"seq_len": 16, "global_batch_size": 8, "seed": 3}
    return GlobalBatches(list(zip(stores, weights, strict=False)), **{**fields, **kwargs})


def _equal(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) for key in first
    )


def test_shapes_and_dtypes(stores):
    batch = _batches(stores, share=Share((1,), 2)).batch(0)
    assert batch.keys() == KEYS
    assert all(value.shape == (4, 16) for value in batch.values())
    assert batch["loss_mask"].dtype == np.float32 and batch["tokens"].dtype == np.int32


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_process_count(stores, process_count):
    whole = _batches(stores)
    parts = [
        _batches(stores, share=Share((index,), process_count)) for index in range(process_count)
    ]
    for step in (0, 1, 7, 50, 12345):
        slices = [part.batch(step) for part in parts]
        joined = {key: np.concatenate([piece[key] for piece in slices]) for key in KEYS}
        assert _equal(joined, whole.batch(step))


def test_shares_follow_micro_batches_and_shards(stores):
    # Two micro-batches of two shards with two rows each; the devices of one process hold shard 1.
    share = Share.of_devices(shards=[1], num_shards=2, micro_batches=2)
    found, whole = _batches(stores, share=share).batch(5), _batches(stores).batch(5)
    assert all(np.array_equal(found[key], whole[key][[2, 3, 6, 7]]) for key in KEYS)
    # Devices may lie along the mesh in another order than the processes.
    scattered = _batches(stores, share=Share.of_devices([0, 2], 4, 1)).batch(5)
    assert all(np.array_equal(scattered[key], whole[key][[0, 1, 4, 5]]) for key in KEYS)


def test_batches_are_a_function_of_seed_and_step(stores):
    assert _equal(_batches(stores).batch(9), _batches(stores).batch(9))
    assert not _equal(_batches(stores).batch(9), _batches(stores).batch(10))
    assert not _equal(_batches(stores).batch(9), _batches(stores, seed=4).batch(9))


@pytest.mark.parametrize("start", [0, 1, 13])
def test_resuming_needs_the_step_alone(stores, start):
    kwargs = {"share": Share((1,), 2)}
    with (
        _batches(stores, **kwargs).iterate() as through,
        _batches(stores, **kwargs).iterate(start) as resumed,
    ):
        for _ in range(start):
            next(through)
        for step in range(start, start + 20):
            batch = next(resumed)
            assert _equal(batch, next(through))
            assert _equal(batch, _batches(stores, **kwargs).batch(step))


def test_closing_stops_the_threads(stores):
    before = set(threading.enumerate())
    iterator = _batches(stores).iterate()
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    iterator.close()
    with pytest.raises(StopIteration):
        next(iterator)
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_an_epoch_visits_each_row_once_and_the_next_in_another_order(stores):
    store = stores[0]
    rows = store.num_rows(16, drop_last=True)
    batches = _batches([store], [1.0], global_batch_size=1)
    order = [tuple(batches.batch(step)["tokens"][0].tolist()) for step in range(2 * rows)]
    expected = {tuple(store.row(index, 16)["tokens"].tolist()) for index in range(rows)}
    assert set(order[:rows]) == set(order[rows:]) == expected and len(expected) == rows
    assert order[:rows] != order[rows:]
    in_order = [tuple(store.row(index, 16)["tokens"].tolist()) for index in range(rows)]
    assert order[:rows] != in_order


def test_sources_mix_by_weight_in_every_window(stores):
    batches = _batches(stores, (3.0, 1.0))
    from_second = [(batches.batch(step)["tokens"].max(axis=1) >= 30000).sum() for step in range(50)]
    assert all(1 <= count <= 3 for count in from_second)
    assert sum(from_second) == 100


def test_equal_stores_are_not_in_lockstep(stores):
    batches = _batches([stores[0], stores[0]], (1.0, 1.0), global_batch_size=2)
    same = [np.ptp(batches.batch(step)["tokens"], axis=0).max() == 0 for step in range(40)]
    assert sum(same) < 10


def test_refusals_name_value_and_remedy(stores):
    match = r"global_batch_size 8 does not divide into 3 parts .*: use a positive multiple of 3"
    with pytest.raises(InputError, match=match):
        _batches(stores, share=Share((0,), 3))
    with pytest.raises(InputError, match=match):
        ValidationBatches(stores, seq_len=4, global_batch_size=8, share=Share((0,), 3))
    with pytest.raises(InputError, match="global_batch_size 0"):
        _batches(stores, global_batch_size=0)
    with pytest.raises(InputError, match="weight 0 of source 'b' must be a positive number"):
        _batches(stores, (1.0, 0))
    with pytest.raises(InputError, match="seq_len 5000 is longer than token store"):
        _batches(stores, seq_len=5000)
    with pytest.raises(InputError, match="needs at least one source"):
        _batches([])
    with pytest.raises(InputError, match="validation needs a store"):
        ValidationBatches([], seq_len=4, global_batch_size=8)
    with pytest.raises(InputError, match="max_batches 0 must be at least 1"):
        ValidationBatches(stores, seq_len=4, global_batch_size=8, max_batches=0)


def _scored_targets(batches):
    targets = []
    for batch in batches:
        targets += batch["targets"][batch["loss_mask"] == 1].tolist()
    return targets


DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=9), min_size=1, max_size=5)


@given(
    corpora=st.lists(DOCUMENTS, min_size=1, max_size=3),
    seq_len=st.integers(1, 9),
    global_batch_size=st.sampled_from([1, 3, 4]),
    max_batches=st.sampled_from([None, 1, 2, 3]),
)
@settings(max_examples=100, deadline=None)
def test_validation_scores_a_prefix_of_the_documents(
    tmp_path_factory, corpora, seq_len, global_batch_size, max_batches
):
    folder = tmp_path_factory.mktemp("stores")
    stores = [_write(folder / f"{i}", documents) for i, documents in enumerate(corpora)]
    validation = ValidationBatches(
        stores, seq_len=seq_len, global_batch_size=global_batch_size, max_batches=max_batches
    )
    batches = list(validation)
    assert len(batches) == validation.num_batches == len(validation)
    assert all(value.shape == (global_batch_size, seq_len) for b in batches for value in b.values())

    scored = _scored_targets(batches)
    all_targets = [target for documents in corpora for ids in documents for target in [*ids, 1]]
    assert scored == all_targets[: len(scored)]
    ids = list(validation.document_ids())
    assert [target for document in ids for target in document[1:].tolist()] == scored
    assert all(document[0] == 0 for document in ids)

    # Each document's bytes in proportion to its scored targets.
    num_bytes, left = 0.0, len(scored)
    for document in (document for documents in corpora for document in documents):
        targets = len(document) + 1
        num_bytes += 10 * len(document) * min(left, targets) / targets
        left -= min(left, targets)
    assert validation.num_bytes == pytest.approx(num_bytes, abs=0.51)
    if max_batches is None:
        assert scored == all_targets
        assert validation.num_bytes == sum(store.num_bytes for store in stores)


@pytest.mark.parametrize("process_count", [2, 4])
def test_validation_is_the_same_on_any_number_of_processes(stores, process_count):
    whole = ValidationBatches(stores, seq_len=24, global_batch_size=8)
    parts = [
        ValidationBatches(stores, seq_len=24, global_batch_size=8, share=Share((i,), process_count))
        for i in range(process_count)
    ]
    assert all(part.num_batches == whole.num_batches for part in parts)
    for index in range(whole.num_batches):
        joined = {key: np.concatenate([part.batch(index)[key] for part in parts]) for key in KEYS}
        assert _equal(joined, whole.batch(index))


def test_the_last_validation_batch_is_filled_with_rows_that_count_nothing(stores):
    validation = ValidationBatches(stores, seq_len=24, global_batch_size=16)
    filling = validation.num_batches * 16 - validation.num_rows
    last = validation.batch(validation.num_batches - 1)
    assert 0 < filling < 16
    for key in KEYS:
        assert not last[key][16 - filling :].any()
    assert last["segment_ids"][: 16 - filling].any(axis=1).all()
    with pytest.raises(IndexError):
        validation.batch(validation.num_batches)


@pytest.mark.parametrize("lengths", [[14] * 5, [30, 14, 46], [14, 30, 18, 14], [200], [14, 14, 3]])
def test_the_first_row_of_several_documents_is_found(lengths, tmp_path):
    """With bos and eos, documents of 14 tokens fill rows of 16."""
    store = _write(tmp_path / "s", [[7] * length for length in lengths])
    rows = range(store.num_rows(16, drop_last=False))
    packed = [row for row in rows if store.row(row, 16)["segment_ids"].max() > 1]
    assert store.packed_row(16) == (packed[0] if packed else None)


@pytest.mark.parametrize("first_step", [0, 5])
def test_rows_are_counted_as_batches_have_them(stores, first_step):
    """More than an epoch of the smaller store; each row is known by its first token but one."""
    one = _batches(stores, (0.5, 0.5), first_step=first_step)
    share = _batches(stores, (0.5, 0.5), first_step=first_step, share=Share((1,), 2))
    seen = np.concatenate([one.batch(first_step + n)["tokens"] for n in range(17)])
    times = one.times_read(first_step + 17)
    assert [array.sum() for array in times] == [68, 68] and times[1].max() > 1
    for store, times_R in zip(stores, times, strict=True):
        rows = [store.row(row, 16)["tokens"] for row in range(len(times_R))]
        found = [int((seen == row).all(axis=1).sum()) for row in rows]
        assert found == times_R.tolist()
    assert all(map(np.array_equal, times, share.times_read(first_step + 17)))
    assert not any(array.any() for array in one.times_read(first_step))
