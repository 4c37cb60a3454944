"""Which checkpoints stay, and what half a checkpoint is worth."""

import contextlib
import dataclasses
import gc
import json
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stem_jax.checkpoints import store_handler
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables import store_snapshot
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableState, stored
from stem_jax.tables.store_snapshot import StoreSnapshot
from stem_jax.training.past_updates import PastUpdates
from stem_jax.training.state import abstract_state, init_state
from tests.logical import logical_table
from tests.offloading import FIELDS


@pytest.fixture(scope="module")
def fresh(train_step):
    """A train step and a fresh state of it."""
    step = train_step((1, 1, 1))
    return step, init_state(step.blueprint)


@pytest.fixture
def collected():
    """Collects what a test left, not all before it, while its own filters of warnings hold."""
    gc.freeze()
    yield
    gc.collect()


def failing_reads(test):
    """For tests in which Orbax fails to read: it drops the other reads, which complain later."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("collected")(test)


def plain_part(step, number: int) -> CheckpointInfo:
    counters = {"step": number, "updates": number, "bad_steps": 0, "touched_rows": {"stem": 0}}
    return CheckpointInfo(**counters, tokenizer="none", data={}, config=step.config)


def save_all(folder, fresh, losses: dict[int, float | None]):
    step, state = fresh
    with Checkpointer(folder, keep=2) as checkpoints:
        for number, loss in losses.items():
            checkpoints.save(state, plain_part(step, number), loss)
            checkpoints.wait()
        return checkpoints.steps()


def test_the_newest_and_the_best_stay(fresh, tmp_path):
    assert save_all(tmp_path, fresh, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0}) == [2, 4, 5]


def test_without_validation_the_newest_stay(fresh, tmp_path):
    assert save_all(tmp_path, fresh, {1: None, 2: None, 3: None}) == [2, 3]


def test_everything_comes_back_bit_for_bit(fresh, tmp_path):
    step, state = fresh
    save_all(tmp_path, fresh, {7: None})
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        target = abstract_state(step.blueprint)
        found = checkpoints.restore(7, target)
        params, tables = checkpoints.restore_model(7, target)
    for name, array in state.params.items():
        np.testing.assert_array_equal(found.params[name], array)
        np.testing.assert_array_equal(params[name], array)
    old, new = state.tables["stem"], found.tables["stem"]
    np.testing.assert_array_equal(new.rows, old.rows)
    np.testing.assert_array_equal(tables["stem"].last_step, old.last_step)
    assert int(found.step) == 7


def test_updates_of_a_time_without_ends_of_schedules_are_told_apart(fresh, tmp_path):
    """All those of a checkpoint that does not say; a run that goes on from there keeps them."""
    step, state = fresh
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, dataclasses.replace(plain_part(step, 7), past=PastUpdates(3)), None)
        checkpoints.wait()
        assert checkpoints.info(7).past == PastUpdates(3)
        path = tmp_path / "checkpoints" / "7" / "data" / "metadata"
        data = json.loads(path.read_text())
        del data["endless_updates"]
        path.write_text(json.dumps(data))
        assert checkpoints.info(7).past == PastUpdates(7)


def test_a_half_written_checkpoint_is_not_picked_up(fresh, tmp_path):
    save_all(tmp_path, fresh, {1: None, 2: None})
    newest = tmp_path / "checkpoints" / "2"
    # What a process killed while saving leaves: a folder under another name.
    newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


@failing_reads
def test_a_truncated_file_is_refused_by_name(fresh, tmp_path):
    step, _ = fresh
    save_all(tmp_path, fresh, {3: None})
    files = [p for p in (tmp_path / "checkpoints" / "3" / "params").rglob("*") if p.is_file()]
    for path in files:
        if path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpointer(tmp_path, read_only=True) as checkpoints,
        pytest.raises(InputError, match=r"3 is incomplete or damaged"),
    ):
        checkpoints.restore(3, abstract_state(step.blueprint))


def fill(store: HostStore, seed: int) -> dict[str, np.ndarray]:
    """Random numbers in every field; returns the whole arrays."""
    rng = np.random.default_rng(seed)
    shapes = {name: store.spec.shape(name) for name in FIELDS}
    whole = {n: rng.integers(1, 1 << 20, shape).astype(FIELDS[n]) for n, shape in shapes.items()}
    for block in store.blocks:
        rows = np.arange(len(block.row_range))
        store.write(block, rows, {name: part(whole[name], block) for name in FIELDS})
    return whole


def part(array: np.ndarray, block) -> np.ndarray:
    """What a block holds of a whole array."""
    rows = array[block.row_range.start : block.row_range.stop]
    return rows[..., block.column_range.start : block.column_range.stop] if rows.ndim > 1 else rows


def assert_holds(store: HostStore, whole: dict[str, np.ndarray]):
    for block in store.blocks:
        for name, array in block.arrays.items():
            np.testing.assert_array_equal(array, part(whole[name], block), err_msg=name)


def whole_arrays(table: TableState) -> dict[str, np.ndarray]:
    return logical_table(table)


@pytest.fixture
def offloaded(train_step):
    """offloaded(mesh shape, vocab_axes): a train step, its abstract state, and an empty store."""

    def make(shape, vocab_axes=("data", "fsdp"), moments=True):
        step = train_step(shape, **{"tables.vocab_axes": vocab_axes})
        spec = table_specs(step.config)["stem"]
        target = abstract_state(step.blueprint)
        return step, target, HostStore.allocate(spec, step.mesh, moments=moments)

    return make


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks of two rows and pieces of two chunks, so that a tiny table has many of them."""
    for module, name, rows in (
        (store_snapshot, "_CHUNK_BYTES", 2),
        (store_snapshot, "_PIECE_BYTES", 4),
        (store_handler, "_READ_BYTES", 4),
    ):
        monkeypatch.setattr(module, name, rows * 2 * 48 * 4)


