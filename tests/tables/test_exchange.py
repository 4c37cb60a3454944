"""The exchange against `table[keys]`, and the bijection that spreads keys over rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.errors import InputError
from stem_jax.kernels import row_sums
from stem_jax.mesh import axis_size
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.lookup import close_rows, lookup, open_rows
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, TableState, logical, stored
from stem_jax.tables.update_history import make_history

NUM_KEYS, PADDED, LAYERS, WIDTH = 88, 96, 2, 6
MICRO, BATCH, LENGTH = 2, 8, 4
BOTH = ("data", "fsdp")
# Mesh, axes that shard the rows, capacities: one row, a few, all in one round.
PLACES = [
    ((1, 1, 1), BOTH, [3]),
    ((8, 1, 1), BOTH, [3, 1, 1000]),
    ((2, 4, 1), BOTH, [1, 3, 1000]),
    ((2, 2, 2), BOTH, [1, 1000]),
    ((2, 4, 1), ("fsdp",), [3, 1]),
    ((2, 4, 1), ("data",), [1, 1000]),
    ((2, 2, 2), ("fsdp",), [3]),
    ((2, 4, 1), (), [3]),
]


def _keys(kind: str) -> np.ndarray:
    """Keys [A, B, L] of one step."""
    rng, shape = np.random.default_rng(5), (MICRO, BATCH, LENGTH)
    if kind == "equal":
        return np.full(shape, 7, np.int32)
    if kind == "distinct":
        return rng.permutation(NUM_KEYS)[: np.prod(shape)].reshape(shape).astype(np.int32)
    return (rng.zipf(1.3, shape) % NUM_KEYS).astype(np.int32)


@functools.cache
def _program(mesh, vocab_axes: tuple[str, ...], capacity: int, micro: int = MICRO, way=None):
    """One jitted step of a table: requests, the values that each key sees, and summed gradients.

    way: of sums by row, traced by the caller; keeps the programs apart.
    """
    spec = TableSpec(
        TableLayout(NUM_KEYS, 32), LAYERS, WIDTH, 1.0, vocab_axes, "dense_adamw", 1.0, 0.0, 0.9,
        0.95, 1e-8, 1.0, capacity,
    )  # fmt: skip
    table = ShardedTable(
        spec, mesh, micro * BATCH * LENGTH // (mesh.shape["data"] * mesh.shape["fsdp"])
    )

    history = make_history(spec, np.zeros(1))

    @jax.jit
    def run(rows_VxSxF, keys_AxBxL, valid_AxBxL, cotangent_AxBxLxSxF):
        rows = stored(rows_VxSxF)
        state = TableState(rows, rows, rows, jnp.zeros(spec.num_rows, jnp.int32))
        requests = table.request(keys_AxBxL, valid_AxBxL)
        block_SxUxF = table.fetch(state, requests, jnp.float32, jnp.int32(0), history)

        indices = [
            jax.tree.map(lambda x, i=number: x[i], (requests.inverse, requests.order))
            for number in range(micro)
        ]

        def values(block_SxUxF):
            seen = []
            for inverse, order in indices:
                rows, found = open_rows(block_SxUxF), []
                for layer in range(LAYERS):
                    value, thread = lookup(rows, layer, inverse, order, mesh)
                    rows = dataclasses.replace(rows, thread=thread)
                    found.append(value)
                seen.append(close_rows(jnp.stack(found, axis=2), rows, mesh))
            return jnp.stack(seen)

        seen, pull = jax.vjp(values, block_SxUxF)
        sums = table.push(pull(cotangent_AxBxLxSxF)[0], requests)
        return requests, logical(block_SxUxF), seen, logical(sums)

    return spec, run


def _run(mesh, vocab_axes, capacity, keys, valid):
    spec, run = _program(mesh, vocab_axes, capacity, len(keys), row_sums.way_on(mesh))
    rng = np.random.default_rng(11)
    rows = rng.normal(size=(spec.num_rows, LAYERS, WIDTH)).astype(np.float32)
    cotangent = rng.normal(size=(*keys.shape, LAYERS, WIDTH)).astype(np.float32)
    # What the loss does not score has no gradient.
    cotangent *= valid[..., None, None]
    outputs = jax.device_get(run(rows, keys, valid, cotangent))
    return spec, rows, cotangent, outputs


def _owned_gradients(spec: TableSpec, mesh, requests, sums) -> np.ndarray:
    """The owners' sums [owners * O, S, F], put into a table of rows [V_pad, S, F]."""
    owners = axis_size(mesh, spec.vocab_axes)
    asked_PxO = requests.owned.reshape(owners, -1)
    real_PxO = asked_PxO < spec.num_rows
    assert len(set(asked_PxO[real_PxO])) == real_PxO.sum(), "a row has two owners"
    owner_PxO = np.broadcast_to(np.arange(owners)[:, None], asked_PxO.shape)
    at_home = asked_PxO * owners // spec.num_rows == owner_PxO
    assert np.all(at_home[real_PxO]), "a row away from its owner"
    total = np.zeros((spec.num_rows, LAYERS, WIDTH))
    total[asked_PxO[real_PxO]] = sums.reshape(*asked_PxO.shape, LAYERS, WIDTH)[real_PxO]
    return total


