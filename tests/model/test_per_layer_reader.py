"""Per-layer embeddings are those of transformers' Gemma 4, from its weights and back."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.errors import InputError
from stem_jax.interop.gemma_names import from_gemma, gemma_shapes, to_gemma
from stem_jax.mesh import token_spec
from stem_jax.model.per_layer_reader import PerLayerReader
from tests.reader_modules import placed_inputs, placed_params, taken_apart

D, P, N, V = 32, 8, 3, 40
EPS = 1e-6


@pytest.fixture(scope="module")
def gemma():
    """Its text model with all weights random, whose layers do nothing before their end."""
    import torch
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

    class Nothing(torch.nn.Module):
        def __init__(self, returns):
            super().__init__()
            self.returns = returns

        def forward(self, hidden_states, **_):
            return self.returns(torch.zeros_like(hidden_states))

    config = Gemma4TextConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=8,
        num_hidden_layers=N,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["full_attention"] * N,
        rms_norm_eps=EPS,
        vocab_size_per_layer_input=V,
        hidden_size_per_layer_input=P,
        # Else the row of this id has no gradient.
        pad_token_id=None,
    )
    model = Gemma4TextModel(config)
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        vector = weight.ndim == 1
        low, high = (0.5, 1.5) if vector else (-0.4, 0.4)
        weight.data.uniform_(low, high, generator=random)
    for layer in model.layers:
        layer.self_attn = Nothing(lambda zeros: (zeros, None))
        layer.mlp = Nothing(lambda zeros: zeros)
    return model


@pytest.fixture(scope="module")
def tensors(gemma):
    return {name: value.numpy().copy() for name, value in gemma.state_dict().items()}


@functools.cache
def _inputs(batch: int = 8, length: int = 5):
    rng = np.random.default_rng(0)
    x, along = rng.normal(size=(2, batch, length, D)).astype(np.float32)
    # Gradients of a mean over positions.
    return SimpleNamespace(
        x=x, along=along / (batch * length), tokens=rng.integers(0, V, (batch, length))
    )


@functools.cache
def _reader(mesh=None):
    make = functools.partial(PerLayerReader, embed_dim=D, width=P, norm_eps=EPS)
    return taken_apart(make(mesh=mesh, rngs=nnx.Rngs(0)))


@functools.cache
def _run(mesh=None):
    """run(layers, rows, embedded, x): the layers' ends, one after the other, and all gradients."""
    reader, along = _reader(mesh), _inputs().along

    def total(layers, rows_BxLxNxP, embedded, x):
        for layer, params in enumerate(layers):
            rows = rows_BxLxNxP[:, :, layer : layer + 1]
            x, state = reader.bind(params)(x, embedded, rows, None, None)
            assert state is None
        return jnp.sum(x * along), x

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))


def _ours(tensors, mesh=None):
    """The output, and gradients of layers' parameters, of rows, of the embedding and of x."""
    layers, rows_VxNxP = from_gemma(tensors, num_layers=N)
    inputs = _inputs()
    x, embedded = inputs.x, tensors["embed_tokens.weight"][inputs.tokens]
    rows = rows_VxNxP[inputs.tokens]
    if mesh is not None:
        layers = [placed_params(_reader(mesh), params, mesh) for params in layers]
        x, embedded, rows = placed_inputs(x, embedded, rows, mesh)
    (_, y), (layers, drows, dembedded, dx) = _run(mesh)(layers, rows, embedded, x)
    drows_VxNxP, dembedding = np.zeros_like(rows_VxNxP), np.zeros((V, D), np.float32)
    np.add.at(drows_VxNxP, inputs.tokens, drows)
    np.add.at(dembedding, inputs.tokens, dembedded)
    return y, jax.device_get(layers), drows_VxNxP, dembedding, dx


@pytest.fixture(scope="module")
def theirs(gemma):
    """The output, gradients of weights by name, and that of x."""
    import torch

    inputs = _inputs()
    tokens, x = torch.tensor(inputs.tokens), torch.tensor(inputs.x, requires_grad=True)
    embedded = gemma.embed_tokens(tokens)
    per_layer = gemma.project_per_layer_inputs(
        embedded, gemma.get_per_layer_inputs(tokens, embedded)
    )
    y = x
    for number, layer in enumerate(gemma.layers):
        y = layer(y, per_layer[:, :, number])
    (y * torch.tensor(inputs.along)).sum().backward()
    gradients = {name: weight.grad for name, weight in gemma.named_parameters()}
    gradients = {name: g.numpy() for name, g in gradients.items() if g is not None}
    return y.detach().numpy(), gradients, x.grad.numpy()


