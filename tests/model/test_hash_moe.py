"""Hash layers: each token's FFN is that of its expert, on every mesh and platform."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.config_checks import validate
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.mesh import parameter_spec, token_spec
from stem_jax.model.hash_moe import HashExperts, experts_of, groups_of
from stem_jax.model.inputs import Inputs
from stem_jax.model.kind import Read
from stem_jax.model.layer_plan import by_layer
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.saved_models import BYTES

pytestmark = pytest.mark.little_effort
KEYS = {
    "model.stem_layers": "none",
    "model.hash_moe_layers": "half",
    "model.hash_moe_experts": 5,
}


@pytest.mark.parametrize(("vocab_size", "experts"), [(88, 5), (258, 16), (4096, 22), (32000, 16)])
def test_experts_have_equally_many_ids(vocab_size, experts):
    found = np.asarray(experts_of(jnp.arange(vocab_size), vocab_size, experts))
    counts = np.bincount(found, minlength=experts)
    assert len(counts) == experts and counts.max() - counts.min() <= 1
    # The most frequent ids, which come first, are spread as well.
    assert len(set(found[:experts].tolist())) > experts / 2


@pytest.mark.parametrize("way", ["blocks", "ragged"])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_every_position_has_one_slot_and_padding_none(way, count):
    experts_N = np.random.default_rng(count).integers(0, 6, count).astype(np.int32)
    groups = groups_of(jnp.asarray(experts_N), 5, way)
    slots, positions = np.asarray(groups.slots), np.asarray(groups.positions)
    real = experts_N < 5
    assert (slots[~real] == len(positions)).all() and len({*slots[real]}) == real.sum()
    np.testing.assert_array_equal(positions[slots[real]], np.flatnonzero(real))
    assert (np.sort(positions)[real.sum() :] == count).all()
    if way == "blocks":
        rows = len(positions) // len(groups.experts)
        found = np.asarray(groups.experts)[slots[real] // rows]
        np.testing.assert_array_equal(found, experts_N[real])
        assert int(groups.rounds) * rows >= real.sum()


def _layer(tiny_config, mesh=None):
    return HashExperts(tiny_config(**KEYS).model, 1.0, mesh, rngs=nnx.Rngs(0))


def _inputs(seed=0, batch=4, length=12):
    rng = np.random.default_rng(seed)
    x_BxLxD = rng.normal(size=(batch, length, 32)).astype(np.float32)
    tokens = rng.integers(0, 88, (batch, length), np.int32)
    segments = (np.arange(length) < rng.integers(0, length + 1, (batch, 1))).astype(np.int32)
    return x_BxLxD, tokens, segments


def _reference(kernels, x_BxLxD, tokens, segments):
    """Token by token, in float64."""
    y_BxLxD = np.zeros(x_BxLxD.shape)
    experts = np.asarray(experts_of(jnp.asarray(tokens), 88, 5))
    for place in zip(*np.nonzero(segments), strict=True):
        gate, up, down = (kernel[experts[place]].astype(np.float64) for kernel in kernels)
        g = x_BxLxD[place] @ gate
        y_BxLxD[place] = (g / (1 + np.exp(-g)) * (x_BxLxD[place] @ up)) @ down.T
    return y_BxLxD


def _kernels(layer):
    return [np.asarray(p.kernel[...]) for p in (layer.gate_proj, layer.up_proj, layer.down_proj)]


@pytest.mark.parametrize("way", ["blocks", "ragged"])
def test_each_token_goes_through_its_expert(tiny_config, monkeypatch, way):
    monkeypatch.setattr("stem_jax.model.hash_moe.WAYS", {"cpu": way})
    layer, (x, tokens, segments) = _layer(tiny_config), _inputs()
    y_BxLxD, aux = layer(jnp.asarray(x), Read(jnp.asarray(tokens), jnp.asarray(segments)))
    np.testing.assert_allclose(y_BxLxD, _reference(_kernels(layer), x, tokens, segments), atol=2e-5)
    assert jax.tree.leaves(aux) == []


def _gradients(layer, mesh, x, tokens, segments):
    """Of all inputs that have some, in the places of a step."""
    graph, state = nnx.split(layer)
    if mesh is not None:
        place = NamedSharding(mesh, parameter_spec(("experts", "embed", "ffn")))
        state = jax.tree.map(lambda kernel: jax.device_put(kernel, place), state)
        x, tokens, segments = (
            jax.device_put(a, NamedSharding(mesh, token_spec())) for a in (x, tokens, segments)
        )

    @jax.jit
    def gradients(state, x, tokens, segments):
        def total(state, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, Read(tokens, segments))[0]))

        return jax.value_and_grad(total, argnums=(0, 1))(state, x)

    return jax.tree.map(np.asarray, jax.tree.leaves(gradients(state, x, tokens, segments)))


def _plain_gradients(layer, x, tokens, segments):
    """Every token with weights of its own."""
    experts = experts_of(jnp.asarray(tokens), 88, 5)

    @jax.jit
    def gradients(kernels, x):
        def total(kernels, x):
            gate, up, down = (kernel[experts] for kernel in kernels)
            g, u = (jnp.einsum("bld,bldf->blf", x, kernel) for kernel in (gate, up))
            y = jnp.einsum("blf,bldf->bld", jax.nn.silu(g) * u, down)
            return jnp.sum(jnp.sin(jnp.where(segments[..., None] > 0, y, 0)))

        return jax.value_and_grad(total, argnums=(0, 1))(kernels, x)

    value, (kernels, dx) = gradients(_kernels(layer), x)
    # As nnx sorts them.
    gate, up, down = kernels
    return [value, down, gate, up, dx]


@pytest.mark.parametrize("way", ["blocks", "ragged"])
def test_gradients_are_those_of_single_tokens(tiny_config, monkeypatch, way):
    monkeypatch.setattr("stem_jax.model.hash_moe.WAYS", {"cpu": way})
    layer = _layer(tiny_config)
    found = _gradients(layer, None, *_inputs())
    expected = _plain_gradients(layer, *_inputs())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_meshes_give_the_same(tiny_config, device_mesh, shape):
    mesh, inputs = device_mesh(shape), _inputs(batch=8)
    found = _gradients(_layer(tiny_config, mesh), mesh, *inputs)
    expected = _plain_gradients(_layer(tiny_config), *inputs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_take_one_ragged_product(tiny_config, monkeypatch, platform):
    monkeypatch.setattr("stem_jax.model.hash_moe.WAYS", {"cpu": "ragged"})
    graph, state = nnx.split(_layer(tiny_config))
    x, tokens, segments = map(jnp.asarray, _inputs())

    def total(state, x):
        return jnp.sum(nnx.merge(graph, state)(x, Read(tokens, segments))[0])

    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(state, x)
    assert str(traced.jaxpr).count("ragged_dot") >= 9
    assert traced.lower(lowering_platforms=(platform,)).as_text()


def _trained(train_step, make_batch, shape=(1, 1, 1), **keys):
    step = train_step(shape, **KEYS, **keys)
    state = init_state(step.blueprint)
    schedule, losses = make_schedule(step.config, 4), []
    for seed in range(2):
        state, metrics = step.update(state, make_batch(step, seed, ragged=True), schedule)
        losses.append(float(metrics["loss"]))
    return losses, by_layer(jax.device_get(state.params))


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [
        {"shape": (8, 1, 1)},
        {"shape": (2, 2, 2), "train.micro_batches": 2},
        {"model.scan_layers": True, "model.remat": "full", "train.micro_batches": 2},
        {"model.scan_layers": True, "model.remat": "dots", "shape": (2, 2, 2)},
    ],
    ids=["data", "all_axes", "scanned", "scanned_all_axes"],
)
def test_runs_of_all_kinds_train_alike(train_step, make_batch, keys):
    sizes = {"model.num_layers": 4, "train.global_batch_size": 16}
    losses, params = _trained(train_step, make_batch, **sizes)
    others, found = _trained(train_step, make_batch, **sizes, **keys)
    np.testing.assert_allclose(others, losses, atol=1e-5)
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, atol=3e-5, err_msg=name)


@pytest.mark.long
def test_generation_says_what_the_whole_sequence_says(tiny_config):
    config = tiny_config(**KEYS | {"model.vocab_size": 258, "model.num_layers": 2})
    model = ModelDef(config)
    params = model.init()
    generator = Generator(config, params, {}, BYTES)
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5]]
    columns = list(zip(*generator.steps(prompts, 3, Sampling(temperature=0.0)), strict=True))
    bound = model.bind(params)
    for prompt, column in zip(prompts, columns, strict=True):
        ids = jnp.array([[*prompt, *column]], jnp.int32)
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden = bound(Inputs(ids, places, jnp.ones_like(ids)), {}).hidden
        said = bound.logits(hidden)[0, len(prompt) - 1 : -1].argmax(-1)
        assert said.tolist() == list(column)


REFUSED = [
    ({"hash_moe_layers": (1,)}, "layer 1 is in model.stem_layers=(1, 2) and in model.hash_moe_"),
    ({"hash_moe_experts": 0}, "model.hash_moe_experts=0 must be at least 1"),
    ({"hash_moe_layers": (0,), "hash_moe_experts": 89}, "is more than the 88 ids"),
    ({"hash_moe_layers": (0,), "matmul_dtype": "float8"}, "is not for the experts"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_cannot_be_is_refused(tiny_config, values, message):
    config = tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **values))
    with pytest.raises(InputError) as refusal:
        validate(config)
    assert message in str(refusal.value)