def _check(mesh, vocab_axes, capacity, keys, valid):
    spec, rows, cotangent, (requests, block, seen, sums) = _run(
        mesh, vocab_axes, capacity, keys, valid
    )
    numbers = spec.layout.row_numbers(keys)
    np.testing.assert_array_equal(seen[valid], rows[numbers][valid])
    oracle = np.zeros((spec.num_rows, LAYERS, WIDTH))
    np.add.at(oracle, numbers[valid], cotangent[valid].astype(np.float64))
    found = _owned_gradients(spec, mesh, requests, sums)
    np.testing.assert_allclose(found, oracle, rtol=1e-6, atol=1e-6)
    # Exactly the rows of valid keys are asked for: padding asks for nothing.
    asked = requests.owned[requests.owned < spec.num_rows]
    assert set(asked) == set(numbers[valid])
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = numbers.reshape(len(keys), devices, -1).swapaxes(0, 1).reshape(devices, -1)
    real = valid.reshape(len(keys), devices, -1).swapaxes(0, 1).reshape(devices, -1)
    expected = [set(b[r]) for b, r in zip(blocks, real, strict=True)]
    np.testing.assert_array_equal(requests.distinct, [len(rows) for rows in expected])
    per_device = requests.rows.reshape(devices, -1)
    for mine, wanted in zip(per_device, expected, strict=True):
        assert set(mine[: len(wanted)]) == wanted and np.all(mine[len(wanted) :] == spec.num_rows)
    padding = requests.rows == spec.num_rows
    assert not np.any(block[padding])
    return requests, block, seen, sums


@pytest.mark.parametrize(
    ("shape", "vocab_axes", "capacity"),
    [
        # One of each place; the other capacities take as long again.
        pytest.param(*place, capacity, marks=pytest.mark.long if capacity != kept[0] else ())
        for *place, kept in PLACES
        for capacity in kept
    ],
)
def test_exchange_equals_indexing(shape, vocab_axes, capacity, device_mesh):
    mesh = device_mesh(shape)
    valid = np.ones((MICRO, BATCH, LENGTH), bool)
    valid[1, 3:6, 1:] = False
    for kind in ("zipf", "equal", "distinct"):
        _check(mesh, vocab_axes, capacity, _keys(kind), np.ones_like(valid))
        first = _check(mesh, vocab_axes, capacity, _keys(kind), valid)
        second = _check(mesh, vocab_axes, capacity, _keys(kind), valid)
        for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("way", ["windows", pytest.param("segments", marks=pytest.mark.long)])
