"""Sums by row in each platform's way, against float64; all ways run here."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.kernels import row_sums
from stem_jax.kernels.row_sums import (
    dense_order,
    order_of,
    put_sums_by_row,
    spare_rows,
    sum_by_row,
)

WAYS = ["windows", "segments", "scatter"]
# Below a chunk of 512, one, and several with and without a rest.
LENGTHS = [1, 7, 511, 512, 513, 1024, 1536, 1700]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _sparse(values, index, num_rows, way, dtype=jnp.float32):
    return sum_by_row(values, index, num_rows, way, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _dense(values, index, num_rows, way, dtype=jnp.float32):
    positions = jnp.argsort(index)
    order = dense_order(positions, index[positions])
    return sum_by_row(values, index, num_rows, way, order, dtype)


def _float64(values, index, num_rows) -> np.ndarray:
    sums = np.zeros((num_rows, values.shape[-1]))
    inside = (index >= 0) & (index < num_rows)
    np.add.at(sums, index[inside], np.asarray(values, np.float64)[inside])
    return sums


def _integers(length: int, width: int = 5) -> np.ndarray:
    """Values whose sums are exact in any order."""
    return np.random.default_rng(length).integers(-8, 9, (length, width)).astype(np.float32)


def _indices(length: int):
    """Rows that go on over one end of a chunk, over several, or end there."""
    rng = np.random.default_rng(length)
    yield rng.integers(0, 16, length)
    yield rng.integers(0, 2, length)
    yield np.zeros(length, int)
    yield np.arange(length) // 512 % 16
    yield np.arange(length) // 300 % 16
    yield rng.permutation(length)
    yield rng.zipf(1.2, length) % 3000


@pytest.mark.parametrize(
    ("length", "way"),
    # Segments know no chunks, and take a second here each time.
    [*itertools.product(LENGTHS, ["windows", "scatter"]), (1, "segments"), (512, "segments")],
)
def test_any_length_and_any_index(length, way):
    values = _integers(length)
    for index in _indices(length):
        index = index.astype(np.int32)
        sums = np.asarray(_sparse(values, index, 3000, way))
        np.testing.assert_array_equal(sums, _float64(values, index, 3000))
        ranks = np.unique(index, return_inverse=True)[1].astype(np.int32)
        sums = np.asarray(_dense(values, ranks, length + spare_rows(way), way))
        named = ranks.max() + 1
        np.testing.assert_array_equal(sums[:named], _float64(values, ranks, named))


@pytest.mark.parametrize("way", WAYS)
@given(st.lists(st.integers(-2, 17), min_size=1, max_size=64), st.integers(0, 2**31))
@settings(max_examples=40)
def test_against_float64(way, index, seed):
    # One size, so that one program serves all examples.
    index = np.resize(np.array(index, np.int32), 64)
    values = np.random.default_rng(seed).normal(size=(64, 3)).astype(np.float32)
    sums = np.asarray(_sparse(values, index, 16, way))
    np.testing.assert_allclose(sums, _float64(values, index, 16), rtol=1e-6, atol=4e-6)
    assert not np.any(sums[np.setdiff1d(np.arange(16), index)])
    assert np.array_equal(sums, _sparse(values, index, 16, way))


def test_many_rows_outside_are_dropped():
    """More of them than there are rows: they need no room."""
    index = np.random.default_rng(2).integers(-900, 900, 1700).astype(np.int32)
    values = _integers(1700)
    sums = _sparse(values, index, 16, "windows")
    np.testing.assert_array_equal(sums, _float64(values, index, 16))


@pytest.mark.parametrize("way", ["windows", "segments"])
def test_what_lay_there_before_is_never_read(way, monkeypatch):
    """Memory is not filled; CPUs happen to give zeros."""
    monkeypatch.setattr(jax.lax, "empty", lambda *a: jnp.full(*a[:1], jnp.nan, *a[1:]))
    values, index = _integers(700), np.random.default_rng(3).integers(0, 40, 700) * 2
    sums = jax.jit(lambda v, i: sum_by_row(v, i, 90, way))(values, index)
    np.testing.assert_array_equal(sums, _float64(values, index, 90))


def test_a_segment_does_not_see_values_of_other_rows():
    """Those that are not finite neither; of two columns' blocks, the last not whole."""
    values = np.random.default_rng(0).integers(-8, 9, (100, 300)).astype(np.float32)
    index = np.random.default_rng(1).integers(0, 9, 100).astype(np.int32)
    values[index == 4] = np.nan
    sums = np.asarray(_sparse(values, index, 12, "segments"))
    assert np.isnan(sums[4]).all()
    np.testing.assert_array_equal(sums, _float64(values, index, 12))


