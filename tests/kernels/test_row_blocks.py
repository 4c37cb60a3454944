"""The kernel that sums sorted values by row: interpreted, against float64, and as TPUs compile."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from stem_jax.kernels import row_blocks, row_sums
from stem_jax.kernels.row_blocks import VALUES, put_row_blocks
from stem_jax.kernels.row_sums import RowOrder, put_sums_by_row, sum_by_row

WIDTH = 256


@pytest.fixture
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


def _ranks(kind: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    rises = {
        "distinct": np.ones(number, bool),
        "one row": np.zeros(number, bool),
        "mixed": rng.random(number) < 0.4,
        # Rows 127, 128 and 129 have one, very many and one value: a carry over many products.
        "long row": (np.arange(number) <= 128) | (np.arange(number) > 800),
    }[kind]
    return np.cumsum(rises).astype(np.int32) - int(rises[0])


def _exact(values, ranks, num_rows: int) -> np.ndarray:
    sums = np.zeros((num_rows, values.shape[1]))
    np.add.at(sums, ranks, values.astype(np.float64))
    return sums


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["distinct", "one row", "mixed", "long row"])
@pytest.mark.parametrize("number", [VALUES, 2 * VALUES])
def test_sums_lie_in_their_place(kind, number):
    """And nothing else is touched or read."""
    ranks = _ranks(kind, number)
    used = ranks[-1] + 1
    values = np.random.default_rng(0).normal(size=(number, WIDTH)).astype(np.float32)
    into = jnp.full((3, -(-used // 128) * 128 + 128, WIDTH), jnp.nan)
    found = np.asarray(put_row_blocks(into, jnp.int32(1), jnp.asarray(values), jnp.asarray(ranks)))
    np.testing.assert_allclose(found[1, :used], _exact(values, ranks, used), rtol=1e-5, atol=1e-4)
    assert np.isnan(found[[0, 2]]).all() and np.isnan(found[1, -128:]).all()


@pytest.mark.usefixtures("interpreted")
def test_half_precision_is_summed_in_float32():
    ranks = _ranks("long row", 2 * VALUES)
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(len(ranks), WIDTH)), jnp.bfloat16)
    into = jax.lax.empty((1, 1024, WIDTH), jnp.float32)
    found = put_row_blocks(into, jnp.int32(0), values, jnp.asarray(ranks))[0, : ranks[-1] + 1]
    exact = _exact(np.asarray(values, np.float32), ranks, ranks[-1] + 1)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("length", [1, 300, 700])
def test_any_index_as_other_ways_sum_it(length):
    """Unsorted, with rows outside; and with the same bits whatever room there is."""
    rng = np.random.default_rng(length)
    index = rng.integers(-2, 50, length).astype(np.int32)
    values = rng.normal(size=(length, WIDTH)).astype(np.float32)
    found = [np.asarray(sum_by_row(values, index, rows, "blocks")) for rows in (45, 300)]
    np.testing.assert_array_equal(found[0], found[1][:45])
    other = sum_by_row(values, index, 45, "scatter")
    np.testing.assert_allclose(found[0], other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("width", [256, 200])
def test_a_layers_gradient(width, monkeypatch):
    """Columns that are no whole tiles are summed in windows."""
    ranks = _ranks("mixed", 600)
    order = row_sums.dense_order(jnp.arange(600), jnp.asarray(ranks))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(600, width)), jnp.float32)
    if width % 128 == 0:
        monkeypatch.setattr(row_sums, "_put_windows", None)
    room = int(ranks[-1]) + 1 + row_sums.spare_rows("blocks")
    into = jnp.zeros((2, room, width))
    found = put_sums_by_row(into, jnp.int32(1), values, ranks, "blocks", order)
    used = int(ranks[-1]) + 1
    np.testing.assert_allclose(
        found[1, :used], _exact(np.asarray(values), ranks, used), rtol=1e-5, atol=1e-4
    )
    assert not np.any(found[0])


def test_a_compiled_tpu_program_keeps_the_precision():
    """And copies nothing of the array that it puts sums into."""
    pytest.importorskip("libtpu")
    from jax.sharding import SingleDeviceSharding

    from stem_jax.planning.topology import Topology

    sharding = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])

    def put(into, number, values, positions, ranks):
        order = RowOrder(positions, ranks)
        return put_sums_by_row(into, number, values, positions, "blocks", order)

    for kind in (jnp.float32, jnp.bfloat16):
        shapes = [((5, 2048, 1024), kind), ((), jnp.int32), ((4096, 1024), kind)]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for shape, dtype in (*shapes, ((4096,), jnp.int32), ((4096,), jnp.int32))
        ]
        compiled = jax.jit(put, donate_argnums=0).lower(*arguments).compile()
        text = compiled.as_text()
        assert "tpu_custom_call" in text
        assert not re.findall(r"\[5,2048,1024\]\S* (?:copy|fusion)\(", text)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["distinct", "one row", "mixed", "long row"])
def test_it_writes_no_more_than_it_says(kind, monkeypatch):
    """Each block of rows once for each part of the columns: counted, against its own cost."""
    written = []
    make = pltpu.make_async_copy

    def counted(rows, place, semaphore):
        jax.debug.callback(lambda: written.append(rows.shape))
        return make(rows, place, semaphore)

    monkeypatch.setattr(row_blocks.pltpu, "make_async_copy", counted)
    ranks = _ranks(kind, 2 * VALUES)
    values = jnp.zeros((len(ranks), WIDTH), jnp.bfloat16)
    into = jnp.zeros((1, -(-(ranks[-1] + 1) // 128) * 128, WIDTH))
    jax.block_until_ready(put_row_blocks(into, jnp.int32(0), values, jnp.asarray(ranks)))
    jax.effects_barrier()
    said = row_blocks._cost(values, into).bytes_accessed
    assert values.nbytes + sum(4 * math.prod(shape) for shape in written) == said
