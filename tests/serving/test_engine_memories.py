"""The engine with every memory, rows in host memory, patches and several devices."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.serving import prompt_parts
from stem_jax.serving.engine import Engine
from stem_jax.serving.request import Request
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import OffloadedRows
from stem_jax.tables.overlaid_rows import OverlaidRows
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state, table_key
from tests.engine_requests import Heard, alone

pytestmark = pytest.mark.little_effort

V, CONTEXT = 88, 48
FEW = {"tables.resident_rows": 32, "ngram.resident_rows": 160}


@pytest.fixture(scope="module")
def make_model(tiny_config, device_mesh):
    """make_model(shape, **overrides): configuration, parameters, first rows and mesh."""

    def make(shape=(1, 1, 1), **overrides):
        config = tiny_config(
            **{
                "model.num_layers": 2,
                "model.stem_layers": (1,),
                "tables.init_std": 1.0,
                "ngram.init_std": 1.0,
                "ngram.layers": (0, 1),
                "ngram.max_order": 3,
                "ngram.heads": 2,
                "ngram.width": 16,
                "ngram.keys_per_head": 900,
                "ngram.eos_id": 5,
                "train.seq_len": CONTEXT,
                "mesh.data": 1,
            }
            | overrides
        )
        mesh = device_mesh(shape)
        state = init_state(Blueprint(config, mesh))
        rng = np.random.default_rng(1)
        params = {
            name: value + 0.3 * rng.normal(size=value.shape).astype(np.float32)
            for name, value in sorted(state.params.items())
        }
        rows = {
            name: ResidentRows(table.rows, table_specs(config)[name], mesh)
            for name, table in state.tables.items()
        }
        return config, params, rows, mesh

    return make


def _requests() -> list[Request]:
    rng = random.Random(2)
    found = []
    for length in (1, 2, 3, 16, 19, 33, 40, 8):
        prompt = tuple(rng.choice([5, *range(6, V)]) for _ in range(length))
        how = Sampling(2.0, 20, 0.95) if length % 2 else Sampling(temperature=0.0)
        found.append(Request(prompt, rng.randrange(4, 8), how, rng.randrange(2**32)))
    return found


def _said(engine) -> list[list[int]]:
    heard = [Heard() for _ in _requests()]
    for request, ears in zip(_requests(), heard, strict=True):
        engine.submit(request, ears)
    return [ears.tokens() for ears in heard]


def _served(*model, slots=4) -> list[list[int]]:
    """What an engine says; nothing compiles once it has begun."""
    compiled = []
    engine = Engine(*model[:3], None, model[3], slots=slots)
    engine.start()
    try:
        jax.monitoring.register_event_duration_secs_listener(
            listen := lambda event, *_, **__: compiled.append(event) if "compile" in event else None
        )
        said = _said(engine)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        engine.close()
    assert engine.failure is None and compiled == []
    return said


@pytest.fixture(scope="module")
def expected(make_model):
    config, params, rows, mesh = make_model()
    generator = Generator(config, params, rows, None, mesh)
    return [alone(generator, request) for request in _requests()]


@pytest.fixture
def in_parts(monkeypatch):
    """Prompts are read 16 tokens at a time: states of readers go on."""
    monkeypatch.setattr(prompt_parts, "_MOST_TOKENS", 16)


@pytest.mark.usefixtures("in_parts")
def test_n_grams_and_their_convolution_go_on(make_model, expected):
    assert _served(*make_model()) == expected


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((1, 1, 2), marks=pytest.mark.long)])
@pytest.mark.usefixtures("in_parts")
def test_rows_in_host_memory(make_model, expected, shape):
    config, params, _, mesh = make_model(shape, **FEW)
    stores = {
        name: HostStore.create(spec, table_key(config, name), mesh, moments=False)
        for name, spec in table_specs(config).items()
    }
    rows = {name: OffloadedRows(store, mesh, "lfu") for name, store in stores.items()}
    assert _served(config, params, rows, mesh) == expected
    with pytest.raises(InputError, match=r"slots=64 .* those of 20; give more --resident-rows"):
        Engine(config, params, rows, None, mesh, slots=64)
    for source in rows.values():
        source.close()


@pytest.mark.long
def test_a_patch_is_read(make_model, expected):
    config, params, rows, mesh = make_model()
    extra = np.random.default_rng(3).normal(size=(1, 1, 48)).astype(np.float32)
    last = _requests()[0].prompt_ids[-1]
    laid = OverlaidRows(rows["stem"], V, 9 * extra, np.array([last]))
    patched = {**rows, "stem": laid}
    generator = Generator(config, params, patched, None, mesh)
    own = [alone(generator, request) for request in _requests()]
    assert _served(config, params, patched, mesh) == own != expected


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1), *(pytest.param(shape, marks=pytest.mark.long) for shape in [(1, 1, 2), (1, 2, 2)])],
)
@pytest.mark.usefixtures("in_parts")
def test_several_devices(make_model, expected, shape):
    config, params, rows, mesh = make_model(shape)
    assert len(jnp.asarray(rows["stem"].rows).sharding.device_set) == mesh.size
    assert _served(config, params, rows, mesh) == expected


def test_slots_divide_over_the_devices(make_model):
    config, params, rows, mesh = make_model((2, 1, 1))
    with pytest.raises(InputError, match="slots=3 must be at least 1 and a multiple of the 2 "):
        Engine(config, params, rows, None, mesh, slots=3)