@pytest.mark.parametrize("way", WAYS)
def test_sums_are_added_to_what_lies_there(way):
    """Rounded as the values are, and to rows that have values alone; the others keep their bits."""
    index = (np.random.default_rng(3).integers(0, 20, 100) * 2).astype(np.int32)
    values = jnp.asarray(np.random.default_rng(4).normal(size=(100, 5)), jnp.bfloat16)
    before = np.random.default_rng(5).normal(size=(3, 41, 5)).astype(np.float32)
    before[1, 1] = np.nan

    @jax.jit
    def add(into, number, values, index):
        order = order_of(index, 41)
        return put_sums_by_row(into, number, values, index, way, order, added=True)

    after = np.asarray(add(before, 1, values, index))
    sums = np.asarray(_sparse(values, index, 41, way, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(after[1], before[1] + sums)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("way", ["windows", "segments"])
def test_the_other_vectors_stay_as_they_are(way):
    values, index = _integers(100), np.sort(np.random.default_rng(1).integers(0, 99, 100) % 9)
    ranks = np.unique(index, return_inverse=True)[1].astype(np.int32)
    into, index = jnp.full((3, 9 + spare_rows(way), 5), 7.0), jnp.asarray(ranks)

    @jax.jit
    def put(into, number, values, index):
        order = dense_order(jnp.arange(100), index)
        return put_sums_by_row(into, number, values, index, way, order)

    sums = np.asarray(put(into, 1, values, index))
    assert np.all(sums[[0, 2]] == 7)
    np.testing.assert_array_equal(sums[1, :9], _float64(values, ranks, 9))


def test_gpus_get_one_kernel():
    """Without a GPU, as far as its compiler's input goes."""
    shapes = (
        jax.ShapeDtypeStruct((1700, 24), jnp.bfloat16),
        jax.ShapeDtypeStruct((1700,), jnp.int32),
    )
    traced = _sparse.trace(*shapes, 90, "segments")
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1 and "segment_sums" in text
    assert "dot_general" not in text


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_summed_in_float32(way):
    # In bfloat16, 256 + 1 stays 256; over three chunks, so that what is carried counts too.
    values = jnp.ones((1300, 3), jnp.bfloat16).at[0].set(256)
    sums = _sparse(values, np.zeros(1300, np.int32), 16, way)
    assert sums.dtype == jnp.float32
    assert sums[0].tolist() == [1555.0] * 3 and not np.any(sums[1:])
    rounded = _dense(values, np.zeros(1300, np.int32), 600, way, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16 and rounded[0].tolist() == [1552.0] * 3


@pytest.mark.parametrize("way", WAYS)
def test_several_keys_of_a_token(way):
    values = _integers(2 * 9 * 3).reshape(2, 9, 3, 5)
    index = np.random.default_rng(1).integers(0, 7, (2, 9, 3)).astype(np.int32)
    sums = np.asarray(_sparse(values, index, 7, way))
    np.testing.assert_array_equal(sums, _float64(values.reshape(-1, 5), index.reshape(-1), 7))


@pytest.mark.optimized
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [300, 1700])
def test_bits_do_not_depend_on_the_number_of_rows(length, way):
    values = np.random.default_rng(0).normal(size=(length, 24)).astype(np.float32)
    ranks = np.unique(np.random.default_rng(1).zipf(1.3, length) % 99, return_inverse=True)[1]
    named, ranks = ranks.max() + 1, ranks.astype(np.int32)
    found = [
        *(np.asarray(_dense(values, ranks, size, way))[:named] for size in (700, 1100, 4096)),
        *(np.asarray(_sparse(values, ranks, size, way))[:named] for size in (named, 5000)),
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.optimized
@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_the_number_of_values(way):
    """Room that an exchange has and does not need arrives as values of a row that is dropped."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1300, 24)).astype(np.float32)
    index = np.concatenate([rng.zipf(1.3, 65) % 40, np.full(1235, 40)]).astype(np.int32)
    alone = np.asarray(_sparse(values[:65], index[:65], 40, way))
    for length in (400, 1300):
        found = _sparse(values[:length], index[:length], 40, way)
        np.testing.assert_array_equal(found, alone)


def test_values_are_not_copied_to_fill_the_last_chunk():
    """A rest of 164 values: what is made longer is the index."""
    index = jnp.zeros(1700, jnp.int32)
    text = _sparse.lower(jnp.ones((1700, 24)), index, 50, "windows").as_text()
    assert "tensor<2048xi32>" in text and "tensor<2048x24xf32>" not in text


def _precisions(text: str) -> set[str]:
    found = re.findall(r"dot_general.*?precision = \[(\w+), (\w+)\]", text, re.DOTALL)
    return {name for pair in found for name in pair}


def test_float32_is_multiplied_at_the_highest_precision():
    """TPUs would round it to bfloat16, GPUs to tf32."""
    index = jnp.zeros(64, jnp.int32)
    exact = _sparse.lower(jnp.ones((64, 3)), index, 8, "windows").as_text()
    assert _precisions(exact) == {"HIGHEST"}
    half = _sparse.lower(jnp.ones((64, 3), jnp.bfloat16), index, 8, "windows").as_text()
    assert _precisions(half) <= {"DEFAULT"} and "dot_general" in half


@pytest.mark.optimized
def test_a_compiled_tpu_program_keeps_the_precision():
    pytest.importorskip("libtpu")
    from jax.sharding import SingleDeviceSharding

    from stem_jax.planning.topology import Topology

    sharding = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    values, index = (
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
        for shape, kind in (((1024, 256), jnp.float32), ((1024,), jnp.int32))
    )
    text = _sparse.lower(values, index, 512, "windows").compile().as_text()
    products = re.findall(r"= f32\[.* convolution\(.*", text)
    assert products and all("operand_precision={highest,highest}" in line for line in products)


def test_each_platform_has_a_way():
    assert row_sums.WAYS == {"tpu": "blocks", "gpu": "segments", "cpu": "scatter"}
    assert row_sums.way_on(None) == "scatter"