@pytest.mark.parametrize("micro", [1, pytest.param(MICRO, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("shape", "vocab_axes"), [((1, 1, 1), BOTH), ((2, 2, 2), BOTH), ((2, 4, 1), ("fsdp",))]
)
def test_exchange_with_the_sums_of_accelerators(
    shape, vocab_axes, micro, way, device_mesh, monkeypatch
):
    """One micro-batch names its rows densely, several do not; windows of 4 values."""
    monkeypatch.setitem(row_sums.WAYS, "cpu", way)
    monkeypatch.setattr(row_sums, "_CHUNK", 4)
    valid = np.ones((MICRO, BATCH, LENGTH), bool)
    valid[1, 3:6, 1:] = False
    for kind in ("zipf", "equal", "distinct"):
        _check(device_mesh(shape), vocab_axes, 3, _keys(kind)[-micro:], valid[-micro:])


def test_all_padding_asks_for_nothing(device_mesh):
    nothing = np.zeros((MICRO, BATCH, LENGTH), bool)
    requests, *_, sums = _check(
        device_mesh((2, 4, 1)), ("data", "fsdp"), 1000, _keys("zipf"), nothing
    )
    assert not np.any(requests.asked) and not np.any(sums)


def test_padding_keys_do_not_matter(device_mesh):
    valid = np.random.default_rng(0).random((MICRO, BATCH, LENGTH)) < 0.5
    keys = _keys("zipf")
    other = np.where(valid, keys, 3).astype(np.int32)
    place = (device_mesh((8, 1, 1)), ("data", "fsdp"), 3)
    first, second = (_run(*place, k, valid)[-1] for k in (keys, other))
    assert np.array_equal(first[0].owned, second[0].owned)
    assert np.array_equal(first[3], second[3])


@pytest.mark.parametrize(("capacity", "rounds"), [(1, 8), (3, 3), (1000, 1)])
def test_rounds_keep_buffers_at_the_capacity(capacity, rounds, device_mesh):
    mesh = device_mesh((8, 1, 1))
    layout = TableLayout(NUM_KEYS, 32)
    # Every device wants the same 8 rows, all of them of the first owner.
    wanted = layout.key_numbers(np.arange(PADDED))
    wanted = wanted[: PADDED // 8][wanted[: PADDED // 8] < NUM_KEYS][:8]
    keys = np.broadcast_to(wanted.reshape(2, 1, 4), (MICRO, BATCH, LENGTH)).astype(np.int32)
    valid = np.ones_like(keys, dtype=bool)
    requests, *_ = _check(mesh, ("data", "fsdp"), capacity, keys, valid)
    assert requests.asked.tolist() == [64] + [0] * 7
    spec, _ = _program(mesh, BOTH, capacity)
    assert ShardedTable(spec, mesh, 8).exchange.rounds == rounds


def test_repeated_requests_within_one_device_travel_once(device_mesh):
    mesh = device_mesh((1, 1, 1))
    keys = _keys("equal")
    requests, *_ = _check(mesh, ("data", "fsdp"), 3, keys, np.ones_like(keys, dtype=bool))
    assert requests.distinct.tolist() == [1]
    assert dataclasses.asdict(requests)["rows"][0] == TableLayout(NUM_KEYS, 32).row_numbers(7)


# --- The layout ---

LAYOUTS = st.tuples(st.integers(1, 8_000_000), st.sampled_from([1, 8, 32, 256, 1000]))


def test_the_example_of_the_docstring():
    layout = TableLayout(8, 8)
    assert layout.multiplier == 5
    assert layout.row_numbers(np.arange(8)).tolist() == [0, 5, 2, 7, 4, 1, 6, 3]


@given(st.integers(1, 3000), st.sampled_from([1, 8, 32, 256, 1000]))
@settings(max_examples=40)
def test_rows_are_a_permutation(num_keys, pad_multiple):
    layout = TableLayout(num_keys, pad_multiple)
    rows = layout.row_numbers(np.arange(layout.num_rows))
    assert np.array_equal(np.sort(rows), np.arange(layout.num_rows))
    assert np.array_equal(layout.key_numbers(rows), np.arange(layout.num_rows))
    assert layout.num_rows % pad_multiple == 0 and 0 <= layout.num_rows - num_keys < pad_multiple


@given(LAYOUTS, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_device_and_host_agree(sizes, random):
    layout = TableLayout(*sizes)
    last = layout.num_rows - 1
    keys = np.array([0, last, last // 2] + [random.randint(0, last) for _ in range(61)])
    rows = layout.row_numbers(keys)
    assert np.array_equal(layout.rows_of(jnp.asarray(keys, jnp.int32)), rows)
    assert np.array_equal(
        rows, [key * layout.multiplier % layout.num_rows for key in keys.tolist()]
    )
    assert np.array_equal(layout.key_numbers(rows), keys)


@pytest.mark.parametrize("num_rows", [1 << 24, (1 << 24) + 256, 10**9, (1 << 31) - 1])
def test_device_and_host_agree_on_tables_of_any_size(num_rows):
    layout = TableLayout(num_rows, 1)
    keys = np.random.default_rng(num_rows).integers(0, num_rows, 100_000)
    keys = np.concatenate([[0, 1, num_rows // 2, num_rows - 1], keys])
    rows = np.asarray(jax.jit(layout.rows_of)(jnp.asarray(keys, jnp.int32)))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, layout.row_numbers(keys))
    few = keys[:50].tolist()
    assert rows[:50].tolist() == [key * layout.multiplier % num_rows for key in few]
    np.testing.assert_array_equal(layout.key_numbers(rows), keys)


def test_rows_beyond_int32_are_refused():
    with pytest.raises(InputError, match=r"2147483648 rows is over the 2147483647 rows .* fewer"):
        TableLayout((1 << 31) - 100, 256)


def test_spread_keys_are_their_own_rows():
    layout = TableLayout(1000, 256, spread=True)
    keys = np.arange(layout.num_rows)
    assert (layout.num_rows, layout.multiplier) == (1024, 1)
    for found in (layout.row_numbers(keys), layout.key_numbers(keys), layout.rows_of(keys)):
        np.testing.assert_array_equal(found, keys)


@pytest.mark.parametrize("num_keys", [4096, 32000, 128256])
def test_the_hottest_keys_spread_over_the_shards(num_keys):
    layout = TableLayout(num_keys, 256)
    for shards in (2, 8, 16, 64, 256):
        for count in (shards, 4 * shards, 2000):
            owners = layout.row_numbers(np.arange(count)) * shards // layout.num_rows
            # The discrepancy of a golden-ratio sequence grows with log(count); 3.2 is its largest
            # here. Without spreading, one shard would have all of them.
            assert np.bincount(owners, minlength=shards).max() <= count / shards + 4


def test_the_load_of_a_zipf_batch_is_even():
    layout, rng = TableLayout(128256, 256), np.random.default_rng(0)
    share = 1 / np.arange(1, 128257)
    distinct = np.unique(rng.choice(128256, 65536, p=share / share.sum()))
    load = np.bincount(layout.row_numbers(distinct) * 8 // layout.num_rows, minlength=8)
    unspread = np.bincount(distinct * 8 // layout.num_rows, minlength=8)
    # Which of the rare keys occur is chance: 2410 rows a shard have a standard deviation of 2 %.
    assert load.max() < 1.05 * load.mean()
    assert unspread.max() > 2.5 * unspread.mean()
