"""Rows in bfloat16, and one moment for each vector: the same rows wherever they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.mesh import TOKEN_AXES, axis_size
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.row_rules import mean_squares
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import (
    TableState,
    abstract_table,
    init_table,
    logical,
    stored,
    table_shardings,
)
from stem_jax.tables.update_history import make_history
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.start_report import describe_run
from tests.tables.test_row_optimizer import ROWS, STEPS, make_spec, warmup_cosine, zipf_run

FORMATS = [
    {"moments": "rowwise"},
    {"row_format": "bfloat16"},
    {"row_format": "bfloat16", "moments": "rowwise"},
]
IDS = ["rowwise", "bfloat16", "bfloat16 rowwise"]


def state_of(spec, rows_SxRxF) -> TableState:
    """A table of these rows that no update had yet."""
    slots = {name: jnp.zeros(s.shape, s.dtype) for name, s in vars(abstract_table(spec)).items()}
    return TableState(**slots | {"rows": jnp.asarray(rows_SxRxF).astype(spec.row_format)})


def dense_rowwise(spec) -> np.ndarray:
    """The table after the Zipf run, every row moved in every step, in float64."""
    rows, gradients, start = zipf_run()
    p, v = start.astype(np.float64), np.zeros((*start.shape[:2], 1))
    rates = np.float32(warmup_cosine(STEPS + 1)).astype(np.float64)
    for t in range(STEPS):
        g = np.zeros_like(p)
        real = rows[t] < ROWS
        g[rows[t][real]] = gradients[t][real]
        v = spec.beta2 * v + (1 - spec.beta2) * np.mean(g**2, axis=2, keepdims=True)
        p *= 1 - rates[t] * spec.weight_decay
        p -= rates[t] * g / (np.sqrt(v / (1 - spec.beta2 ** (t + 1))) + spec.epsilon)
    return p


@functools.cache
def zipf_table(piece=None, **changes) -> np.ndarray:
    """The table after the Zipf run, every row caught up, in float32."""
    spec = make_spec(**changes)
    rows, gradients, start = zipf_run()
    optimizer = RowOptimizer(spec, piece=piece)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(STEPS + 1)))

    @jax.jit
    def run(state):
        def one(state, given):
            step, rows_O, gradient = given
            return optimizer.update(state, rows_O, stored(gradient), step, True, history), None

        state, _ = jax.lax.scan(one, state, (jnp.arange(STEPS), rows, gradients))
        return optimizer.read(state, jnp.arange(ROWS), jnp.int32(STEPS), history).rows

    return np.asarray(logical(run(state_of(spec, stored(start)))))


@pytest.mark.parametrize("optimizer", ["deferred_adamw", "dense_adamw"])
def test_rowwise_against_a_dense_oracle(optimizer):
    expected = dense_rowwise(make_spec(moments="rowwise"))
    found = zipf_table(moments="rowwise", optimizer=optimizer)
    assert np.abs(found - expected).max() <= 1e-6
    # Something was at stake: the rows moved, and not as under AdamW.
    assert np.abs(expected - zipf_run()[2]).max() > 0.04
    assert np.abs(expected - zipf_table()).max() > 1e-2


@pytest.mark.parametrize("changes", FORMATS, ids=IDS)
def test_pieces_are_rows_at_once(changes):
    """As TPUs work; what is rounded may be one unit off where float32 was by its last bit."""
    at_once, in_pieces = zipf_table(**changes), zipf_table(piece=16, **changes)
    if "row_format" in changes:
        assert np.mean(at_once != in_pieces) < 1e-2
        np.testing.assert_allclose(in_pieces, at_once, atol=2e-2)
    else:
        np.testing.assert_allclose(in_pieces, at_once, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("moments", ["adamw", "rowwise"])
def test_bfloat16_follows_float32(moments):
    """Over 600 steps errors are those of chance, not a drift of all rows to one side."""
    exact, found = zipf_table(moments=moments), zipf_table(moments=moments, row_format="bfloat16")
    error = found - exact
    assert np.abs(error).max() < 0.05
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(error.size)


def test_updates_below_a_step_are_not_lost():
    """10^4 keys near 1, which has steps of 2^-7 there, each moved by 1e-4 fifty times."""
    number, steps = 10_000, 50
    rates = np.full(steps + 1, 1e-4)
    found = {}
    for row_format in ("float32", "bfloat16"):
        spec = make_spec(
            layout=TableLayout(number, 8), row_format=row_format, moments="rowwise", width=8,
            weight_decay=0.0,
        )  # fmt: skip
        history = jax.tree.map(jnp.asarray, make_history(spec, rates))
        update = jax.jit(RowOptimizer(spec).update)
        state = state_of(spec, np.full((1, number, 8), 1.25))
        gradient = jnp.ones((1, number, 8), jnp.float32)
        for step in range(steps):
            state = update(
                state, jnp.arange(number), gradient, jnp.int32(step), jnp.bool_(True), history
            )
        found[row_format] = np.float32(state.rows)
    expected = found["float32"]
    np.testing.assert_allclose(expected, 1.25 - 1e-4 * steps, atol=1e-5)
    error = found["bfloat16"] - expected
    assert error.std() < 2.0**-7
    # Of each key over its columns, and of all of them.
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    by_key = error.mean(axis=(0, 2))
    assert np.abs(by_key).max() < 6 * error.std() / np.sqrt(8)


def test_means_are_the_same_over_shards_of_columns(device_mesh):
    rng = np.random.default_rng(0)
    for width in (160, 48, 384, 22):
        gradient = rng.normal(size=(2, 37, width)).astype(np.float32)
        found = {}
        for tensor in (1, 2, 4):
            if width % tensor:
                continue
            mesh, whole = device_mesh((1, 1, tensor)), PartitionSpec(None, None, "tensor")
            means = jax.jit(
                jax.shard_map(
                    functools.partial(mean_squares, devices=tensor),
                    mesh=mesh,
                    in_specs=whole,
                    out_specs=PartitionSpec(),
                    check_vma=False,
                )
            )
            found[tensor] = np.asarray(means(gradient))
            np.testing.assert_allclose(
                found[tensor], np.mean(np.float64(gradient) ** 2, axis=2, keepdims=True), rtol=1e-6
            )
            # Nor does it matter how many other rows there are.
            np.testing.assert_array_equal(means(gradient[:, :5]), found[tensor][:, :5])
            if width % 16 == 0:
                np.testing.assert_array_equal(found[tensor], found[1])


MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]


def _table_after(mesh, spec, number: int) -> dict[str, np.ndarray]:
    """Some updates with given gradients, without a model; all that the table then has."""
    tokens = 32
    devices = axis_size(mesh, TOKEN_AXES)
    table = ShardedTable(spec, mesh, tokens // devices)
    state = init_table(spec, jax.random.key(3), mesh)
    history = make_history(spec, warmup_cosine(20, peak=1e-2, warmup=2))
    place = NamedSharding(mesh, spec.row_spec)

    @jax.jit
    def one(state, keys_AxBxL, gradient_SxVxF, step):
        requests = table.request(keys_AxBxL, jnp.ones_like(keys_AxBxL, bool))
        sums = gradient_SxVxF[:, jnp.minimum(requests.owned, spec.num_rows - 1)]
        sums = jax.lax.with_sharding_constraint(sums, place)
        return table.update(state, requests, sums, step, jnp.bool_(True), history, 0.7)

    rng = np.random.default_rng(1)
    for step in range(number):
        keys = rng.integers(0, spec.layout.num_keys, (1, 8, tokens // 8)).astype(np.int32)
        gradient = rng.normal(size=(spec.vectors, spec.num_rows, spec.width)).astype(np.float32)
        state = one(state, keys, gradient, jnp.int32(step))
    caught_up = jax.jit(table.caught_up_rows)(state, jnp.int32(number), history)
    return {n: np.asarray(a) for n, a in vars(state).items()} | {"caught up": np.asarray(caught_up)}


@pytest.mark.parametrize("changes", FORMATS, ids=IDS)
def test_tables_are_the_same_on_every_mesh(device_mesh, changes):
    """And rounded the same; before, programs of other shapes may differ in the last bit."""
    spec = make_spec(
        layout=TableLayout(90, 32), vectors=2, width=32, vocab_axes=("data", "fsdp"), **changes
    )
    expected = _table_after(device_mesh(MESHES[0]), spec, 6)
    assert np.count_nonzero(expected["last_step"]) > 60
    assert expected["caught up"].dtype == np.float32
    for shape in MESHES[1:]:
        found = _table_after(device_mesh(shape), spec, 6)
        for name, array in expected.items():
            where = f"{shape} {name}"
            if name in ("v", "last_step"):
                np.testing.assert_array_equal(found[name], array, err_msg=where)
            elif spec.row_format == "float32":
                np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-8, err_msg=where)
            else:
                assert np.mean(found[name] != array) < 1e-3, where


@pytest.mark.parametrize(
    ("row_format", "moments", "expected"),
    [
        ("float32", "adamw", 12.03),
        ("bfloat16", "adamw", 6.03),
        ("bfloat16", "rowwise", 2.05),
        ("float32", "rowwise", 4.05),
    ],
)
def test_bytes_of_a_table_parameter(device_mesh, row_format, moments, expected):
    """In rows of 160, on the devices and on the host, counted and there."""
    spec = make_spec(
        layout=TableLayout(1024, 256), width=160, row_format=row_format, moments=moments
    )
    mesh = device_mesh((1, 1, 1))
    state = init_table(spec, jax.random.key(0), mesh)
    on_devices = sum(array.nbytes for array in vars(state).values())
    store = HostStore.create(spec, jax.random.key(0), mesh)
    counted = sum(placed.device_bytes(mesh) for placed in spec.placed())
    assert on_devices == store.num_bytes == HostStore.needed_bytes(spec, mesh) == counted
    assert round(on_devices / spec.num_parameters + 1e-9, 2) == pytest.approx(expected, abs=0.0051)
    np.testing.assert_array_equal(store.blocks[0].arrays["rows"], logical(np.asarray(state.rows)))
    shardings = vars(table_shardings(spec, mesh))
    assert {n: a.sharding for n, a in vars(state).items()} == shardings


def test_the_start_report_says_how_rows_are_kept(tiny_config, device_mesh):
    mesh, said = device_mesh((1, 1, 1)), []
    for keys in ({}, {"tables.row_format": "bfloat16", "tables.moments": "rowwise"}):
        report = describe_run(Blueprint(tiny_config(**keys), mesh))
        said.append([line for line in report.splitlines() if "deferred_adamw" in line])
    assert [line.endswith("a shard") for (line,) in said] == [True, False]
    assert said[1][0] == said[0][0] + ", bfloat16 with rowwise moments"


def test_what_has_no_columns_is_saved_once(device_mesh):
    """Of two blocks with the columns of the same rows, one writes v and last_step."""
    spec = make_spec(layout=TableLayout(64, 32), moments="rowwise", row_format="bfloat16")
    first, second = HostStore.zeros(spec, device_mesh((1, 1, 2))).blocks
    assert (first.saves, second.saves) == ({"rows", "v", "last_step"}, {"rows"})
    assert {name: array.shape for name, array in second.arrays.items()} == {
        "rows": (64, 1, 8), "v": (64, 1), "last_step": (64,)
    }  # fmt: skip


def test_a_snapshot_keeps_what_is_overwritten(device_mesh):
    """Rows in bfloat16 on the shelf, and beside it what has a number for each vector."""
    spec = make_spec(
        layout=TableLayout(64, 32), vectors=3, moments="rowwise", row_format="bfloat16"
    )
    store, rng = HostStore.zeros(spec, device_mesh((1, 1, 1))), np.random.default_rng(0)
    [block] = store.blocks
    for array in block.arrays.values():
        array[...] = rng.integers(1, 100, array.shape).astype(array.dtype)
    before = {name: array.copy() for name, array in block.arrays.items()}
    snapshot = store.snapshot()
    rows = np.arange(10, 40)
    store.write(block, rows, {name: np.zeros_like(array[rows]) for name, array in before.items()})
    for name, expected in before.items():
        found = np.concatenate([piece for _, piece in snapshot.pieces(0, name)])
        np.testing.assert_array_equal(found, expected)
        assert not np.any(np.float32(block.arrays[name][rows]))
        snapshot.finish(name)
    assert snapshot.closed
