"""Groups of layers: found where they are, and the same model when looped over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.model.layer_plan import LayerGroups, by_layer, layer_kinds, repeating_groups
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.stem_inputs import stem_inputs


@pytest.mark.parametrize(
    ("num_layers", "stem_layers", "groups"),
    [
        (16, "third", LayerGroups(1, 3, 5)),
        (32, "half", LayerGroups(0, 2, 16)),
        (8, "all_but_first", LayerGroups(1, 1, 7)),
        (8, "none", LayerGroups(0, 1, 8)),
        (3, (0,), LayerGroups(1, 1, 2)),
        (2, (1,), None),
    ],
)
def test_groups_of_usual_patterns(tiny_config, num_layers, stem_layers, groups):
    sizes = {"model.num_layers": num_layers, "model.stem_layers": stem_layers}
    assert repeating_groups(layer_kinds(tiny_config(**sizes).model)) == groups


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_groups_repeat_and_no_choice_is_smaller(tiny_config, kinds):
    stem = tuple(layer for layer, is_stem in enumerate(kinds) if is_stem) or "none"
    config = tiny_config(**{"model.num_layers": len(kinds), "model.stem_layers": stem}).model
    groups = repeating_groups(layer_kinds(config))

    def left(first, period, repeats):
        equal = kinds[first : first + period] * repeats
        fits = kinds[first : first + period * repeats] == equal
        return len(kinds) - period * (repeats - 1) if fits else len(kinds)

    every = range(1, len(kinds) + 1)
    best = min(left(f, p, n) for f in range(len(kinds)) for p in every for n in every)
    if groups is None:
        assert best == len(kinds)
    else:
        assert left(groups.first, groups.period, groups.repeats) == best < len(kinds)


@pytest.mark.long
@pytest.mark.little_effort
@pytest.mark.parametrize(("shape", "remat"), [((1, 1, 1), "none"), ((2, 2, 2), "full")])
def test_scanned_layers_train_as_unrolled_ones(train_step, make_batch, shape, remat):
    """Layers d s d s d s s: three groups and one alone, two micro-batches."""
    overrides = {
        "model.num_layers": 7,
        "model.stem_layers": (1, 3, 5, 6),
        "model.remat": remat,
        "train.micro_batches": 2,
        "train.global_batch_size": 16,
    }

    losses, states, programs = {}, {}, {}
    for scan in (False, True):
        step = train_step(shape, **overrides, **{"model.scan_layers": scan})
        schedule = make_schedule(step.config, 4)
        state = init_state(step.blueprint)
        for seed in range(3):
            state, metrics = step.update(state, make_batch(step, seed), schedule)
        losses[scan], states[scan] = float(metrics["loss"]), jax.device_get(state)
        text = step.update.lower(state, make_batch(step), schedule).as_text()
        programs[scan] = text.count("dot_general")
    # The point of it: a group is in the program once.
    assert programs[True] < 0.6 * programs[False]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    scanned = by_layer(states[True].params)
    for name, value in states[False].params.items():
        np.testing.assert_allclose(scanned[name], value, atol=1e-5, err_msg=name)
    rows = states[False].tables["stem"].rows
    np.testing.assert_allclose(states[True].tables["stem"].rows, rows, atol=1e-5)
    assert jnp.any(rows != 0)


def test_a_scan_keeps_the_rows_once(tiny_config):
    """Not once for every group, though the way back reads them again in each."""
    changes = {"model.num_layers": 7, "model.stem_layers": (1, 3, 5), "model.scan_layers": True}
    config = tiny_config(**changes, **{"model.remat": "full"})
    model = ModelDef(config)
    tokens_BxL = jnp.zeros((2, 24), jnp.int32)
    inputs = stem_inputs(tokens_BxL, tokens_BxL, tokens_BxL, tokens_BxL + 1)
    rows_SxUxF = jnp.zeros((3, 40, config.model.ffn_dim))

    def total(params, rows_SxUxF):
        return jnp.sum(model.bind(params)(inputs, {"stem": rows_SxUxF})[0])

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    text = gradients.lower(model.init(), rows_SxUxF).compile().as_text()
    assert f"f32[3,40,{config.model.ffn_dim}]" in text
    assert f"f32[3,3,40,{config.model.ffn_dim}]" not in text
