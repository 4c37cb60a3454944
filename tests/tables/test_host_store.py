"""A table in host memory: the same shards and rows as on devices, and snapshots that hold still."""

import threading

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables import host_store, store_snapshot
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import init_table, stored
from tests.offloading import FIELDS

PLACES = [
    ((1, 1, 1), ("data", "fsdp")),
    ((8, 1, 1), ("data", "fsdp")),
    ((2, 2, 2), ("data", "fsdp")),
    # Shards that two devices have.
    ((2, 2, 2), ("fsdp",)),
    ((2, 4, 1), ()),
]


@pytest.fixture
def table_spec(tiny_config):
    return lambda vocab_axes=("data", "fsdp"): table_specs(
        tiny_config(**{"tables.vocab_axes": vocab_axes})
    )["stem"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few rows of a whole tiny table, so that every path over pieces runs."""
    # No shard is a multiple of five rows: the last piece overlaps.
    monkeypatch.setattr(host_store, "_MADE_ROWS", 5)
    monkeypatch.setattr(store_snapshot, "_PIECE_BYTES", 6 * 2 * 48 * 4)
    monkeypatch.setattr(store_snapshot, "_CHUNK_BYTES", 3 * 2 * 48 * 4)


def random_values(store, block, count, rng):
    """Values for `count` rows of a block, by field."""
    return {
        name: rng.integers(1, 1 << 20, (count, *array.shape[1:])).astype(array.dtype)
        for name, array in block.arrays.items()
    }


def random_store(spec, mesh, seed=0):
    rng = np.random.default_rng(seed)
    store = HostStore.allocate(spec, mesh)
    for block in store.blocks:
        values = random_values(store, block, len(block.row_range), rng)
        store.write(block, np.arange(len(block.row_range)), values)
    return store


def copies(store):
    return [{name: array.copy() for name, array in b.arrays.items()} for b in store.blocks]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def read_all(snapshot, store):
    """What a snapshot says each block holds."""
    found = []
    for block in store.blocks:
        arrays = {}
        for name, array in block.arrays.items():
            arrays[name] = np.full_like(array, -1)
            for first, rows in snapshot.pieces(block.index, name):
                arrays[name][first : first + len(rows)] = rows
        found.append(arrays)
    for name in FIELDS:
        snapshot.finish(name)
    return found


@pytest.mark.parametrize(("shape", "vocab_axes"), PLACES)
def test_fresh_rows_are_those_of_the_devices(
    table_spec, device_mesh, small_pieces, shape, vocab_axes
):
    spec, mesh = table_spec(vocab_axes), device_mesh(shape)
    key = jax.random.key(5)
    table = init_table(spec, key, mesh)
    # As in a run, where the mesh is set for the programs on the accelerators.
    with jax.set_mesh(mesh):
        store = HostStore.create(spec, key, mesh)
    assert {type(array) for block in store.blocks for array in block.arrays.values()} == {
        np.ndarray
    }
    for block in store.blocks:
        for shard in table.rows.addressable_shards:
            if shard.device in block.devices:
                np.testing.assert_array_equal(stored(block.arrays["rows"]), shard.data)
        assert not any(block.arrays[name].any() for name in ("mu", "nu", "last_step"))
        vectors, rows, columns = table.rows.sharding.shard_shape(table.rows.shape)
        shapes = [array.shape for array in block.arrays.values()]
        assert shapes == [(rows, vectors, columns)] * 3 + [(rows,)]


@pytest.mark.parametrize(("shape", "vocab_axes"), PLACES)
def test_blocks_are_the_distinct_shards(table_spec, device_mesh, shape, vocab_axes):
    spec, mesh = table_spec(vocab_axes), device_mesh(shape)
    shape = (spec.num_rows, spec.vectors, spec.width)
    shards = NamedSharding(mesh, spec.logical_spec).devices_indices_map(shape)
    store = HostStore.allocate(spec, mesh)
    found = {
        device: (block.row_range, block.column_range)
        for block in store.blocks
        for device in block.devices
    }
    for device, index in shards.items():
        rows, _, columns = (
            range(*part.indices(size)) for part, size in zip(index, shape, strict=True)
        )
        assert found.pop(device) == (rows, columns)
    assert not found
    # The shard number is the device's place along the axes that shard the rows.
    sizes = [mesh.shape[axis] for axis in vocab_axes]
    for block in store.blocks:
        for device in block.devices:
            place = dict(zip(mesh.axis_names, np.argwhere(mesh.devices == device)[0], strict=True))
            number = np.ravel_multi_index([place[axis] for axis in vocab_axes], sizes)
            assert block.shard == (number if vocab_axes else 0)


@pytest.mark.parametrize(("shape", "vocab_axes"), PLACES)
def test_every_number_is_saved_once(table_spec, device_mesh, shape, vocab_axes):
    spec = table_spec(vocab_axes)
    store = HostStore.allocate(spec, device_mesh(shape))
    times = {name: np.zeros(spec.shape(name), int) for name in FIELDS}
    for block in store.blocks:
        rows = slice(block.row_range.start, block.row_range.stop)
        columns = slice(block.column_range.start, block.column_range.stop)
        for name in block.saves:
            place = rows if name == "last_step" else (rows, slice(None), columns)
            times[name][place] += 1
    for name in FIELDS:
        assert (times[name] == 1).all(), name


@pytest.mark.parametrize("moments", [True, False])
def test_needed_bytes_are_known_beforehand(table_spec, device_mesh, moments):
    spec, mesh = table_spec(("fsdp",)), device_mesh((2, 2, 2))
    store = HostStore.allocate(spec, mesh, moments=moments)
    # 96 rows of two layers of 48, once: replicas share their blocks. Both halves of the columns
    # have a last_step.
    assert store.num_bytes == 4 * 96 * (3 * 2 * 48 + 2 if moments else 2 * 48)
    assert HostStore.needed_bytes(spec, mesh, moments=moments) == store.num_bytes
    assert store.fields == (tuple(FIELDS) if moments else ("rows",))


def test_rows_come_back_as_they_were_written(table_spec, device_mesh):
    rng = np.random.default_rng(0)
    store = random_store(table_spec(), device_mesh((2, 2, 2)))
    expected = copies(store)
    for block in store.blocks * 2:
        rows = rng.permutation(len(block.row_range))[:7]
        # Staging buffers have room for more, as their sizes are few.
        values = random_values(store, block, 9, rng)
        store.write(block, rows, values)
        for name, array in expected[block.index].items():
            array[rows] = values[name][:7]
        asked = rng.integers(0, len(block.row_range), 11)
        out = {name: np.full((13, *a.shape[1:]), 7, a.dtype) for name, a in block.arrays.items()}
        store.gather(block, asked, out)
        for name, array in expected[block.index].items():
            np.testing.assert_array_equal(out[name][:11], array[asked])
            assert (out[name][11:] == 7).all()
    assert_equal(copies(store), expected)


def test_rows_outside_a_block_are_refused(table_spec, device_mesh):
    store = HostStore.allocate(table_spec(), device_mesh((8, 1, 1)))
    block = store.blocks[1]
    values = random_values(store, block, 2, np.random.default_rng(0))
    for rows in ([0, 12], [-1, 3]):
        with pytest.raises(IndexError, match="within the 12 rows of block 1"):
            store.gather(block, np.array(rows), values)
        with pytest.raises(IndexError, match="within the 12 rows of block 1"):
            store.write(block, np.array(rows), values)
    store.write(block, np.array([], np.int64), values)
    assert not block.arrays["rows"].any()


# True reads a piece of a random field, else rows are written.
@hypothesis.given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, 23), unique=True))))
@hypothesis.settings(
    max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_snapshot_holds_still(table_spec, device_mesh, small_pieces, steps):
    store = random_store(table_spec(), device_mesh((2, 2, 2)))
    expected, rng = copies(store), np.random.default_rng(len(steps))
    snapshot = store.snapshot()
    readers = {
        (block.index, name): snapshot.pieces(block.index, name)
        for block in store.blocks
        for name in block.saves
    }
    found = copies(store)
    latest = copies(store)
    for key in readers:
        found[key[0]][key[1]].fill(-1)

    def read(key):
        for first, rows in readers[key]:
            found[key[0]][key[1]][first : first + len(rows)] = rows
            return True
        return False

    for rows in steps:
        if rows is None:
            read(list(readers)[rng.integers(len(readers))])
            continue
        block = store.blocks[rng.integers(len(store.blocks))]
        values = random_values(store, block, len(rows), rng)
        store.write(block, np.array(rows, np.int64), values)
        for name, array in latest[block.index].items():
            array[rows] = values[name]
    for key in readers:
        while read(key):
            pass
    assert_equal(found, expected)
    assert_equal(copies(store), latest)
    # Every place on the shelf is free again.
    assert snapshot._shelf.has_room(1 << 60)
    snapshot.close()
    assert snapshot.closed


def test_a_snapshot_holds_still_while_threads_write(table_spec, device_mesh, small_pieces):
    store = random_store(table_spec(), device_mesh((2, 2, 2)))
    expected = copies(store)
    snapshot = store.snapshot()
    stop = threading.Event()

    def write(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            block = store.blocks[rng.integers(4)]
            # Each thread has rows of its own, as each row is in one transfer at a time.
            rows = np.unique(rng.integers(0, 6, 4)) * 4 + seed
            store.write(block, rows, random_values(store, block, 4, rng))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        found = read_all(snapshot, store)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for block in store.blocks:
        for name in set(FIELDS) - block.saves:
            assert (found[block.index].pop(name) == -1).all()
            expected[block.index].pop(name)
    assert_equal(found, expected)


@pytest.fixture
def little_room(table_spec, device_mesh, small_pieces, monkeypatch):
    """A store, and a snapshot of it that may keep the fields of four rows aside."""
    store = random_store(table_spec(), device_mesh((1, 1, 1)))
    monkeypatch.setattr(store_snapshot, "_KEPT_PART", 1 << 40)
    monkeypatch.setattr(store_snapshot, "_KEPT_LEAST_BYTES", 4 * 4 * (3 * 2 * 48 + 1))
    return store, store.snapshot()


def write_in_a_thread(store, rows):
    block = store.blocks[0]
    values = random_values(store, block, len(rows), np.random.default_rng(1))
    thread = threading.Thread(target=store.write, args=(block, np.array(rows), values))
    thread.start()
    return thread


def test_writes_wait_for_the_reader_when_much_is_kept(little_room):
    store, snapshot = little_room
    expected = copies(store)
    write_in_a_thread(store, [90, 91, 92]).join()
    waiting = write_in_a_thread(store, [1, 2, 3])
    waiting.join(0.2)
    assert waiting.is_alive()
    np.testing.assert_array_equal(store.blocks[0].arrays["rows"][1], expected[0]["rows"][1])
    # The first pieces are read: nothing has to be kept for those rows any more.
    readers = [snapshot.pieces(0, name) for name in FIELDS]
    first = [next(reader)[1] for reader in readers]
    waiting.join(10)
    assert not waiting.is_alive()
    for name, rows in zip(FIELDS, first, strict=True):
        np.testing.assert_array_equal(rows, expected[0][name][: len(rows)])


def test_a_reader_that_is_gone_holds_nobody_up(little_room, monkeypatch):
    store, _ = little_room
    monkeypatch.setattr(store_snapshot, "_PATIENCE_SECONDS", 0.1)
    write_in_a_thread(store, [90, 91, 92]).join()
    for rows in ([1, 2, 3], [4, 5, 6]):
        thread = write_in_a_thread(store, rows)
        thread.join(10)
        assert not thread.is_alive()


def test_closing_a_snapshot_lets_writes_go_on(little_room):
    store, snapshot = little_room
    write_in_a_thread(store, [90, 91, 92]).join()
    waiting = write_in_a_thread(store, [1, 2, 3])
    snapshot.close()
    waiting.join(10)
    assert not waiting.is_alive()
    with pytest.raises(RuntimeError, match="after its end"):
        next(snapshot.pieces(0, "rows"))


def test_one_snapshot_at_a_time(table_spec, device_mesh):
    store = HostStore.allocate(table_spec(), device_mesh((1, 1, 1)))
    snapshot = store.snapshot()
    with pytest.raises(RuntimeError, match="is open"):
        store.snapshot()
    read_all(snapshot, store)
    store.snapshot().close()
    with pytest.raises(ValueError, match="needs the fields"):
        HostStore.allocate(table_spec(), device_mesh((1, 1, 1)), moments=False).snapshot()


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "expected"),
    [
        (100, 4, 100),
        (16032, 163840, 96),
        (6304, 65536, 197),
        # A prime number of large rows: one row is still a chunk of its own.
        (10007, 1 << 20, 1),
    ],
)
def test_chunks_divide_a_shard(num_rows, row_bytes, expected):
    assert store_snapshot.chunk_rows(num_rows, row_bytes) == expected


def test_a_table_too_large_is_refused_before_it_is_allocated(table_spec, device_mesh, monkeypatch):
    monkeypatch.setattr(host_store, "available_host_bytes", lambda: 100_000)
    monkeypatch.setattr(np, "zeros", None)
    with pytest.raises(InputError, match=r"tables.resident_rows .* on this host, .* available"):
        HostStore.create(table_spec(), jax.random.key(0), device_mesh((1, 1, 1)))


def test_without_a_cpu_backend_the_remedy_is_named(table_spec, device_mesh, monkeypatch):
    def local_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(InputError, match=r"add cpu to JAX_PLATFORMS.*Unknown backend cpu"):
        HostStore.create(table_spec(), jax.random.key(0), device_mesh((1, 1, 1)))
