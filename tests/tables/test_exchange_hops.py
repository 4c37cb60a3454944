"""The exchange in several hops: rows and sums against float64, at every level of sizes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from stem_jax.kernels import row_sums
from stem_jax.mesh import BATCH_AXES, axis_size
from stem_jax.tables import block_sizes, exchange, hops
from stem_jax.tables.block_sizes import BlockSizes, choose_sizes, sizes_at
from stem_jax.tables.exchange import Exchange
from stem_jax.tables.hops import Hop, owner_hops
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, TableState, logical, stored
from stem_jax.tables.update_history import make_history

VECTORS, WIDTH, KEYS = 2, 6, 12
# Mesh, axes that shard the rows, most peers of a hop, slices along data, and the hops expected.
PLACES = {
    "two of four": ((2, 4, 1), BATCH_AXES, 4, 1, [(4, 1), (2, 4)]),
    "three": ((8, 1, 1), BATCH_AXES, 2, 1, [(2, 1), (2, 2), (2, 4)]),
    "tensor": ((2, 2, 2), BATCH_AXES, 2, 1, [(2, 1), (2, 2)]),
    "copies": ((2, 4, 1), ("fsdp",), 2, 1, [(2, 1), (2, 2)]),
    "slices": ((4, 2, 1), BATCH_AXES, 64, 2, [(4, 1), (2, 4)]),
    "slices within": ((4, 2, 1), ("fsdp", "data"), 64, 2, [(2, 1), (2, 4), (2, 2)]),
}


@pytest.fixture
def place(device_mesh, monkeypatch):
    """place(name): the mesh and the axes, with the hops that stand beside them."""

    def make(name):
        shape, axes, peers, slices, expected = PLACES[name]
        mesh = device_mesh(shape)
        numbers = {d: n * slices // 8 for n, d in enumerate(mesh.devices.flat)}
        monkeypatch.setattr(hops, "MOST_PEERS", peers)
        monkeypatch.setattr(hops, "slice_of", lambda devices: [numbers[d] for d in devices])
        assert owner_hops(mesh, axes) == tuple(Hop(*hop) for hop in expected)
        return mesh, axes

    return make


@functools.cache
def _programs(name: str, mesh, axes, sizes: BlockSizes | None, capacity=None):
    """Of one table: its demand, and requests, rows and sums."""
    spec = TableSpec(
        TableLayout(90, 32), VECTORS, WIDTH, 1.0, axes, "dense_adamw", 1.0, 0.0, 0.9, 0.95, 1e-8,
        1.0, capacity, 32,
    )  # fmt: skip
    table = ShardedTable(spec, mesh, KEYS, sizes)
    history = make_history(spec, np.zeros(1))

    def run(rows_VxSxF, keys, valid, gradient, slots, after):
        rows = stored(rows_VxSxF)
        state = TableState(rows, rows, rows, jnp.zeros(rows.shape[1], jnp.int32))
        requests = table.request(keys, valid)
        requests = dataclasses.replace(requests, slots=slots)
        block = table.fetch(state, requests, jnp.float32, jnp.int32(0), history)
        sums = table.push(stored(gradient), requests, after)
        return requests, logical(block), logical(sums)

    return table, jax.jit(table.demand, static_argnames="whole"), jax.jit(run)


class Case:
    """A batch at a place, its demand, and what a step of each size finds."""

    def __init__(self, name, mesh, axes, keys, valid):
        self.place, self.keys, self.valid = (name, mesh, axes), keys, valid
        self.devices = axis_size(mesh, BATCH_AXES)
        self.owners = axis_size(mesh, axes)
        table, demand, _ = _programs(*self.place, None)
        self.table, self.num_rows = table, table.spec.num_rows
        self.largest = table.largest_sizes
        self.demand = demand(keys, valid)
        self.whole = demand(keys, valid, whole=True)
        self.needed = table.needed_by(self.demand)
        numbers = table.spec.layout.row_numbers(keys)
        by_device = numbers.reshape(self.devices, -1), valid.reshape(self.devices, -1)
        self.rows = [sorted(set(r[v])) for r, v in zip(*by_device, strict=True)]
        self.all_rows = numbers[valid]

    def check_demand(self):
        assert self.needed.unique == max(len(rows) for rows in self.rows)
        shard = self.num_rows // self.owners
        lines = [self.all_rows[self.all_rows // shard == owner] for owner in range(self.owners)]
        assert self.needed.owned == max(len(set(line)) for line in lines)
        asked = self.table.asked_by(self.whole)
        assert asked is not None
        # A device has the line of its own owner, and no other.
        assert {shard.data.shape[0] for shard in self.whole.rows.addressable_shards} == {1}
        for owner, line in enumerate(lines):
            rows, tokens = np.unique(line, return_counts=True)
            np.testing.assert_array_equal(asked.rows[owner], rows - owner * shard)
            np.testing.assert_array_equal(asked.tokens[owner], tokens)

    def run(self, sizes: BlockSizes | None, capacity=None):
        """[V_pad, S, F] sums by row, float32, and all else checked."""
        table, _, run = _programs(*self.place, sizes, capacity)
        unique, owned = table.exchange.unique_rows, table.exchange.owned_rows
        rng = np.random.default_rng(3)
        table_rows = rng.normal(size=(self.num_rows, VECTORS, WIDTH)).astype(np.float32)
        # By row and device, so that it is the same at all sizes.
        values = rng.normal(size=(self.devices, self.num_rows, VECTORS, WIDTH)).astype(np.float32)
        first, *_ = run(table_rows, self.keys, self.valid, self._spread(values, None, unique),
                        np.zeros(self.owners * owned, np.int32), np.float32(0))  # fmt: skip
        first = jax.device_get(first)
        mine_DxU = first.rows.reshape(self.devices, unique)
        for mine, wanted in zip(mine_DxU, self.rows, strict=True):
            assert sorted(mine[: len(wanted)]) == wanted
            assert np.all(mine[len(wanted) :] == self.num_rows)
        owned_PxO = first.owned.reshape(self.owners, owned)
        firsts = np.arange(self.owners)[:, None] * (self.num_rows // self.owners)
        slots = np.where(owned_PxO < self.num_rows, owned_PxO - firsts, 10**6).astype(np.int32)
        gradient = self._spread(values, mine_DxU, unique)
        _, block, sums = jax.device_get(
            run(table_rows, self.keys, self.valid, gradient, slots.reshape(-1), np.float32(0))
        )
        padded = np.concatenate([table_rows, np.zeros((1, VECTORS, WIDTH), np.float32)])
        np.testing.assert_array_equal(block, padded[mine_DxU.reshape(-1)])
        # Norms and updates go over all of it.
        assert not np.any(sums[owned_PxO.reshape(-1) == self.num_rows])
        total = np.zeros((self.num_rows + 1, VECTORS, WIDTH), np.float32)
        total[owned_PxO.reshape(-1)] = sums
        exact = np.zeros((self.num_rows, VECTORS, WIDTH))
        for device, rows in enumerate(self.rows):
            exact[rows] += values[device, rows].astype(np.float64)
        np.testing.assert_allclose(total[:-1], exact, rtol=1e-6, atol=1e-6)
        inverse = first.inverse.reshape(self.devices, -1)
        seen = np.take_along_axis(mine_DxU, inverse, 1)
        real = self.valid.reshape(self.devices, -1)
        numbers = self.table.spec.layout.row_numbers(self.keys).reshape(self.devices, -1)
        np.testing.assert_array_equal(seen[real], numbers[real])
        return total[:-1]

    def _spread(self, values, mine_DxU, unique: int):
        if mine_DxU is None:
            return np.zeros((self.devices * unique, VECTORS, WIDTH), np.float32)
        # Nobody looks at what lies behind a device's rows.
        padded = np.concatenate([values, np.full_like(values[:, :1], np.nan)], axis=1)
        lines = [padded[device, mine] for device, mine in enumerate(mine_DxU)]
        for line, mine in zip(lines, mine_DxU, strict=True):
            # The keys of a device that asks for nothing have this row, and no gradient.
            line[0] = np.where(mine[0] < self.num_rows, line[0], 0)
        return np.concatenate(lines)


def _keys(kind: str, devices: int):
    shape = (1, devices, KEYS)
    rng, valid = np.random.default_rng(1), np.ones(shape, bool)
    if kind == "one row":
        return np.full(shape, 7, np.int32), valid
    if kind == "one owner":
        owned = TableLayout(90, 32).key_numbers(np.arange(12))
        return np.resize(owned[owned < 90], shape).astype(np.int32), valid
    if kind == "empty devices":
        valid[0, ::2] = False
    keys = rng.zipf(1.3, shape) if kind != "distinct" else rng.permutation(devices * KEYS)
    return (keys % 90).reshape(shape).astype(np.int32), valid


# One place with copies of the rows, one with slices; `test_any_batch` has another.
@pytest.mark.parametrize(
    "name",
    [
        "copies",
        "slices within",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("three", "slices")),
        *(
            pytest.param(name, marks=[pytest.mark.long, pytest.mark.nightly])
            for name in ("two of four", "tensor")
        ),
    ],
)
def test_every_level_gives_the_same_bits(name, place, monkeypatch):
    for least in ("_SMALLEST_BLOCK", "_SMALLEST_PAIR"):
        monkeypatch.setattr(block_sizes, least, 1)
    for spread in ("_SPREAD", "_SPREAD_OF_PAIRS"):
        monkeypatch.setattr(block_sizes, spread, 0)
    mesh, axes = place(name)
    devices = axis_size(mesh, BATCH_AXES)
    for kind in ("zipf", "empty devices"):
        case = Case(name, mesh, axes, *_keys(kind, devices))
        case.check_demand()
        if kind == "empty devices":
            case.run(None)
            continue
        levels = [sizes_at(level, case.needed, case.largest) for level in (0, 2, 3)]
        assert levels[0].hold(case.needed) and levels[-1] == case.largest
        sums = [case.run(sizes) for sizes in (*levels, case.needed)]
        # Columns in parts, as where a buffer would grow too large.
        sums.append(case.run(None, capacity=1))
        for other in sums[1:]:
            np.testing.assert_array_equal(other, sums[0])


@pytest.mark.parametrize("name", ["three", "copies"])
def test_sums_by_matrix_products(name, place, monkeypatch):
    """As TPUs sum: what such sums leave behind their rows must reach nobody."""
    monkeypatch.setitem(row_sums.WAYS, "cpu", "windows")
    mesh, axes = place(name)
    case = Case(f"{name} by windows", mesh, axes, *_keys("empty devices", 8))
    case.run(case.needed)
    # Fetched rows in pieces, of which those at the end are masked.
    monkeypatch.setattr(exchange, "_PIECE", 5)
    case.place = (f"{name} by windows in pieces", mesh, axes)
    case.run(case.needed)
    case.run(None)


def test_few_fetched_rows_are_masked():
    """A mask costs a TPU three times what its rows cost: where all rows are real there is none."""
    sizes = {"unique_rows": 1100, "owned_rows": 8, "capacities": (1100,), "relayed": ()}
    some = Exchange(96, (), (), 1, (Hop(1, 1),), **sizes, buffer_rows=2000, way="windows")
    requests = SimpleNamespace(rows=jnp.zeros(1100, jnp.int32))
    pick = jnp.zeros(1100, jnp.int32)

    def put(whole, rows):
        return some._put_picked(whole, (0, 0, 0), rows, pick, requests)

    program = jax.make_jaxpr(put)(jnp.zeros((1, 1100, 4)), jnp.ones((1100, 4))).jaxpr
    masked = {
        equation.primitive.name: any(
            inner.primitive.name == "select_n" and inner.outvars[0].aval.ndim == 2
            for inner in _all_inside(equation)
        )
        for equation in program.eqns
        if equation.primitive.name in ("scan", "while")
    }
    # The loop whose end only the device knows begins behind the last piece of real rows alone.
    assert masked == {"scan": False, "while": True}


@pytest.mark.parametrize("room", [1, 7, 8, 9, 2004])
def test_owners_rows_fill_whole_tiles(room, place):
    """Whatever a level has room for."""
    mesh, axes = place("copies")
    table, *_ = _programs("copies", mesh, axes, BlockSizes(16, room, (4,), ()))
    assert table.exchange.owned_rows == -(-room // 8) * 8


@pytest.mark.parametrize("axes", [BATCH_AXES, ("fsdp",)])
def test_the_norm_of_gradients_is_the_same_at_every_size(axes, device_mesh):
    """37 rows of an owner with room for them, for some more, and for several pieces."""
    mesh = device_mesh((2, 2, 2))
    table, *_ = _programs("norm", mesh, axes, None)
    owners, rng = axis_size(mesh, axes), np.random.default_rng(0)
    norm, found = jax.jit(table.norm), []
    values = rng.normal(size=(8, owners, 37, VECTORS, 48)).astype(np.float32)
    for room in (37, 90, 600, 2500):
        padded = np.zeros((8, owners, room, VECTORS, 48), np.float32)
        padded[:, :, :37] = values
        lines = padded.reshape(8, owners * room, VECTORS, 48)
        found.append(
            [
                float(norm(jax.device_put(stored(g), NamedSharding(mesh, table.spec.row_spec))))
                for g in lines
            ]
        )
    assert found[1:] == found[:1] * 3
    exact = np.sqrt(np.sum(values.astype(np.float64) ** 2, axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(found[0], exact, rtol=1e-6)


@pytest.mark.parametrize("kind", ["one row", "one owner", "distinct"])
def test_skewed_batches(kind, place):
    """With room for any batch: what no other level holds must be right all the same."""
    mesh, axes = place("three")
    case = Case("three", mesh, axes, *_keys(kind, 8))
    case.check_demand()
    case.run(None)
    if kind == "one owner":
        # All 12 rows of every device have one owner, and every list has room for 24 rows.
        assert case.needed.pairs[0] == case.needed.unique > case.needed.owned // 2
        assert choose_sizes(case.needed, BlockSizes(4, 4, (2, 2, 2), (4, 4)), case.largest)


def test_owners_sum_after_a_value(place):
    """What they sum by depends on it, and no value that it can have changes that."""
    mesh, axes = place("two of four")
    table, *_ = _programs("two of four", mesh, axes, None)
    requests = jax.jit(table.request)(*_keys("zipf", 8))
    for value in (0.0, 2.5, np.inf, np.nan):
        same = requests.summed_after(jnp.float32(value))
        jax.tree.map(np.testing.assert_array_equal, same, requests)
    [first, last], [other, moved] = requests.hops, requests.summed_after(jnp.float32(-1)).hops
    jax.tree.map(np.testing.assert_array_equal, other, first)
    np.testing.assert_array_equal(moved.arrived, last.arrived + 1)
    np.testing.assert_array_equal(moved.order.positions, last.order.positions + 1)


@given(st.lists(st.integers(0, 95), min_size=96, max_size=96), st.integers(0, 90))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch(place, keys, kinds):
    mesh, axes = place("two of four")
    keys = np.array(keys, np.int32).reshape(1, 8, KEYS)
    case = Case("two of four", mesh, axes, keys % (kinds + 1) % 90, keys < 90)
    case.check_demand()
    case.run(None)


def test_a_list_that_is_too_short_is_asked_for_again(place, monkeypatch):
    """Lists have room for twice the keys of a device, where an owner may be asked for more."""
    mesh, axes = place("two of four")
    table, _demand, _ = _programs("two of four", mesh, axes, None)
    keys, valid = _keys("distinct", 8)
    few = dataclasses.replace(table, keys_per_device=4)
    # Eight devices that ask one owner for two rows each; four of those fit in no list of 8.
    owned = table.spec.layout.key_numbers(np.arange(12))
    keys = np.resize(owned[owned < 90][:10], (1, 8, 4)).astype(np.int32)
    valid = np.ones_like(keys, bool)
    short = jax.jit(few.demand)(keys, valid)
    assert short.rows.shape == (8, 8) and few.asked_by(short) is None
    whole = jax.jit(functools.partial(few.demand, whole=True))(keys, valid)
    assert len(few.asked_by(whole).rows[0]) == 10


def _inside(equation):
    """The programs that an equation runs."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner


