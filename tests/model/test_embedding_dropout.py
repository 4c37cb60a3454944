"""model.token_embedding_dropout: what training replaces, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.model.cost import count_parameters
from stem_jax.model.transformer import Transformer
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.stem_inputs import stem_inputs

RATE = {"model.token_embedding_dropout": 0.3}


def _losses(step, make_batch, updates=3):
    """Losses and state after some updates."""
    state = init_state(step.blueprint)
    schedule = make_schedule(step.config, updates)
    losses = []
    for seed in range(updates):
        state, metrics = step.update(state, make_batch(step, seed), schedule)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_dropped_tokens_keep_their_rows(tiny_config):
    from flax import nnx

    whole = tiny_config(**RATE)
    config, model = whole.model, Transformer(whole, rngs=nnx.Rngs(params=0))
    tokens = jnp.asarray([[3, 4, 5, 6]])
    places, ones = jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    rows = jax.random.normal(jax.random.key(0), (config.num_stem_layers, 88, config.ffn_dim))

    def run(tokens, dropped):
        seen = []
        model(stem_inputs(tokens, tokens, places, ones, dropped), {"stem": rows}, collect=seen)
        return seen

    dropped = jnp.asarray([[False, True, False, False]])
    seen, plain = run(tokens, dropped), run(tokens, None)
    np.testing.assert_array_equal(seen[0][0, 1], model.embed.dropped[...])
    np.testing.assert_array_equal(seen[0][0, [0, 2, 3]], plain[0][0, [0, 2, 3]])
    # Its embedding being gone, only its rows tell one dropped token from another.
    other = run(tokens.at[0, 1].set(9), dropped)
    first_stem = config.stem_layers[0]
    np.testing.assert_array_equal(other[first_stem], seen[first_stem])
    assert np.abs(other[first_stem + 1] - seen[first_stem + 1])[0, 1].max() > 1e-3
    # None dropped, as in generation: the vector plays no part.
    np.testing.assert_array_equal(run(tokens, jnp.zeros((1, 4), bool))[-1], plain[-1])


def test_the_share_and_the_seed(train_step, make_batch):
    step = train_step(**RATE)
    tokens = jnp.zeros((2, 64, 256), jnp.int32)
    first, second = (np.asarray(step._dropped(jnp.int32(n), tokens)) for n in (0, 1))
    for dropped in (first, second):
        # Six standard deviations of a binomial.
        assert abs(dropped.mean() - 0.3) < 6 * (0.3 * 0.7 / tokens.size) ** 0.5
    assert abs((first == second).mean() - (0.3**2 + 0.7**2)) < 0.02
    np.testing.assert_array_equal(first, step._dropped(jnp.int32(0), tokens))
    other = train_step(**RATE, **{"train.seed": 1})
    assert (np.asarray(other._dropped(jnp.int32(0), tokens)) != first).any()


@pytest.mark.parametrize("stem_layers", ["all_but_first", "none"])
def test_the_vector_is_trained_and_counted(train_step, make_batch, stem_layers):
    step = train_step(**RATE, **{"model.stem_layers": stem_layers})
    _, state = _losses(step, make_batch)
    start = init_state(step.blueprint)
    assert np.abs(state.params["embed.dropped"] - start.params["embed.dropped"]).max() > 0
    counted = count_parameters(step.config).active
    assert sum(array.size for array in start.params.values()) == counted


def test_it_changes_training_and_not_validation(train_step, make_batch):
    step, plain = train_step(**RATE), train_step()
    assert _losses(step, make_batch)[0] != _losses(plain, make_batch)[0]
    state = init_state(step.blueprint)
    without = init_state(plain.blueprint)
    assert "embed.dropped" not in without.params
    schedule = make_schedule(step.config, 1)
    kept = {name: state.params[name] for name in without.params}
    for name, array in without.params.items():
        assert array.shape == kept[name].shape
    total, count = step.evaluate(state, make_batch(step), schedule)
    import dataclasses

    same = dataclasses.replace(without, params=kept, tables=state.tables)
    expected, _ = plain.evaluate(same, make_batch(plain), schedule)
    assert float(total) == float(expected) and int(count) > 0


@pytest.mark.long
def test_meshes_and_micro_batches_drop_the_same(train_step, make_batch):
    losses, _ = _losses(train_step(**RATE), make_batch)
    spread, _ = _losses(train_step((2, 2, 2), **RATE), make_batch)
    np.testing.assert_allclose(spread, losses, rtol=0, atol=1e-5)
    parts, _ = _losses(train_step(**RATE, **{"train.micro_batches": 2}), make_batch)
    np.testing.assert_allclose(parts, losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refused_rates(tiny_config, rate):
    from stem_jax.config_checks import validate

    with pytest.raises(InputError, match=f"model.token_embedding_dropout={rate} must be in"):
        validate(tiny_config(**{"model.token_embedding_dropout": rate}))
