"""Engram's reader is that of transformers' `qwen4_exp`, from its weights and back."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.context_order import slots
from stem_jax.interop.engram_names import from_ple_layer
from stem_jax.mesh import CONTEXT, token_spec
from stem_jax.model import engram
from stem_jax.model.engram import Engram
from stem_jax.training.optimizer import make_optimizer
from tests.qwen4_exp import memory, ple_layer, tokens_with_eos
from tests.reader_modules import placed_inputs, placed_params, taken_apart

D, EPS = 24, 1e-6


def _made(ours, mesh=None, **others) -> Engram:
    sizes = {"embed_dim": D, "keys": ours.keys_of_layer, "width": ours.width, "norm_eps": EPS}
    return Engram(**sizes, max_order=ours.max_order, mesh=mesh, rngs=nnx.Rngs(0), **others)


@functools.cache
def _reader(ours, mesh=None):
    return taken_apart(_made(ours, mesh))


@functools.cache
def _run(ours, mesh=None, order=None):
    """run(params, x, rows, segments, along): output, and gradients of the first three."""
    reader = _reader(ours, mesh)

    def total(params, x, rows, segments, along):
        module = reader.bind(params)
        if order is not None:
            module.conv.dilation = order
        y, _ = module(x, None, rows, segments, None)
        return jnp.sum(y * along), y

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


def _arrays(tensors) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in tensors.items()}


def _r(module, x_BxLxD, tokens_BxL) -> np.ndarray:
    """|r| of theirs, [B, L]."""
    with torch.no_grad():
        key = module.norm_key(module.key_proj(module.ple_embedding(torch.tensor(tokens_BxL), None)))
        query = module.norm_query(torch.tensor(x_BxLxD))
        return ((key * query).sum(-1) / D**0.5).abs().numpy()


@functools.cache
def _case(ours, place: int, length: int, padded: bool = False):
    """Weights, inputs, and what theirs makes of them."""
    module = ple_layer(ours, place, D, seed=place)
    tokens = tokens_with_eos(ours.vocab_size, length)
    rng = np.random.default_rng(length)
    x, along = rng.normal(size=(2, *tokens.shape, D)).astype(np.float32)
    # Where r is nearly 0 the root is so steep that the last bits of r decide; see the gate's test.
    while (steep := _r(module, x, tokens) < 0.01).any():
        x[steep] = rng.normal(size=(steep.sum(), D))
    segments = np.ones_like(tokens)
    if padded:
        segments = (np.arange(length) < rng.integers(1, length + 1, (8, 1))).astype(np.int32)
    # Gradients of a mean over positions.
    along = along / tokens.size * segments[..., None]
    given = torch.tensor(x, requires_grad=True)
    mask = torch.tensor(segments) if padded else None
    y = given + module(given, torch.tensor(tokens), None, conv_mask=mask)
    (y * torch.tensor(along)).sum().backward()
    tensors = _arrays(module.state_dict())
    gradients = tensors | _arrays({n: w.grad for n, w in module.named_parameters()})
    return SimpleNamespace(
        ours=ours,
        hashes=ours,
        layer=ours.layers[place],
        tensors=tensors,
        gradients=gradients,
        tokens=tokens,
        segments=segments,
        x=x,
        along=along,
        y=y.detach().numpy(),
        dx=given.grad.numpy(),
    )


def _rows(case, table_KxF, tokens=None, segments=None):
    """A layer's rows of each token, and their numbers in the layer's own table."""
    ours, layer = case.ours, case.layer
    tokens = case.tokens if tokens is None else tokens
    keys = case.hashes.keys(tokens, np.ones_like(tokens) if segments is None else segments)
    numbers = keys[..., ours.reads(layer)[0]] - ours.block(ours.layers.index(layer)).start
    return table_KxF[numbers], numbers


def _found(case, mesh=None, order=None):
    """y, gradients of parameters, of the table and of x."""
    params, table_KxF = from_ple_layer(case.tensors, case.ours, case.layer)
    rows, numbers = _rows(case, table_KxF)
    x, segments, along = case.x, case.segments, case.along
    places = slice(None)
    if mesh is not None:
        length, devices = x.shape[1], mesh.shape[CONTEXT]
        places = np.argsort(slots(length, devices)) if devices > 1 else slice(None)
        if devices > 1:
            x, rows, segments, along = (
                a[:, slots(length, devices)] for a in (x, rows, segments, along)
            )
        params = placed_params(_reader(case.ours, mesh), params, mesh)
        x, _, rows = placed_inputs(x, x, rows, mesh)
    (_, y), (dparams, dx, drows) = _run(case.ours, mesh, order)(params, x, rows, segments, along)
    if mesh is not None:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, token_spec()), 3)
    dtable = np.zeros_like(table_KxF)
    np.add.at(dtable, numbers, np.asarray(drows)[:, places])
    return np.asarray(y)[:, places], jax.device_get(dparams), dtable, np.asarray(dx)[:, places]


def _largest_errors(case, found) -> tuple[float, float]:
    """Of the output, and of gradients, each against its largest number if that is below one."""
    y, dparams, dtable, dx = found
    expected, dtable_theirs = from_ple_layer(case.gradients, case.ours, case.layer)
    # Weights of norms are scales less one, their gradients are equal.
    expected = {k: g - ("norm" in k) for k, g in expected.items()}
    assert expected.keys() == dparams.keys()
    pairs = [*((dparams[name], expected[name]) for name in expected)]
    pairs += [(dtable, dtable_theirs), (dx, case.dx)]
    errors = []
    for one, other in pairs:
        assert one.shape == other.shape and np.abs(other).max() > 1e-4
        errors.append(np.abs(one - other).max() / min(1.0, np.abs(other).max()))
    real = case.segments > 0
    return np.abs(y - case.y)[real].max(), max(errors)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_it_is_that_of_transformers(max_order, place):
    # The longest convolution reads 12 positions back; some sequences are shorter than N.
    for length in (20, max_order - 1):
        case = _case(memory(max_order=max_order), place, length)
        output, gradients = _largest_errors(case, _found(case))
        assert output < 1e-5 and gradients < 1e-4, length


def test_it_is_with_a_large_vocabulary():
    case = _case(memory(200_000, 2, heads=1), 1, 20)
    output, gradients = _largest_errors(case, _found(case))
    assert output < 1e-5 and gradients < 1e-4


def test_padding_behind_a_sequence_is_theirs_and_stays_as_it_was():
    case = _case(memory(), 0, 20, padded=True)
    found = _found(case)
    output, gradients = _largest_errors(case, found)
    assert output < 1e-5 and gradients < 1e-4
    padding = case.segments == 0
    assert padding.any()
    np.testing.assert_array_equal(found[0][padding], case.x[padding])


def test_the_gate_is_theirs_near_zero():
    size = np.array([0, 1e-12, 1e-7, 9e-7, 1.1e-6, 1e-4, 0.3, 4, 900], np.float32)
    r = np.concatenate([size, -size[1:]])
    given = torch.tensor(r, requires_grad=True)
    theirs = torch.sigmoid(given.abs().clamp_min(1e-6).sqrt() * given.sign())
    theirs.sum().backward()
    found, slope = jax.vmap(jax.value_and_grad(engram._gate))(jnp.asarray(r))
    np.testing.assert_allclose(found, theirs.detach(), rtol=1e-6)
    np.testing.assert_allclose(slope, given.grad, rtol=1e-5)
    # Where the root would be too steep it has no slope.
    assert (np.asarray(slope)[np.abs(r) < 1e-6] == 0).all()


@pytest.mark.parametrize("mutant", ["dilation", "taps", "multiplier", "offset", "gate", "norms"])
def test_another_rule_gives_other_outputs(mutant, monkeypatch):
    order, hashes = None, memory()
    case = _case(hashes, 1, 20)
    tensors = dict(case.tensors)
    if mutant == "dilation":
        order = hashes.max_order - 1
    elif mutant == "taps":
        tensors["conv1d.weight"] = tensors["conv1d.weight"][..., ::-1]
    elif mutant in ("multiplier", "offset"):
        hashes, field = memory(), {"multiplier": "multipliers", "offset": "head_offsets"}[mutant]
        first, second = getattr(hashes, field)
        vars(hashes)[field] = first, (*second[:2], second[2] + 2, *second[3:])
    elif mutant == "gate":
        monkeypatch.setattr(engram, "_gate", jax.nn.sigmoid)
        _run.cache_clear()
    elif mutant == "norms":
        tensors["norm_conv.weight"] = tensors["norm_conv.weight"] - 1
    changed = SimpleNamespace(**(vars(case) | {"hashes": hashes, "tensors": tensors}))
    y, *_ = _found(changed, order=order)
    _run.cache_clear()
    assert np.abs(y - case.y).max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 2, 2)])
def test_meshes_give_the_same(device_mesh, shape):
    case = _case(memory(), 0, 20, padded=True)
    output, gradients = _largest_errors(case, _found(case, device_mesh(shape)))
    assert output < 1e-5 and gradients < 1e-4


@functools.cache
def _steps(ours):
    """step(params, x, rows, segments, state), compiled."""
    reader = _reader(ours)
    return jax.jit(lambda params, x, *rest: reader.bind(params)(x, None, *rest))


def test_packed_documents_are_as_they_are_alone():
    case = _case(memory(), 0, 20)
    params, table_KxF = from_ple_layer(case.tensors, case.ours, case.layer)
    step, lengths, numbers = _steps(case.ours), (3, 1, 12, 4), (7, 2, 4, 0)
    segments = np.broadcast_to(np.repeat(np.int32(numbers), lengths), case.tokens.shape)
    rows, _ = _rows(case, table_KxF, segments=segments)
    y, _ = step(params, case.x, rows, segments, None)
    first = 0
    for length, number in zip(lengths, numbers):
        own = slice(first, first + length)
        first += length
        if not number:
            np.testing.assert_array_equal(y[:, own], case.x[:, own])
            continue
        # Alone, with padding behind.
        pad = ((0, 0), (0, 20 - length))
        tokens, ones = (np.pad(a[:, own], pad) for a in (case.tokens, np.ones_like(segments)))
        x, rows = np.pad(case.x[:, own], (*pad, (0, 0))), _rows(case, table_KxF, tokens)[0]
        alone, _ = step(params, x, rows, ones, None)
        np.testing.assert_allclose(y[:, own], alone[:, :length], atol=1e-6, rtol=0)
    # And not without their numbers.
    mixed, _ = step(params, case.x, rows, np.ones_like(segments), None)
    assert np.abs(mixed - y)[:, 4:16].max() > 1e-3


@pytest.mark.parametrize("left", [False, True])
def test_decoding_goes_on_where_a_sequence_ended(left):
    case = _case(memory(), 0, 20)
    params, table_KxF = from_ple_layer(case.tensors, case.ours, case.layer)
    # Two documents, of which decoding continues the second; prompts of different lengths.
    whole = np.broadcast_to(np.repeat(np.int32([3, 1]), (5, 15)), case.tokens.shape)
    rows, _ = _rows(case, table_KxF, segments=whole)
    step = _steps(case.ours)
    expected, _ = step(params, case.x, rows, whole, None)
    lengths = np.array([20, 19, 17, 12, 8, 7, 6, 6])
    prompt = np.arange(20) < lengths[:, None]

    def placed(a):
        """Prompts, with padding on their left if there is any."""
        a = np.where(prompt.reshape(8, 20, *(1,) * (a.ndim - 2)), a, 0)
        return np.stack([np.roll(a[i], (20 - lengths[i]) * left, 0) for i in range(8)])

    y, state = step(params, *map(placed, (case.x, rows, whole)), None)
    shape = Engram.state_shape(embed_dim=D, max_order=case.ours.max_order)
    assert state.shape == (8, *shape)
    real = placed(whole) > 0
    np.testing.assert_allclose(y[real], expected[prompt], atol=1e-6, rtol=0)
    # Those that still have positions go on by one each, the others have padding.
    for _ in range(3):
        going, at = lengths < 20, np.minimum(lengths, 19)
        x, row, there = (a[np.arange(8), at][:, None] for a in (case.x, rows, np.asarray(expected)))
        y, state = step(params, x, row, np.where(going, 1, 0)[:, None], state)
        np.testing.assert_allclose(y[going], there[going], atol=1e-6, rtol=0)
        lengths += going


def test_decoding_takes_several_tokens_at_once():
    case = _case(memory(max_order=2), 1, 20)
    params, table_KxF = from_ple_layer(case.tensors, case.ours, case.layer)
    rows, _ = _rows(case, table_KxF)
    step, ones = _steps(case.ours), np.ones_like(case.tokens)
    whole, _ = step(params, case.x, rows, ones, None)
    state, first = None, 0
    for real in (4, 1, 3, 8, 4):
        window = slice(first, first + 8)
        pad = ((0, 0), (0, 8 - len(range(20)[window])))
        segments = np.where(np.arange(8) < real, 1, 0)[None].repeat(8, 0)
        x, row = (np.pad(a[:, window], (*pad, *((0, 0),) * (a.ndim - 2))) for a in (case.x, rows))
        y, state = step(params, x, row, segments, state)
        found = y[:, :real]
        np.testing.assert_allclose(found, whole[:, first : first + real], atol=1e-6, rtol=0)
        first += real


def test_it_says_what_it_has_and_costs():
    reader, sizes = _reader(memory()), {"embed_dim": D, "keys": 4, "width": 6}
    assert Engram.weights(**sizes) == {name: w.shape for name, w in reader.params.items()}
    cost = Engram.cost(**sizes)
    weights = sum(w.size for w in reader.params.values())
    assert (cost.parameters, cost.reads, cost.matmuls) == (weights, weights, 2 * 24 * D)
    assert cost.row == 24 and cost.elementwise == 33 * D + 7


def test_a_backbone_can_begin_as_it_was():
    case = _case(memory(), 0, 20)
    reader = taken_apart(_made(case.ours, zero_values=True))
    rows = np.ones((8, 20, 4, 6), np.float32)

    @jax.jit
    def run(params):
        y, _ = reader.bind(params)(case.x, None, rows, case.segments, None)
        return jnp.sum(y * case.along), y

    slopes, y = jax.grad(run, has_aux=True)(reader.params)
    np.testing.assert_array_equal(y, case.x)
    # What is zero learns from the first step on: the rows are not, nor is W_K.
    assert np.abs(slopes["value_proj.kernel"]).max() > 1e-4
    assert np.abs(reader.params["key_proj.kernel"]).max() > 0.1


def test_it_comes_in_the_dtype_of_the_stream():
    case = _case(memory(), 0, 20)
    rows = np.ones((8, 20, 4, 6), np.float32)
    y, state = _made(case.ours)(jnp.bfloat16(case.x), None, rows, case.segments, None)
    assert y.dtype == state.dtype == jnp.bfloat16


def test_matrices_of_rows_decay_and_taps_do_not(tiny_config):
    config = tiny_config(**{"optimizer.weight_decay": 0.1, "optimizer.decay_mask": "matrices"})
    reader = _reader(memory())
    optimizer = make_optimizer(config.optimizer, reader.axes.__getitem__)
    ones = {name: jnp.ones(w.shape) for name, w in reader.params.items()}
    zeros = {name: jnp.zeros(w.shape) for name, w in reader.params.items()}
    moved, _ = optimizer.update(zeros, optimizer.init(ones), ones)
    decayed = {name for name, update in moved.items() if np.asarray(update).any()}
    assert decayed == {"key_proj.kernel", "value_proj.kernel"}
