"""Rows of n-grams at the input, and in attention's values: outputs and gradients of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.mesh import token_spec
from stem_jax.model.ngram_embedding import NGramEmbedding
from stem_jax.model.value_reader import ValueReader
from tests.reader_modules import placed_inputs, placed_params, taken_apart

D, K, F = 32, 6, 8
SIZES = {"embed_dim": D, "keys": K, "width": F}


def _inputs():
    """x, rows, the matrices, and what gradients are taken along."""
    rng = np.random.default_rng(0)
    shapes = [(8, 5, D), (8, 5, K, F), (K, F, D), (8, 5, D)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _reader(mesh=None):
    return taken_apart(NGramEmbedding(**SIZES, mesh=mesh, rngs=nnx.Rngs(0)))


@functools.cache
def _expected():
    """y and the three gradients, term by term."""
    x, rows, kernel, along = map(torch.tensor, _inputs())
    for value in (x, rows, kernel):
        value.requires_grad_()
    y = (x + sum(rows[:, :, k] @ kernel[k] for k in range(K))) / 7
    (y * along).sum().backward()
    return [value.detach().numpy() for value in (y, x.grad, rows.grad, kernel.grad)]


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 1, 8)])
def test_it_is_the_mean_with_the_embedding(device_mesh, shape):
    mesh = None if shape is None else device_mesh(shape)
    reader = _reader(mesh)
    x, rows, kernel, along = _inputs()
    params = {"row_proj.kernel": kernel}
    if mesh is not None:
        params = placed_params(reader, params, mesh)
        x, _, rows = placed_inputs(x, x, rows, mesh)

    @jax.jit
    def run(params, x, rows):
        def total(params, x, rows):
            y, state = reader.bind(params)(x, x, rows, None, "kept")
            assert state == "kept"
            return jnp.sum(y * along), y

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, x, rows)

    (_, y), (dparams, dx, drows) = run(params, x, rows)
    if mesh is not None:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, token_spec()), 3)
    found = y, dx, drows, dparams["row_proj.kernel"]
    for one, other, atol in zip(found, _expected(), (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def test_it_says_what_it_has_and_costs():
    shapes = {name: value.shape for name, value in _reader().params.items()}
    assert NGramEmbedding.weights(**SIZES) == shapes
    cost = NGramEmbedding.cost(**SIZES)
    assert (cost.parameters, cost.matmuls, cost.row) == (K * F * D, K * F * D, K * F)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_values_read_rows_one_behind_the_other(device_mesh, shape):
    mesh = None if shape is None else device_mesh(shape)
    reader = taken_apart(ValueReader(embed_dim=D, num_kv_heads=2, mesh=mesh, rngs=nnx.Rngs(0)))
    x, rows, _, _ = _inputs()
    params, behind = reader.params, rows.reshape(8, 5, 1, K * F)
    run = jax.jit(lambda params, *inputs: reader.bind(params)(*inputs, None, None)[0])
    expected = run(params, x, x, behind)
    if mesh is not None:
        params = placed_params(reader, params, mesh)
        x, _, rows = placed_inputs(x, x, rows, mesh)
    np.testing.assert_allclose(run(params, x, x, rows), expected, rtol=1e-6)
