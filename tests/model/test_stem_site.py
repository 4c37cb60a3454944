"""model.stem_site: where a STEM layer's row stands."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stem_jax.config import before
from stem_jax.config_checks import validate
from stem_jax.config_file import config_from_json
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.cost import count_parameters, forward_flops_per_token, generation_flops
from stem_jax.model.feed_forward import KINDS
from stem_jax.model.ffn import SITES
from stem_jax.model.kind import Read
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.saved_models import BYTES
from tests.stem_inputs import stem_inputs

pytestmark = pytest.mark.little_effort
OTHER_SITES = [site for site in SITES if site != before("stem_site")]


def _silu(x):
    return x / (1 + np.exp(-x))


FORMULAS = {
    "up": lambda gate, up, row: _silu(gate) * row,
    "gate": lambda gate, up, row: _silu(row) * up,
    "up_add": lambda gate, up, row: _silu(gate) * (up + row),
}


@pytest.mark.parametrize("site", SITES)
def test_a_layer_is_its_formula(tiny_config, site):
    model = tiny_config(**{"model.stem_site": site}).model
    layer = KINDS["stem"](model, 1.0, None, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x_BxLxD, row_BxLxF = rng.normal(size=(2, 5, 32)), rng.normal(size=(2, 5, 48))
    read = Read(None, None, jnp.asarray(row_BxLxF, jnp.float32))
    y_BxLxD, aux = layer(jnp.asarray(x_BxLxD, jnp.float32), read)
    kernels = {
        name: np.asarray(getattr(layer, name).kernel[...], np.float64)
        for name in (*SITES[site], "down_proj")
    }
    gate, up = (
        x_BxLxD @ kernels[name] if name in kernels else None for name in ("gate_proj", "up_proj")
    )
    expected = FORMULAS[site](gate, up, row_BxLxF) @ kernels["down_proj"].T
    np.testing.assert_allclose(y_BxLxD, expected, atol=2e-5)
    assert jax.tree.leaves(aux) == []
    for name in ("gate_proj", "up_proj"):
        assert (getattr(layer, name) is not None) == (name in SITES[site])


@pytest.mark.parametrize("site", SITES)
def test_parameters_and_flops_are_those_that_there_are(tiny_config, site):
    config = tiny_config(**{"model.stem_site": site})
    shapes = ModelDef(config).shapes()
    assert count_parameters(config).active == sum(
        math.prod(shape.shape) for shape in shapes.values()
    )
    published = tiny_config()
    more = 2 * 2 * 32 * 48 if site == "up_add" else 0
    found = [forward_flops_per_token(c, 16) for c in (config, published)]
    assert found[0] - found[1] == more
    # Of two STEM layers, an addition for each of F numbers.
    adds = [generation_flops(c, 1, 16).elementwise for c in (config, published)]
    assert adds[0] - adds[1] == (2 * 48 if site == "up_add" else 0)


def test_what_was_before_is_the_published_site(tiny_config):
    assert before("stem_site") == "up" == tiny_config().model.stem_site
    text = tiny_config().to_json().replace('    "stem_site": "up",\n', "")
    assert "stem_site" not in text and config_from_json(text) == tiny_config()


def test_an_unknown_site_is_named_with_those_that_there_are(tiny_config):
    config = tiny_config()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, stem_site="sideways")
    )
    with pytest.raises(InputError, match=f"model.stem_site='sideways' .* {', '.join(SITES)}$"):
        validate(config)


def _trained(train_step, make_batch, shape, **keys):
    step = train_step(shape, **keys)
    state = init_state(step.blueprint)
    schedule, losses = make_schedule(step.config, 4), []
    for seed in range(2):
        state, metrics = step.update(state, make_batch(step, seed, ragged=True), schedule)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get((state.params, state.tables["stem"].rows))


@pytest.mark.long
@pytest.mark.parametrize(
    ("site", "keys"),
    [
        *((site, {"shape": (2, 2, 2), "train.micro_batches": 2}) for site in OTHER_SITES),
        (OTHER_SITES[0], {"shape": (8, 1, 1)}),
    ],
)
def test_meshes_train_alike(train_step, make_batch, site, keys):
    others = {"model.stem_site": site, "train.global_batch_size": 16}
    one, first = _trained(train_step, make_batch, (1, 1, 1), **others)
    other, second = _trained(train_step, make_batch, **others, **keys)
    np.testing.assert_allclose(other, one, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), second, first)


@pytest.mark.parametrize("site", OTHER_SITES)
def test_rows_and_projections_learn(tiny_config, site):
    """A gradient reaches every parameter and the rows; with another site the loss is another."""
    config = tiny_config(
        **{"model.stem_site": site, "model.stem_layers": "1", "model.num_layers": 2}
    )
    model = ModelDef(config)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    inputs = stem_inputs(tokens, tokens, tokens, jnp.ones_like(tokens))
    rows_SxUxF = jax.random.normal(jax.random.key(0), (1, 12, 48))

    def total(params, rows_SxUxF):
        return jnp.sum(jnp.sin(model.bind(params)(inputs, {"stem": rows_SxUxF}).hidden))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(model.init(), rows_SxUxF)
    del gradients[0]["head.kernel"]
    for gradient in jax.tree.leaves(gradients):
        assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("site", [pytest.param("gate", marks=pytest.mark.long), "up_add"])
def test_generation_says_what_the_whole_sequence_says(tiny_config, site):
    keys = {"model.vocab_size": 258, "model.num_layers": 2, "model.stem_layers": "1"}
    step = tiny_config(**keys, **{"model.stem_site": site})
    model = ModelDef(step)
    params = model.init()
    rows = jax.random.normal(jax.random.key(0), (1, 288, 48))
    source = ResidentRows(rows, table_specs(step)["stem"], None)
    generator = Generator(step, params, {"stem": source}, BYTES)
    [column] = zip(*generator.steps([[1, 2, 3]], 3, Sampling(temperature=0.0)), strict=True)
    ids = jnp.array([[1, 2, 3, *column]], jnp.int32)
    block, inverse = source.serve(ids).block(ids, "float32")
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    bound = model.bind(params)
    hidden = bound(stem_inputs(ids, inverse, places, jnp.ones_like(ids)), {"stem": block}).hidden
    assert bound.logits(hidden)[0, 2:-1].argmax(-1).tolist() == list(column)
