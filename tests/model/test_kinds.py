"""Kinds of layers: which layer is of which, what one costs, and what it gives beside its output."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.config import layer_fields, layer_lists
from stem_jax.config_file import config_from_json
from stem_jax.errors import InputError
from stem_jax.model import feed_forward
from stem_jax.model.cost import count_parameters, decode_reads, forward_flops_per_token
from stem_jax.model.feed_forward import KINDS, kinds_of
from stem_jax.model.ffn import DenseFFN
from stem_jax.model.kind import Aux
from stem_jax.model.layer_plan import layer_kinds, repeating_groups, with_layers
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep


def test_layers_that_no_key_lists_are_dense(tiny_config):
    assert layer_kinds(tiny_config().model) == ("dense", "stem", "stem")
    assert kinds_of(tiny_config().model) == [KINDS["dense"], KINDS["stem"], KINDS["stem"]]


def test_every_kind_but_dense_has_a_key_that_lists_its_layers():
    assert set(layer_fields()) == set(KINDS) - {"dense"}


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=12))
def test_a_model_of_these_kinds_has_them(tiny_config, kinds):
    model = with_layers(tiny_config().model, kinds)
    assert layer_kinds(model) == tuple(kinds)
    assert model.num_layers == len(kinds)


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=10))
def test_equal_places_of_groups_are_of_one_kind(tiny_config, kinds):
    groups = repeating_groups(layer_kinds(with_layers(tiny_config().model, kinds)))
    if groups is not None:
        for place in groups.places:
            assert len({kinds[layer] for layer in groups.layers(place)}) == 1


REFUSED = [
    ((3,), "KEY=(3,) is out of range; layers count from 0 to 2 (model.num_layers=3)"),
    ((-1,), "KEY=(-1,) is out of range"),
    ((1, 1), "KEY=(1, 1) must be increasing, each layer once"),
    ((2, 1), "KEY=(2, 1) must be increasing"),
    ((), 'KEY is empty; write "none"'),
    ("1,x", "KEY='1,x' is neither one of none, third, half"),
]


@pytest.mark.parametrize("key", layer_lists())
@pytest.mark.parametrize(("layers", "message"), REFUSED)
def test_layers_are_refused_by_the_key_that_lists_them(tiny_config, key, layers, message):
    with pytest.raises(InputError) as refusal:
        tiny_config(**{"model.stem_layers": "none", key: layers})
    assert message.replace("KEY", key) in str(refusal.value)


@pytest.mark.parametrize("key", layer_lists())
def test_lists_of_layers_survive_a_text(tiny_config, key):
    for layers in ((0, 2), "none"):
        config = tiny_config(**{"model.stem_layers": "none", key: layers})
        assert config_from_json(config.to_json()) == config


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_counts_the_parameters_that_it_makes(tiny_config, kind):
    model = with_layers(tiny_config().model, ["dense", kind, kind])
    config = dataclasses.replace(tiny_config(), model=model)
    shapes = {name: value.shape for name, value in ModelDef(config).shapes().items()}
    prefix = "blocks.2.ffn."
    made = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    assert made == KINDS[kind].weights(model)
    cost = KINDS[kind].cost(model)
    assert cost.parameters == sum(map(math.prod, made.values()))
    count = count_parameters(config)
    assert count.active + count.idle == sum(map(math.prod, shapes.values()))
    assert count.table == model.vocab_size * model.num_stem_layers * model.ffn_dim


def test_costs_of_whole_models_are_what_they_were(tiny_config):
    """D 32, F 48, heads of 8 (4 and 2), V 88, 3 layers of which 2 read rows; counted by hand."""
    config = tiny_config()
    attention = 2 * 32 * 4 * 8 + 2 * 32 * 2 * 8
    ffn = (3 + 2 + 2) * 32 * 48
    active = 3 * attention + ffn + 7 * 32 + 2 * 88 * 32
    count = count_parameters(config)
    assert dataclasses.astuple(count) == (active, 88 * 2 * 48, active + 2 * 48, 0)
    assert count.total == active + 88 * 2 * 48
    head, scores = 2 * 88 * 32, 2 * 2 * 10 * 4 * 8
    assert forward_flops_per_token(config, 10) == 2 * 3 * attention + 3 * scores + 2 * ffn + head
    reads = decode_reads(config, 16)
    assert (reads.backbone, reads.row) == (active - 87 * 32, 2 * 48)


def test_an_aux_of_nothing_has_no_arrays():
    assert jax.tree.leaves(Aux() + Aux()) == []
    assert jax.tree.leaves((Aux() / 3).summed()) == []
    one = Aux(np.float32(2), {"a": np.float32(1)})
    total = Aux() + one + Aux(None, {"a": np.float32(4), "b": np.float32(3)})
    assert (total.loss, total.metrics) == (2, {"a": 5, "b": 3})


class Talking(DenseFFN):
    """A dense layer that gives the mean of its squared output as a loss, and counts its calls."""

    def __call__(self, x_BxLxD, read):
        y_BxLxD, _ = super().__call__(x_BxLxD, read)
        loss = jnp.mean(jnp.square(y_BxLxD).astype(jnp.float32))
        return y_BxLxD, Aux(loss, {"talking/layers": jnp.float32(1)})


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.long), True])
def test_aux_of_layers_reaches_loss_and_metrics(tiny_config, device_mesh, make_batch, scan):
    """Under rematerialisation, in scanned layers and over micro-batches."""
    keys = {"model.num_layers": 2, "model.stem_layers": "none", "train.micro_batches": 2}
    keys |= {"model.scan_layers": scan, "model.remat": "full", "optimizer.epsilon": 1.0}
    states, metrics = [], []
    for kind in (DenseFFN, Talking):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(feed_forward.KINDS, "dense", kind)
            step = TrainStep(tiny_config(**keys), device_mesh((1, 1, 1)))
            state = init_state(step.blueprint)
            schedule = make_schedule(step.config, 2)
            state, found = step.update(state, make_batch(step), schedule)
            states.append(jax.device_get(state.params))
            metrics.append(jax.device_get(found))
    assert "talking/layers" not in metrics[0]
    assert metrics[1]["talking/layers"] == pytest.approx(2)
    # The cross-entropy is reported alone; the parameters follow both.
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], abs=1e-6)
    assert metrics[1]["grad_norm"] != pytest.approx(metrics[0]["grad_norm"], rel=1e-5)