def _close(found, expected, within: float, name: str = ""):
    """Within so much, and so much of the largest number where all are small."""
    largest = np.abs(expected).max()
    assert largest > 1e-3, name
    atol = within * min(1.0, largest)
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0, err_msg=name)


def test_outputs_are_theirs(tensors, theirs):
    _close(_ours(tensors)[0], theirs[0], 1e-5)


def test_gradients_are_theirs(tensors, theirs):
    _, layers, drows, dembedding, dx = _ours(tensors)
    _, gradients, dx_theirs = theirs
    # One norm for all layers there has the gradients of all of ours.
    together = sum(params["embed_norm.scale"] for params in layers)
    layers = [params | {"embed_norm.scale": together} for params in layers]
    found = to_gemma(layers, drows) | {"embed_tokens.weight": dembedding}
    expected = {name: g for name, g in gradients.items() if name in found}
    # All that gemma has but the scalar, which is no weight.
    assert {name for name in found if "scalar" not in name} == expected.keys()
    for name, gradient in expected.items():
        _close(found[name], gradient, 1e-4, name)
    _close(dx, dx_theirs, 1e-4)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_meshes_give_the_same(device_mesh, tensors, shape):
    mesh = device_mesh(shape)
    found, expected = _ours(tensors, mesh), _ours(tensors)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, token_spec()), 3)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        _close(one, other, 2e-5)


def test_weights_go_there_and_back(gemma, tensors):
    layers, rows = from_gemma(tensors, num_layers=N)
    shapes = PerLayerReader.weights(embed_dim=D, width=P)
    assert all({k: v.shape for k, v in params.items()} == shapes for params in layers)
    assert rows.shape == (V, N, P)
    back = to_gemma(layers, rows)
    expected = gemma_shapes(vocab_size=V, num_layers=N, embed_dim=D, width=P)
    assert {name: value.shape for name, value in back.items()} == expected
    # All of the model's that belong to it.
    assert back.keys() == {k for k in tensors if "per_layer" in k or "layer_scalar" in k}
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    again, rows_again = from_gemma(
        to_gemma(layers, rows, prefix="model."), num_layers=N, prefix="model."
    )
    np.testing.assert_array_equal(rows_again, rows)
    jax.tree.map(np.testing.assert_array_equal, again, layers)


GATE = "layers.1.per_layer_input_gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.pop("embed_tokens_per_layer.weight"), "embed_tokens_per_layer.weight is miss"),
        (lambda t: t.update({GATE: t[GATE][:5]}), r"gate.weight is \(5, 32\), expected \(8, 32\)"),
        (
            lambda t: t.update({"layers.2.layer_scalar": np.full(1, 0.5)}),
            r"layers.2.layer_scalar=0.5 is not 1",
        ),
    ],
)
def test_weights_that_cannot_be_ours_are_named(tensors, change, message):
    tensors = dict(tensors)
    change(tensors)
    with pytest.raises(InputError, match=message):
        from_gemma(tensors, num_layers=N)


def test_norms_that_differ_cannot_be_theirs(tensors):
    layers, rows = from_gemma(tensors, num_layers=N)
    layers[2]["embed_norm.scale"] = layers[2]["embed_norm.scale"] + 1
    with pytest.raises(
        InputError, match=r"embed_norm\.scale of layer 2 differs from that of layer 0"
    ):
        to_gemma(layers, rows)
    with pytest.raises(InputError, match="rows of 3 layers and 2 readers"):
        to_gemma(layers[:2], rows)


def test_it_says_what_it_has_and_costs():
    shapes = {name: value.shape for name, value in _reader().params.items()}
    assert PerLayerReader.weights(embed_dim=D, width=P) == shapes
    cost = PerLayerReader.cost(embed_dim=D, width=P)
    assert (cost.parameters, cost.matmuls, cost.row) == (3 * D * P + D + P, 3 * D * P, P)


def test_a_backbone_can_begin_as_it_was():
    reader = PerLayerReader(
        embed_dim=D, width=P, norm_eps=EPS, output_scale=0.0, mesh=None, rngs=nnx.Rngs(0)
    )
    x, rows = _inputs().x, np.ones((8, 5, 1, P), np.float32)
    y, state = reader(x, x, rows, None, "kept")
    np.testing.assert_array_equal(y, x)
    assert state == "kept"
