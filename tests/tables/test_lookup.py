"""Rows for every key of a token, and the sums of their gradients, on devices that divide both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.kernels import row_sums
from stem_jax.kernels.row_sums import spare_rows
from stem_jax.mesh import BATCH_AXES
from stem_jax.tables.lookup import close_rows, lookup, open_rows
from stem_jax.tables.spec import logical, stored

VECTORS, WIDTH = 2, 6


# 64, 54 and 42 values of each device, in windows of 8.
@pytest.mark.parametrize("way", ["windows", "segments", "scatter"])
@pytest.mark.parametrize("shape", [(4, 8, 4), (4, 9, 3), (4, 21)])
def test_gradients_of_several_keys_on_divided_columns(shape, way, device_mesh, monkeypatch):
    monkeypatch.setitem(row_sums.WAYS, "cpu", way)
    monkeypatch.setattr(row_sums, "_CHUNK", 8)
    # What is not filled may hold anything.
    monkeypatch.setattr(jax.lax, "empty", lambda *a: jnp.full(*a[:1], jnp.nan, *a[1:]))
    mesh, rng = device_mesh((2, 1, 2)), np.random.default_rng(1)
    # Numbered densely on each device, as the exchange does; some rows have many values.
    halves = rng.zipf(1.4, (2, shape[0] // 2, *shape[1:])) % 20
    dense = [np.unique(half, return_inverse=True)[1].reshape(half.shape) for half in halves]
    inverse = np.concatenate(dense).astype(np.int32)
    room = 20 + spare_rows(way)
    rows = rng.normal(size=(2 * room, VECTORS, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(*shape, VECTORS, WIDTH)).astype(np.float32)
    columns = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor"))

    def read(rows, inverse):
        x, found = open_rows(rows), []
        for number in range(VECTORS):
            value, thread = lookup(x, number, inverse, None, mesh)
            x = dataclasses.replace(x, thread=thread)
            found.append(value)
        return close_rows(jnp.stack(found, axis=-2), x, mesh)

    @jax.jit
    def both_ways(rows, inverse, weights):
        values, pull = jax.vjp(lambda rows: read(rows, inverse), rows)
        return values, *pull(weights)

    placed = jax.device_put(stored(rows), columns)
    values, gradient = jax.device_get(both_ways(placed, inverse, weights))
    gradient = logical(gradient)
    of_all = np.concatenate([dense[0], dense[1] + room])
    np.testing.assert_array_equal(values, rows[of_all])
    exact = np.zeros(rows.shape)
    np.add.at(exact, of_all.reshape(-1), weights.reshape(-1, VECTORS, WIDTH).astype(np.float64))
    for first, half in zip((0, room), dense):
        named = slice(first, first + half.max() + 1)
        np.testing.assert_allclose(gradient[named], exact[named], rtol=1e-6, atol=1e-6)
