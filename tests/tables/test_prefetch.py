"""Rows on their way: each is always read with its latest value, and nothing outlives `close`."""

import dataclasses
import random
import threading
import time
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import axis_size
from stem_jax.tables import prefetch as prefetch_module
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.block_sizes import BlockSizes
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.spec import TableState, logical, stored
from stem_jax.training.look_ahead import LookAhead
from stem_jax.training.state import TrainState
from tests.offloading import FIELDS, row_threads, store_arrays

ROWS = 64
PLACES = [
    ((1, 1, 1), ("data", "fsdp")),
    ((8, 1, 1), ("data", "fsdp")),
    ((2, 2, 2), ("fsdp",)),
    ((2, 2, 2), ()),
]


class Bench:
    """A table of 64 rows between host and devices, an update that counts, and what is expected."""

    def __init__(self, tiny_config, mesh, vocab_axes, resident, policy="lfu", ahead=2):
        sizes = {"model.vocab_size": ROWS - 2, "model.ffn_dim": 4, "tables.pad_multiple": 16}
        spec = table_specs(tiny_config(**sizes, **{"tables.vocab_axes": vocab_axes}))["stem"]
        self.owners = axis_size(mesh, vocab_axes)
        self.spec = dataclasses.replace(spec, resident_rows=resident)
        self.store = HostStore.allocate(self.spec, mesh)
        rng = np.random.default_rng(0)
        self.expected = {
            name: rng.integers(0, 1 << 20, spec.shape(name)).astype(FIELDS[name]) for name in FIELDS
        }
        for block in self.store.blocks:
            rows = slice(block.row_range.start, block.row_range.stop)
            columns = slice(block.column_range.start, block.column_range.stop)
            for name, array in block.arrays.items():
                whole = self.expected[name][rows]
                array[:] = whole if name == "last_step" else whole[:, :, columns]
        self.prefetch = Prefetch(mesh, self.store, policy, ahead)
        self.room = ROWS // self.owners
        specs = dict.fromkeys(FIELDS, self.spec.row_spec)
        specs["last_step"] = self.spec.index_spec
        self._count = jax.jit(
            jax.shard_map(
                self._count_local,
                mesh=mesh,
                in_specs=(specs, self.spec.index_spec),
                out_specs=(specs, specs),
                check_vma=False,
            ),
            donate_argnums=0,
        )
        # What each update or evaluation should have read, and what it did.
        self._read: list[tuple[dict, dict]] = []

    @staticmethod
    def _count_local(arrays, slots):
        inside = jnp.minimum(slots, arrays["last_step"].shape[0] - 1)
        before, after = {}, {}
        for name, field in arrays.items():
            field = logical(field)
            before[name] = stored(field[inside])
            after[name] = stored(field.at[slots].add(1, mode="drop"))
        return after, before

    def asked(self, rows) -> AskedRows:
        return AskedRows.of_tokens(np.array(list(rows), int), ROWS, self.owners)

    def update(self, arrays, slots, rows, change: bool = True):
        """Adds one to every number of the rows; nothing is looked at before `check`."""
        lines = self.asked(rows).rows
        order = [line + owner * self.room for owner, line in lines.items()]
        expected = {n: [array[rows] for rows in order] for n, array in self.expected.items()}
        if not change:
            # Read on a copy, as the update may write to what it is given.
            _, before = self._count(jax.tree.map(jnp.copy, arrays), slots)
        else:
            arrays, before = self._count(arrays, slots)
            for array in self.expected.values():
                array[list(rows)] += 1
        self._read.append((expected, before))
        return arrays

    def check(self):
        """Every read so far had the latest values of its rows."""
        for expected, before in self._read:
            for name, of_owner in expected.items():
                found = logical(np.asarray(before[name]))
                found = found.reshape(self.owners, self.room, *found.shape[1:])
                for line, values in zip(found, of_owner, strict=True):
                    np.testing.assert_array_equal(line[: len(values)], values, err_msg=name)
        self._read.clear()

    def check_store(self):
        """The store has every row as it is."""
        for name, array in store_arrays(self.store).items():
            np.testing.assert_array_equal(array, self.expected[name], err_msg=name)

    def step(self, arrays, rows):
        """Chooses, applies and updates at once."""
        ticket = self.prefetch.ticket(self.asked(rows))
        arrays = self.prefetch.apply(arrays, ticket)
        return self.update(arrays, self.prefetch.slots(ticket, self.room), rows)

    # What a LookAhead asks of a TrainStep; a batch is a set of rows.
    def programs(self, distance: int) -> SimpleNamespace:
        sizes = BlockSizes(self.room, self.room)
        return SimpleNamespace(
            config=SimpleNamespace(tables=SimpleNamespace(prefetch=distance)),
            demand=lambda batch: {"stem": batch.tokens},
            asked_by=lambda batch, demand: {"stem": self.asked(demand["stem"])},
            reads=SimpleNamespace(
                memories={"stem": None},
                sizes_for=lambda batch, demand: {"stem": sizes},
                tables=lambda batch, sizes: {
                    "stem": SimpleNamespace(
                        exchange=SimpleNamespace(owned_rows=sizes["stem"].owned)
                    )
                },
            ),
        )

    def look_ahead(self, batches, distance, training=True) -> LookAhead:
        batches = [SimpleNamespace(tokens=rows) for rows in batches]
        programs = self.programs(distance)
        moving = {"stem": self.prefetch}
        return LookAhead(programs, iter(batches), len(batches), moving, training=training)