def save_store(folder, fresh, store, number=1):
    step, state = fresh
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, plain_part(step, number), None, {"stem": store})
        checkpoints.wait()


FORMS = ("store", "arrays")
OTHER_PLACES = [
    ((1, 1, 1), ("data", "fsdp")),
    ((2, 2, 2), ("data", "fsdp")),
    ((1, 2, 4), ("fsdp",)),
    # Three of the eight rows of a shard are in each piece that was saved.
    ((8, 1, 1), ("data", "fsdp")),
    ((4, 1, 2), ()),
]


@pytest.mark.parametrize(("shape", "vocab_axes"), OTHER_PLACES)
def test_a_store_goes_anywhere(fresh, offloaded, small_pieces, tmp_path, shape, vocab_axes):
    _, _, store = offloaded((2, 2, 2), ("data", "fsdp"))
    whole = fill(store, 1)
    save_store(tmp_path, fresh, store)
    _, target, other = offloaded(shape, vocab_axes)
    _, _, only_rows = offloaded(shape, vocab_axes, moments=False)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        arrays = checkpoints.restore(1, target).tables["stem"]
        assert checkpoints.restore(1, target, {"stem": other}).tables == {}
        params, tables = checkpoints.restore_model(1, target, {"stem": only_rows})
    for name, array in whole_arrays(arrays).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert arrays.rows.sharding == target.tables["stem"].rows.sharding
    assert_holds(other, whole)
    assert_holds(only_rows, whole)
    assert tables == {} and params.keys() == target.params.keys()


@pytest.mark.parametrize(("shape", "vocab_axes"), OTHER_PLACES)
def test_arrays_go_into_any_store(fresh, offloaded, small_pieces, tmp_path, shape, vocab_axes):
    (step, state), whole = fresh, fill(offloaded((2, 2, 2))[2], 2)
    places = vars(state.tables["stem"])
    table = {n: jax.device_put(stored(whole[n]), a.sharding) for n, a in places.items()}
    state = dataclasses.replace(state, tables={"stem": TableState(**table)})
    save_all(tmp_path, (step, state), {1: None})
    _, target, store = offloaded(shape, vocab_axes)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore(1, target, {"stem": store})
    assert_holds(store, whole)


def test_what_is_written_while_a_save_runs_is_not_in_it(
    fresh, offloaded, small_pieces, tmp_path, monkeypatch
):
    step, state = fresh
    _, target, store = offloaded((2, 2, 2))
    saved = fill(store, 1)
    go_on = threading.Event()
    pieces = StoreSnapshot.pieces

    def slow(self, block, name):
        go_on.wait(30)
        yield from pieces(self, block, name)

    monkeypatch.setattr(StoreSnapshot, "pieces", slow)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, plain_part(step, 1), None, {"stem": store})
        later = fill(store, 2)
        go_on.set()
        # The next save waits for this one, as they share the store.
        checkpoints.save(state, plain_part(step, 2), None, {"stem": store})
        checkpoints.wait()
        fill(store, 3)
        for number, whole in ((1, saved), (2, later)):
            checkpoints.restore(number, target, {"stem": store})
            assert_holds(store, whole)


def test_a_reader_without_targets_gets_numpy(fresh, offloaded, tmp_path):
    _, _, store = offloaded((1, 2, 1))
    whole = fill(store, 1)
    save_store(tmp_path, fresh, store)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        items = ("table_rows", "table_slots")
        found = manager.restore(
            1, args=ocp.args.Composite(**{item: ocp.args.StandardRestore() for item in items})
        )
    for name, array in {**found["table_rows"], **found["table_slots"]}.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, whole[name])