def _swaps(program, *, in_loops: bool) -> int:
    """Exchanges between devices in a program, with or without those in its loops."""
    found = 0
    for equation in program.eqns:
        found += equation.primitive.name == "all_to_all"
        if in_loops or equation.primitive.name not in ("while", "scan"):
            found += sum(_swaps(inner, in_loops=in_loops) for inner in _inside(equation))
    return found


def _all_inside(equation):
    for program in _inside(equation):
        for inner in program.eqns:
            yield inner
            yield from _all_inside(inner)


def _in_a_row(program) -> int:
    """The longest chain of exchanges that wait for each other."""
    [body] = [e.params["jaxpr"] for e in program.eqns if e.primitive.name == "shard_map"]
    depth = {}
    for equation in body.eqns:
        before = [depth.get(v, 0) for v in equation.invars if not hasattr(v, "val")]
        after = max(before, default=0) + (equation.primitive.name == "all_to_all")
        depth |= dict.fromkeys(equation.outvars, after)
    return max(depth.values())


def test_collectives_of_one_request_fetch_and_push(place):
    """As many in a row as there are hops, and none in a loop."""
    mesh, axes = place("three")
    table, *_ = _programs("three", mesh, axes, None)
    keys, valid = _keys("zipf", 8)
    state = jax.tree.map(jnp.asarray, TableState(*[np.zeros((2, 96, 6), np.float32)] * 3,
                                                 np.zeros(96, np.int32)))  # fmt: skip
    history = make_history(table.spec, np.zeros(1))
    requests = jax.eval_shape(table.request, keys, valid)
    requests = dataclasses.replace(
        requests, slots=jax.ShapeDtypeStruct(requests.owned.shape, jnp.int32)
    )
    block = jax.ShapeDtypeStruct((2, 8 * table.exchange.unique_rows, 6), jnp.float32)
    fetch = functools.partial(table.fetch, dtype=jnp.float32, step=0, history=history)
    for program, arguments, number in [
        (table.request, (keys, valid), 3),
        (fetch, (state, requests), 3 * VECTORS),
        (table.push, (block, requests), 3 * VECTORS),
    ]:
        traced = jax.make_jaxpr(program)(*arguments).jaxpr
        assert _swaps(traced, in_loops=True) == number
        assert _swaps(traced, in_loops=False) == number
        assert _in_a_row(traced) == 3