@pytest.fixture
def bench(tiny_config, device_mesh):
    """bench(resident rows, mesh shape, vocab axes, ...): a Bench, closed at the end."""
    made = []

    def make(resident, shape=(1, 1, 1), vocab_axes=("data", "fsdp"), **options):
        made.append(Bench(tiny_config, device_mesh(shape), vocab_axes, resident, **options))
        return made[-1]

    yield make
    for one in made:
        one.prefetch.close()
    assert row_threads() == []


@pytest.mark.parametrize(("shape", "vocab_axes"), PLACES)
@pytest.mark.parametrize("piece_bytes", [1, 5 * 100, 2**25])
def test_rows_go_to_the_slots_and_back(bench, shape, vocab_axes, piece_bytes, monkeypatch):
    monkeypatch.setattr(prefetch_module, "_PIECE_BYTES", piece_bytes)
    table = bench(24, shape, vocab_axes)
    arrays = table.prefetch.load()
    for name in FIELDS:
        assert logical(arrays[name]).shape[0] == 24
    for first in (0, 30, 0, 7):
        # Each shard has some of them.
        arrays = table.step(arrays, {(first + 5 * number) % ROWS for number in range(13)})
    table.check()
    table.prefetch.write_back(arrays)
    table.check_store()


def test_sizes_in_bytes(bench):
    table = bench(16, (2, 2, 2), ("fsdp",))
    row = 2 * 4 * 4
    assert table.prefetch.row_bytes == 3 * row + 4
    # The data axis has copies of the rows, both halves of the columns a last_step.
    arrays = table.prefetch.load()
    held = sum(shard.data.nbytes for a in arrays.values() for shard in a.addressable_shards)
    assert held == 16 * (2 * 3 * row + 4 * 4)


after = st.one_of(
    st.none(),
    st.just("save"),
    st.lists(st.sets(st.integers(0, ROWS - 1), max_size=8), min_size=1, max_size=3),
)
steps = st.lists(
    st.tuples(st.sets(st.integers(0, ROWS - 1), max_size=10), after), min_size=4, max_size=14
)


