"""Value embeddings: what is added to attention's values, and the way back, on every mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.errors import InputError
from stem_jax.mesh import token_spec
from stem_jax.model.attention import kv_heads_axis
from stem_jax.model.value_reader import GATE_INPUTS, ValueReader
from tests.reader_modules import placed_inputs, placed_params, taken_apart

D, K, DH = 32, 2, 8


def _reader(mesh=None, heads: int = K, embed_dim: int = D):
    return ValueReader(embed_dim=embed_dim, num_kv_heads=heads, mesh=mesh, rngs=nnx.Rngs(0))


def _inputs(batch: int = 8, length: int = 6, heads: int = K):
    """x, the embedding, the row and what its gradient is taken along; and weights of the gate."""
    rng = np.random.default_rng(0)
    shapes = [(D,), (D,), (1, heads * DH), (heads, DH)]
    *inputs, along = [rng.normal(size=(batch, length, *s)).astype(np.float32) for s in shapes]
    weights = rng.normal(size=(GATE_INPUTS, heads)).astype(np.float32)
    return inputs, along, {"gate_proj.kernel": weights}


def _found(mesh=None, heads: int = K):
    """Output and gradients of weights, x and rows; and where the output lay."""
    reader = taken_apart(_reader(mesh, heads))
    (x, embedded, rows), along, params = _inputs(heads=heads)
    if mesh is not None:
        params = placed_params(reader, params, mesh)
        x, embedded, rows = placed_inputs(x, embedded, rows, mesh)

    @jax.jit
    def run(params, x, rows):
        def added(params, x, rows):
            y, state = reader.bind(params)(x, embedded, rows, None, None)
            assert state is None
            return jnp.sum(y * along), y

        (_, y), gradients = jax.value_and_grad(added, (0, 1, 2), has_aux=True)(params, x, rows)
        return y, gradients

    y, (dparams, dx, drows) = run(params, x, rows)
    return [y, dparams["gate_proj.kernel"], dx, drows]


def _expected(heads: int = K):
    """The same from the formula, head by head."""
    (x, _, rows), along, params = _inputs(heads=heads)
    x, rows, w = (
        torch.tensor(value, requires_grad=True) for value in (x, rows, params["gate_proj.kernel"])
    )
    parts = []
    for head in range(heads):
        gate = 3 / (1 + torch.exp(-sum(w[i, head] * x[..., i] for i in range(12))))
        parts.append(gate[..., None] * rows[:, :, 0, head * DH : (head + 1) * DH])
    y = torch.stack(parts, 2)
    (y * torch.tensor(along)).sum().backward()
    return [value.detach().numpy() for value in (y, w.grad, x.grad, rows.grad)]


def _close(found, expected):
    for one, other, atol in zip(found, expected, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def test_it_is_the_formula():
    _close(_found(), _expected())


# Heads for two devices, one head for each, and heads that several devices share.
@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 2, 2), 2), ((2, 1, 4), 4), ((1, 1, 8), 2), ((8, 1, 1), 2)]
)
def test_meshes_give_the_same(device_mesh, shape, heads):
    mesh = device_mesh(shape)
    y, *gradients = _found(mesh, heads)
    _close([y, *gradients], _expected(heads))
    whole = kv_heads_axis(heads, mesh) == "shared_kv_heads"
    assert whole == (shape == (1, 1, 8))
    # As attention has its values: nothing is moved where they are added up.
    assert y.sharding.is_equivalent_to(
        NamedSharding(mesh, token_spec(None if whole else "tensor")), y.ndim
    )


def test_devices_with_heads_of_their_own_send_nothing(device_mesh):
    mesh = device_mesh((2, 2, 2))
    reader = taken_apart(_reader(mesh))
    inputs, _, params = _inputs()
    arguments = placed_params(reader, params, mesh), *placed_inputs(*inputs, mesh)
    run = jax.jit(lambda params, *inputs: reader.bind(params)(*inputs, None, None)[0])
    program = run.lower(*arguments).compile().as_text()
    assert not re.findall(r"(all-(?:gather|reduce|to-all)|collective-permute)\(", program)


def test_gates_begin_near_the_middle_of_their_range():
    (x, embedded, _), _, _ = _inputs()
    ones = np.ones((*x.shape[:2], 1, K * DH), np.float32)
    y, _ = _reader()(x, embedded, ones, None, None)
    np.testing.assert_allclose(y, 1.5, atol=0.15)
    assert np.ptp(np.asarray(y)) > 0


def test_it_comes_in_the_dtype_of_rows():
    (x, embedded, rows), _, _ = _inputs()
    y, state = _reader()(*(jnp.bfloat16(value) for value in (x, embedded, rows)), None, "kept")
    assert y.dtype == jnp.bfloat16 and state == "kept"


def test_it_says_what_it_has_and_costs():
    shapes = {name: value.shape for name, value in taken_apart(_reader()).params.items()}
    assert ValueReader.weights(num_kv_heads=K) == shapes
    cost = ValueReader.cost(num_kv_heads=K, head_dim=DH)
    assert (cost.parameters, cost.reads, cost.matmuls, cost.row) == (24, 24, 24, 16)


def test_a_stream_too_narrow_for_the_gate_is_refused():
    with pytest.raises(InputError, match=r"model\.embed_dim=8 is less than the 12 numbers"):
        _reader(embed_dim=8)
