"""The parameters that a run begins with: the same bits wherever they lie, from a few programs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from stem_jax.model import layers
from stem_jax.model.layer_plan import by_layer
from stem_jax.training.blueprint import Blueprint, ModelDef
from stem_jax.training.state import init_state

pytestmark = pytest.mark.optimized

# First and last number of some parameters, as one program for all of them drew them.
KEPT = {
    "embed.weight": (0.1961222, 0.2557559),
    "embed.dropped": (0.080048, -0.08893867),
    "blocks.0.ffn.up_proj.kernel": (0.023050873, -0.23798746),
    "blocks.2.ffn.down_proj.kernel": (0.17689452, 0.022496946),
    "head.kernel": (0.117593184, -0.22075659),
}


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(**{"train.seed": 7, "model.token_embedding_dropout": 0.1})


def test_a_seed_gives_the_parameters_that_it_gave(config):
    params = ModelDef(config).init()
    for name, (first, last) in KEPT.items():
        found = np.asarray(params[name]).ravel()
        # Other CPUs may multiply and add in one rounding.
        np.testing.assert_allclose(found[[0, -1]], [first, last], rtol=3e-7, err_msg=name)


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.long), (2, 2, 2)])
def test_the_bits_of_one_program_for_all_in_their_places(config, shape, device_mesh):
    mesh = device_mesh(shape)
    blueprint = Blueprint(config, mesh)
    model = blueprint.model
    params, specs = init_state(blueprint).params, model.specs()
    together = jax.jit(model.init)()
    assert params.keys() == together.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, together[name], err_msg=name)
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), value.ndim)
        assert value.committed


@pytest.mark.parametrize("scanned", [False, True])
def test_by_name_the_bits_are_of_no_mesh_and_no_stack(tiny_config, device_mesh, scanned):
    by_name = {"train.init": "name", "value.layers": "all", "model.num_layers": 4}
    config = tiny_config(**by_name, **{"model.scan_layers": scanned})
    alone = ModelDef(tiny_config(**by_name)).init()
    blueprint = Blueprint(config, device_mesh((2, 2, 2)))
    params, specs = by_layer(init_state(blueprint).params), blueprint.model.specs()
    assert params.keys() == alone.keys()
    assert scanned == (len(blueprint.model.state_names) < len(alone))
    for name, value in alone.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
        if not scanned:
            place = NamedSharding(blueprint.mesh, specs[name])
            assert params[name].sharding.is_equivalent_to(place, value.ndim)


def test_programs_are_as_many_as_shapes(tiny_config):
    """One program for all took minutes to compile for a GPU: 224 draws at the 350M shape."""

    def programs(num_layers: int) -> int:
        layers._sampler.cache_clear()
        ModelDef(tiny_config(**{"model.num_layers": num_layers})).init()
        return layers._sampler.cache_info().currsize

    # Embedding and head, q and k or v, o, gate and up, and down.
    assert programs(3) == programs(6) <= 8
