"""Rows computed on where they lie: interpreted, against the same without, and as TPUs compile."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from stem_jax.kernels import row_passes
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.spec import TableState
from stem_jax.tables.update_history import make_history
from tests.tables.test_row_optimizer import make_spec, warmup_cosine

VECTORS, ROWS, WIDTH, STEP = 2, 6, 128, 30


@pytest.fixture
def interpreted(monkeypatch):
    """With two rows in a step: the interpreter takes each copy by itself."""
    monkeypatch.setattr(row_passes, "_ROWS", 2)
    with pltpu.force_tpu_interpret_mode():
        yield


def _state() -> TableState:
    rng = np.random.default_rng(0)
    rows, mu = (rng.normal(size=(VECTORS, ROWS, WIDTH)) for _ in range(2))
    nu = 10.0 ** rng.uniform(-20, 0, rows.shape)
    last_step = rng.integers(0, STEP + 1, ROWS)
    arrays = (jnp.asarray(array, jnp.float32) for array in (rows, mu, nu))
    return TableState(*arrays, jnp.asarray(last_step, jnp.int32))


def _case(optimizer: str, rows: list[int]):
    """(a function of `RowOptimizer`s that reads and updates, its places and gradients)."""
    spec = make_spec(vectors=VECTORS, width=WIDTH, optimizer=optimizer)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(STEP + 1)))
    gradient = np.random.default_rng(1).normal(size=(VECTORS, len(rows), WIDTH))

    def run(passes: bool, keep: bool = True):
        optimizer = RowOptimizer(spec, passes=passes)

        # One program: by themselves its operations take longer to compile.
        @jax.jit
        def both(state, places, gradients, step, keep, scale):
            read = optimizer.read_as(state, places, step, history, jnp.bfloat16)
            new = optimizer.update(state, places, gradients, step, keep, history, scale)
            return read.astype(jnp.float32), new

        places, gradients = jnp.asarray(rows, jnp.int32), jnp.asarray(gradient, jnp.float32)
        found = both(
            _state(), places, gradients, jnp.int32(STEP), jnp.bool_(keep), jnp.float32(0.3)
        )
        return jax.tree.map(np.asarray, found)

    return run


# Two steps of two rows and one that is not full; the last two are padding.
SOME = [3, 5, 0, ROWS, ROWS]
ONE = [4]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("optimizer", "rows"), [("deferred_adamw", SOME), ("lazy_adamw", SOME), ("deferred_adamw", ONE)]
)
def test_rows_are_read_and_updated_as_without(optimizer, rows):
    run = _case(optimizer, rows)
    (read, new), (expected_read, expected) = run(True), run(False)
    real = [n for n, row in enumerate(rows) if row < ROWS]
    np.testing.assert_allclose(read[:, real], expected_read[:, real], rtol=1e-2)
    for name in ("rows", "mu", "nu"):
        found, wanted = getattr(new, name), getattr(expected, name)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-30)
        # Nothing else is touched.
        others = np.setdiff1d(np.arange(ROWS), rows)
        np.testing.assert_array_equal(found[:, others], getattr(_state(), name)[:, others])
        assert not np.array_equal(found[:, rows[0]], getattr(_state(), name)[:, rows[0]])
    np.testing.assert_array_equal(new.last_step, expected.last_step)


@pytest.mark.usefixtures("interpreted")
def test_no_bit_depends_on_how_many_there_are(monkeypatch):
    """Nor on the room behind them, nor on the calls that they take."""
    read, new = _case("deferred_adamw", SOME)(True)
    monkeypatch.setattr(row_passes, "_MOST_ROWS", 4)
    other_read, other = _case("deferred_adamw", SOME)(True)
    np.testing.assert_array_equal(read, other_read)
    jax.tree.map(np.testing.assert_array_equal, new, other)
    short = SOME[:-1]
    np.testing.assert_array_equal(_case("deferred_adamw", short)(True)[0], read[:, : len(short)])


@pytest.mark.usefixtures("interpreted")
def test_a_step_that_is_not_kept_writes_nothing():
    _, new = _case("deferred_adamw", SOME)(True, keep=False)
    jax.tree.map(np.testing.assert_array_equal, new, jax.tree.map(np.asarray, _state()))


@pytest.mark.usefixtures("interpreted")
def test_columns_that_are_no_whole_tiles_take_the_other_way(monkeypatch):
    monkeypatch.setattr("stem_jax.tables.row_optimizer.read_rows", None)
    optimizer = RowOptimizer(make_spec(vectors=VECTORS, width=100), passes=True)
    state = jax.tree.map(lambda x: x[..., :100] if x.ndim > 1 else x, _state())
    history = jax.tree.map(jnp.asarray, make_history(optimizer.spec, warmup_cosine(STEP + 1)))
    found = optimizer.read_as(state, jnp.arange(3), jnp.int32(STEP), history, jnp.float32)
    assert found.shape == (VECTORS, 3, 100)


@pytest.mark.parametrize("width", [1024, pytest.param(20480, marks=pytest.mark.long)])
def test_a_compiled_tpu_program_copies_no_rows(width):
    pytest.importorskip("libtpu")
    from jax.sharding import SingleDeviceSharding

    from stem_jax.planning.topology import Topology

    device = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    spec = make_spec(vectors=5, width=width)
    optimizer = RowOptimizer(spec, passes=True)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(STEP + 1)))

    def shaped(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    table = shaped((5, 2004, width))
    state = TableState(table, table, table, shaped((2004,), jnp.int32))
    update = functools.partial(optimizer.update, history=history)
    arguments = state, shaped((200,), jnp.int32), shaped((5, 200, width))
    numbers = shaped((), jnp.int32), shaped((), jnp.bool_)
    compiled = jax.jit(update, donate_argnums=0).lower(*arguments, *numbers).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    pattern = rf"\[5,2004,{width}\]\S* (?:copy|fusion|scatter)\("
    assert not re.findall(pattern, compiled.as_text())