@failing_reads
@pytest.mark.parametrize(
    ("restored_as", "saved_as"),
    [
        pytest.param(a, b, marks=[pytest.mark.long] * (a != b or a == FORMS[0]))
        for a in FORMS
        for b in FORMS
    ],
)
def test_damaged_tables_are_refused(fresh, offloaded, tmp_path, saved_as, restored_as):
    """Each file of the table, truncated and deleted: refused, or not needed."""
    _, target, store = offloaded((1, 1, 1))
    whole = fill(store, 1)
    if saved_as == "store":
        save_store(tmp_path, fresh, store)
    else:
        save_all(tmp_path, fresh, {1: None})
        whole = whole_arrays(fresh[1].tables["stem"])

    def restore() -> bool:
        """False if refused; garbage fails."""
        _, _, into = offloaded((1, 1, 1))
        try:
            if restored_as == "store":
                checkpoints.restore_model(1, target, {"stem": into})
                assert_holds(into, whole)
            else:
                _, tables = checkpoints.restore_model(1, target)
                for name, array in whole_arrays(tables["stem"]).items():
                    np.testing.assert_array_equal(array, whole[name], err_msg=name)
        except InputError as error:
            assert "1 is incomplete or damaged" in str(error)
            return False
        return True

    folder = tmp_path / "checkpoints" / "1"
    refused = set()
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert restore()
        for item in ("table_rows", "table_slots"):
            for path in sorted(p for p in (folder / item).rglob("*") if p.is_file()):
                content = path.read_bytes()
                for damaged in (None, content[: len(content) // 2]):
                    path.unlink()
                    if damaged is not None:
                        path.write_bytes(damaged)
                    if not restore():
                        refused.add((item, path.parent.name))
                    path.write_bytes(content)
        assert restore()
    # Values, the tree of them, and its root.
    for item in ("table_rows", "table_slots"):
        assert {(item, "d"), (item, item)} <= refused


@failing_reads
def test_a_part_that_was_never_written_is_not_zeros(
    fresh, offloaded, small_pieces, tmp_path, monkeypatch
):
    _, target, store = offloaded((1, 1, 1))
    fill(store, 1)
    pieces = StoreSnapshot.pieces

    def all_but_one(self, block, name):
        found = list(pieces(self, block, name))
        return found[:3] + found[4:]

    monkeypatch.setattr(StoreSnapshot, "pieces", all_but_one)
    save_store(tmp_path, fresh, store)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        for into in ({"stem": store}, None):
            with pytest.raises(InputError, match="1 is incomplete or damaged"):
                checkpoints.restore(1, target, into)


def wait_for_the_end_of_the_snapshot(store):
    """Without asking Orbax: from here on writes cost no more than themselves."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            return store.snapshot().close()
        time.sleep(0.01)
    pytest.fail("the snapshot is still open")


@pytest.mark.parametrize("noticed_by", ["wait", "save"])
def test_a_failed_save_is_told_and_leaves_nothing(
    fresh, offloaded, small_pieces, tmp_path, monkeypatch, noticed_by
):
    step, state = fresh
    _, target, store = offloaded((1, 1, 1))
    fill(store, 1)
    pieces = StoreSnapshot.pieces

    def failing(self, block, name):
        yield from list(pieces(self, block, name))[:2]
        raise OSError("no space left")

    with Checkpointer(tmp_path) as checkpoints:
        monkeypatch.setattr(StoreSnapshot, "pieces", failing)
        checkpoints.save(state, plain_part(step, 1), None, {"stem": store})
        wait_for_the_end_of_the_snapshot(store)
        with pytest.raises(InputError, match=r"cannot write a checkpoint .*no space left"):
            if noticed_by == "wait":
                checkpoints.wait()
            else:
                checkpoints.save(state, plain_part(step, 2), None, {"stem": store})
        assert checkpoints.steps() == []
        monkeypatch.setattr(StoreSnapshot, "pieces", pieces)
        # Neither the store nor the checkpoints are stuck.
        whole = fill(store, 2)
        checkpoints.save(state, plain_part(step, 3), None, {"stem": store})
        wait_for_the_end_of_the_snapshot(store)
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        checkpoints.restore(3, target, {"stem": store})
    assert_holds(store, whole)


@pytest.mark.parametrize(
    ("whole", "chunk", "most", "ends"),
    [
        (range(0, 10), 3, 1, [3, 6, 9, 10]),
        (range(0, 10), 3, 7, [6, 10]),
        (range(4, 10), 3, 1, [6, 9, 10]),
        (range(6, 12), 3, 100, [12]),
        (range(6, 12), 50, 1, [12]),
    ],
)
def test_what_is_read_at_a_time_ends_with_chunks(whole, chunk, most, ends):
    found = [(x.start, x.stop) for x in store_handler._cut(whole, chunk, most)]
    assert found == [*zip([whole.start, *ends[:-1]], ends, strict=True)]