# Without shrinking: an example starts threads and compiles.
@hypothesis.given(
    steps,
    st.sampled_from([((1, 1, 1), ("data", "fsdp")), ((2, 2, 2), ("fsdp",))]),
    st.sampled_from([0, 1, 2, 4]),
    st.sampled_from(["lfu", "lru"]),
    st.integers(0, 2),
    st.integers(0, 2**32),
)
@hypothesis.settings(
    max_examples=8,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_every_row_is_read_with_its_latest_value(
    bench, monkeypatch, steps, place, distance, policy, spare, seed
):
    """Random batches, evaluations and saves; copies in threads take their time."""
    shape, vocab_axes = place
    owners = 1 if shape == (1, 1, 1) else 2
    batches = [rows for rows, _ in steps]
    windows = [set().union(*batches[max(0, t - distance) : t + 1]) for t in range(len(batches))]
    windows += [rows for _, then in steps if isinstance(then, list) for rows in then]
    asked = (AskedRows.of_tokens(np.array(list(w), int), ROWS, owners) for w in windows)
    needed = max(rows.slots_needed for rows in asked)
    resident = min(ROWS, max(needed, owners) + owners * spare)
    table = bench(resident, shape, vocab_axes, policy=policy, ahead=distance)
    rng = random.Random(seed)
    for name in ("gather", "write"):
        plain = getattr(table.store, name)

        def slow(*args, plain=plain):
            time.sleep(rng.choice([0, 0, 0, 0.002, 0.01]))
            plain(*args)

        monkeypatch.setattr(table.store, name, slow)

    def placed(ahead, ready, state, change=True):
        state = ahead.place(state, ready)
        arrays = dict(vars(state.tables["stem"]))
        arrays = table.update(arrays, ready.slots["stem"], ready.batch.tokens, change)
        return dataclasses.replace(state, tables={"stem": TableState(**arrays)})

    state = TrainState(*[None] * 6, {"stem": TableState(**table.prefetch.load())})
    ahead = table.look_ahead(batches, distance)
    for (rows, then), ready in zip(steps, ahead, strict=True):
        assert ready.batch.tokens == rows
        state = placed(ahead, ready, state)
        if then == "save":
            table.prefetch.write_back(vars(state.tables["stem"]))
            table.check_store()
        elif then is not None:
            state = ahead.settle(state)
            held_out = table.look_ahead(then, distance, training=False)
            for part in held_out:
                state = placed(held_out, part, state, change=False)
    table.check()
    table.prefetch.write_back(vars(state.tables["stem"]))
    table.check_store()
    table.prefetch.close()


def test_a_row_that_leaves_and_is_wanted_at_once(bench, monkeypatch):
    """Its write-back hangs: it must not be read from the store meanwhile."""
    table = bench(4)
    go_on, write = threading.Event(), table.store.write

    def slow(*args):
        assert go_on.wait(30)
        write(*args)

    arrays = table.prefetch.load()
    arrays = table.step(arrays, {10, 11})
    monkeypatch.setattr(table.store, "write", slow)
    # All rows leave; rows 10 and 11 have changed.
    arrays = table.step(arrays, {20, 21, 22, 23})
    back = table.prefetch.ticket(table.asked({10, 11, 40}))
    time.sleep(0.3)
    assert not back.staged.done()
    go_on.set()
    arrays = table.prefetch.apply(arrays, back)
    table.update(arrays, table.prefetch.slots(back, table.room), {10, 11, 40})
    table.check()


def test_a_save_waits_for_rows_that_travel_back(bench, monkeypatch):
    table = bench(4)
    write = table.store.write

    def slow(*args):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(table.store, "write", slow)
    arrays = table.step(table.prefetch.load(), {10, 11})
    arrays = table.step(arrays, {20, 21, 22, 23})
    table.prefetch.write_back(arrays)
    table.check_store()


@pytest.mark.parametrize("applied", [0, 1])
def test_closing_ends_the_threads(bench, applied):
    """Also those that wait for the rows of a ticket that is never applied."""
    table = bench(4, ahead=3)
    arrays = table.step(table.prefetch.load(), {10, 11})
    tickets = [table.prefetch.ticket(table.asked({20 + n, 21 + n, 22 + n})) for n in (0, 3)]
    tickets += [table.prefetch.ticket(table.asked({10, 11}))]
    for ticket in tickets[:applied]:
        arrays = table.prefetch.apply(arrays, ticket)
    time.sleep(0.1)
    assert not tickets[-1].staged.done()
    closing = threading.Thread(target=table.prefetch.close)
    closing.start()
    closing.join(10)
    hangs = closing.is_alive()
    for ticket in tickets if hangs else ():
        # So that the test ends when it fails.
        ticket.returned.cancel()
    assert not hangs
    assert row_threads() == []


@pytest.mark.parametrize("distance", [3, 4])
def test_rows_of_the_batches_in_flight_stay(bench, distance):
    """So that all of them may be brought at once: none has to come again for its step."""
    fives = [set(range(first, first + 5)) for first in range(0, 60, 5)]
    # The cache would rather keep rows that were asked for time and again than new ones.
    batches = fives[:distance] * 4 + fives[distance:]
    new = 4 * distance
    table = bench(5 * (distance + 1), ahead=distance)
    state = TrainState(*[None] * 6, {"stem": TableState(**table.prefetch.load())})
    ahead = table.look_ahead(batches, distance)
    for number, ready in enumerate(ahead):
        if number == new + 1:
            assert ready.tickets["stem"].move.missing == 5
        if new + 1 < number <= new + distance:
            assert ready.tickets["stem"].move.missing == 0, number
        state = ahead.place(state, ready)
        if new + 1 < number <= new + distance:
            # They came all the same, once, and earlier.
            assert ready.metrics["table/evictions"] == 5
            assert ready.metrics["table/row_hit_rate"] == 0
        if number in (new + 1, new + 2):
            state = ahead.settle(state)


def test_a_failure_ahead_is_raised_by_the_next_call(bench, monkeypatch):
    """Rows for some steps from now cannot be had: the step before them says so."""
    table = bench(8, ahead=4)
    arrays = table.prefetch.load()
    error, gather = RuntimeError("the host memory is gone"), table.store.gather

    def failing(block, rows, out):
        if 40 in rows:
            raise error
        gather(block, rows, out)

    monkeypatch.setattr(table.store, "gather", failing)
    tickets = [table.prefetch.ticket(table.asked({10 * n, 10 * n + 1})) for n in range(1, 5)]
    while not tickets[-1].staged.done():
        time.sleep(0.01)
    with pytest.raises(RuntimeError) as caught:
        table.prefetch.apply(arrays, tickets[0])
    assert caught.value is error


def test_buffers_are_gone_once_their_rows_are_in_slots(bench):
    """The caller keeps the ticket through the step; device memory should not be kept with it."""
    table = bench(8)
    arrays = table.prefetch.load()
    ticket = table.prefetch.ticket(table.asked(range(20, 27)))
    assert len(ticket.staged.result()["rows"]) == 16
    table.prefetch.apply(arrays, ticket)
    assert ticket.staged is None
