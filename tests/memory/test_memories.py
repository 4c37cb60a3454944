"""A second memory beside STEM's: two keys for a token, three vectors, a reader with a state.

Nothing of the package knows of it but the dicts of memories and readers, which the tests fill.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stem_jax.checkpoints import item_handlers
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.generation.generator import Generator
from stem_jax.memory import catalogue
from stem_jax.memory.memory import NO_TOKEN
from stem_jax.mesh import constrain_tokens
from stem_jax.model.cache import NewCache
from stem_jax.model.inputs import Inputs
from stem_jax.model.kind import LayerCost
from stem_jax.model.layers import Linear
from stem_jax.model.memory_rows import MemoryRows
from stem_jax.model.reader import BEFORE_ATTENTION, Reader
from stem_jax.model.readers import READERS
from stem_jax.model.row_reads import RowReads
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import OffloadedRows
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.row_source import ResidentRows
from stem_jax.tables.spec import TableState
from stem_jax.training.look_ahead import LookAhead
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state, table_key
from stem_jax.training.step import TrainStep
from tests.offloading import SIZES, store_arrays, zipf_data

STEPS = 2
KEYS = 3000


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Keys of a token with the one before it, and with the one before that."""

    name: str = "pairs"
    num_keys: int = KEYS
    vectors: int = 3
    width: int = 16
    reach: int = 2
    reader: str = "pairs"

    def keys(self, tokens_BxL, segment_ids_BxL, before_BxR=None):
        xp = jnp if isinstance(tokens_BxL, jax.Array) else np
        if before_BxR is None:
            before_BxR = xp.full((*tokens_BxL.shape[:-1], 2), NO_TOKEN)
        both = xp.concatenate([before_BxR, tokens_BxL], -1)
        # Those before are of the document that goes on.
        first = xp.repeat(segment_ids_BxL[..., :1], 2, -1)
        segments = xp.concatenate([first, segment_ids_BxL], -1)
        found = []
        for by, factor in ((1, 7), (2, 31)):
            there = slice(2 - by, both.shape[-1] - by)
            is_same = (segments[..., there] == segment_ids_BxL) & (both[..., there] != NO_TOKEN)
            found.append((tokens_BxL + factor * xp.where(is_same, both[..., there], 0)) % KEYS)
        return xp.stack(found, -1)

    def reads(self, layer: int):
        # One layer reads one of a token's keys alone, and the last vector nobody.
        return {0: (slice(0, 2), 1), 1: (slice(1, 2), 0)}.get(layer)


class PairsReader(Reader):
    """x_t + W (r_t + r_{t-1}), r the sum of a token's rows; the state is r of the last token."""

    site = BEFORE_ATTENTION

    def __init__(self, kernel: Linear, mesh):
        self.proj, self.mesh = kernel, mesh

    @classmethod
    def of(cls, config, memory, mesh, *, rngs: nnx.Rngs):
        D = config.model.embed_dim
        return cls(Linear((memory.width, D), ("memory", "embed"), 1.0, 3.0, rngs=rngs), mesh)

    @classmethod
    def weights_of(cls, config, memory):
        return {"proj.kernel": (memory.width, config.model.embed_dim)}

    @classmethod
    def cost_of(cls, config, memory):
        size = memory.width * config.model.embed_dim
        return LayerCost(size, size, size, 0)

    def __call__(self, x_BxLxD, embedded_BxLxD, rows_BxLxKxF, segment_ids_BxL, state):
        sums_BxLxF = rows_BxLxKxF.sum(2)
        if state is None:
            state = jnp.zeros_like(sums_BxLxF[:, 0])
        before = jnp.concatenate([state[:, None], sums_BxLxF[:, :-1]], 1)
        segments = jnp.pad(segment_ids_BxL, ((0, 0), (1, 0)), "edge")[:, :-1]
        before = jnp.where((segments == segment_ids_BxL)[..., None], before, 0)
        y = constrain_tokens(self.proj(sums_BxLxF + before), self.mesh)
        last_B = jnp.maximum(jnp.sum(segment_ids_BxL != 0, 1) - 1, 0)
        return x_BxLxD + y, jnp.take_along_axis(sums_BxLxF, last_B[:, None, None], 1)[:, 0]


@pytest.fixture
def make_step(monkeypatch, tiny_config, device_mesh):
    """make_step(shape, **overrides): a step of a model with both memories."""
    monkeypatch.setitem(catalogue._MEMORIES, "pairs", lambda config: Pairs())
    monkeypatch.setitem(catalogue._INIT_STD, "pairs", lambda config: 0.1)
    monkeypatch.setattr(item_handlers, "MEMORIES", ("stem", "pairs"))
    monkeypatch.setitem(READERS, "pairs", PairsReader)

    def make(shape=(1, 1, 1), **overrides):
        return TrainStep(tiny_config(**SIZES | overrides), device_mesh(shape))

    return make


def _trained(step, steps: int = STEPS):
    """The state after some steps, with rows wherever they are; and what was logged."""
    config, mesh = step.config, step.mesh
    state, stores, records = init_state(step.blueprint), {}, []
    for name, spec in step.reads.specs.items():
        if spec.offloaded:
            stores[name] = HostStore.create(spec, table_key(config, name), mesh)
    moving = {name: Prefetch(mesh, store, "lfu", 1) for name, store in stores.items()}
    try:
        loaded = {name: TableState(**prefetch.load()) for name, prefetch in moving.items()}
        state = dataclasses.replace(state, tables=state.tables | loaded)
        batches = zipf_data(config).batches
        placed = (step.place(batches.batch(number)) for number in range(steps))
        ahead = LookAhead(step, placed, steps, moving)
        schedule = make_schedule(config, steps + 1)
        for ready in ahead:
            state = ahead.place(state, ready)
            state, metrics = step.update(state, ready.batch, schedule, ready.slots, ready.sizes)
            records.append(jax.device_get(metrics) | ready.metrics)
        for name, prefetch in moving.items():
            prefetch.write_back(vars(state.tables[name]))
    finally:
        for prefetch in moving.values():
            prefetch.close()
    return state, stores, records


@pytest.fixture
def alone(make_step):
    """A step on one device, and its state after some."""
    step = make_step()
    return step, *_trained(step)


def test_its_rows_are_those_that_tokens_asked_for(alone):
    step, state, _, records = alone
    batches = zipf_data(step.config).batches
    asked = set()
    for number in range(STEPS):
        batch = batches.batch(number)
        keys = Pairs().keys(batch["tokens"], batch["segment_ids"])
        asked |= set(keys[batch["segment_ids"] > 0].reshape(-1).tolist())
    rows = step.reads.specs["pairs"].layout.row_numbers(np.array(sorted(asked)))
    touched = np.flatnonzero(np.asarray(state.tables["pairs"].last_step))
    assert sorted(rows.tolist()) == touched.tolist()
    fresh = init_state(step.blueprint).tables["pairs"].rows
    moved = np.any(np.asarray(state.tables["pairs"].rows) != np.asarray(fresh), axis=(0, 2))
    assert sorted(rows.tolist()) == np.flatnonzero(moved).tolist()
    # Metrics of each memory under its own name, and a norm of its own.
    assert records[-1]["pairs/never_touched_rows"] == KEYS - len(asked)
    assert records[-1]["pairs_grad_norm"] > 0 and records[-1]["table_grad_norm"] > 0
    assert "table/distinct_rows" in records[-1] and "pairs/distinct_rows" in records[-1]


@pytest.mark.long
@pytest.mark.little_effort
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_it_is_the_same_on_every_mesh(alone, make_step, shape):
    _, expected, _, losses = alone
    state, _, found = _trained(make_step(shape))
    for one, other in zip(found, losses, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
    for name, table in expected.tables.items():
        np.testing.assert_allclose(state.tables[name].rows, table.rows, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), pytest.param((2, 2, 2), marks=[pytest.mark.long, pytest.mark.little_effort])],
)
def test_rows_in_host_memory_are_the_resident_ones(make_step, shape):
    state, _, losses = _trained(make_step(shape))
    _, stores, found = _trained(make_step(shape, **{"tables.resident_rows": 512}))
    assert [float(one["loss"]) for one in found] == [float(one["loss"]) for one in losses]
    assert {"table/row_hit_rate", "pairs/row_hit_rate"} <= found[0].keys()
    for name, store in stores.items():
        whole = store_arrays(store)["rows"]
        np.testing.assert_array_equal(
            whole, np.asarray(state.tables[name].rows).swapaxes(0, 1), err_msg=name
        )


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.long)])
def test_its_checkpoint_comes_back(alone, make_step, tmp_path, shape):
    step, state, _, _ = alone
    touched = {name: int(n) for name, n in state.touched_rows.items()}
    info = CheckpointInfo(STEPS, STEPS, 0, touched, "none", {}, step.config)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()
        items = {path.name for path in (tmp_path / "checkpoints" / str(STEPS)).iterdir()}
        assert {"table_rows", "table_slots", "pairs_rows", "pairs_moments"} <= items
        assert checkpoints.info(STEPS).touched_rows == touched
        found = checkpoints.restore(STEPS, abstract_state(make_step(shape).blueprint))
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.long)])
def test_it_does_not_matter_who_looks_rows_up(make_step, monkeypatch, shape):
    """Each layer its own, as STEM's do, or all of them ahead of the layers."""
    _, _, expected = _trained(make_step(shape))
    monkeypatch.setattr(RowReads, "_is_shared", lambda self, name: True)
    _, _, found = _trained(make_step(shape))
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "table_grad_norm", "pairs_grad_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)


@pytest.mark.parametrize(
    "reads",
    [
        {0: (slice(0, 1), 0), 1: (slice(1, 2), 0), 2: (slice(0, 1), 0)},
        {0: (slice(0, 2), 1), 1: (slice(0, 2), 0), 2: (slice(0, 2), 2)},
    ],
    ids=["ahead", "each its own"],
)
def test_scanned_layers_read_the_same(make_step, monkeypatch, reads):
    monkeypatch.setattr(Pairs, "reads", lambda self, layer: reads.get(layer))
    keys = {"model.num_layers": 3, "model.stem_layers": "none"}
    _, _, expected = _trained(make_step(**keys))
    _, _, found = _trained(make_step(**keys, **{"model.scan_layers": True}))
    for one, other in zip(found, expected, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
        assert float(one["pairs_grad_norm"]) == pytest.approx(
            float(other["pairs_grad_norm"]), rel=1e-4
        )


@pytest.mark.parametrize(
    ("shape", "offloaded"),
    [
        pytest.param((1, 1, 1), False, id="resident"),
        pytest.param((1, 1, 1), True, id="offloaded"),
        pytest.param((8, 1, 1), False, id="data", marks=pytest.mark.long),
        pytest.param((2, 2, 2), False, id="all axes", marks=pytest.mark.long),
    ],
)
def test_decoding_goes_on_where_the_prompt_ended(make_step, shape, offloaded):
    """Token by token, the logits of whole sequences: keys and states reach back over the cut."""
    step, B = make_step(shape), shape[0] * shape[1] * (2 if shape[0] == 1 else 1)
    config, specs, mesh = step.config, step.reads.specs, step.mesh
    state = init_state(step.blueprint)
    rows = {name: ResidentRows(state.tables[name].rows, specs[name], mesh) for name in specs}
    tokens_BxL = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, 12), np.int32)
    ones = jnp.ones_like(tokens_BxL)
    memory_rows = MemoryRows(step.reads.memories, rows)

    def whole(params, served):
        model = step.model.bind(params)
        blocks, index = memory_rows.blocks(served, jnp.asarray(tokens_BxL), ones, "float32")
        positions = jnp.broadcast_to(jnp.arange(12), (B, 12))
        return model.logits(model(Inputs(tokens_BxL, positions, ones, index), blocks).hidden)

    expected_BxLxV = jax.jit(whole)(state.params, memory_rows.serve(tokens_BxL))
    if offloaded:
        config = dataclasses.replace(
            config, tables=dataclasses.replace(config.tables, resident_rows=64)
        )
        few = catalogue.table_specs(config)
        stores = {
            name: HostStore.create(spec, table_key(config, name), step.mesh, moments=False)
            for name, spec in few.items()
        }
        rows = {name: OffloadedRows(store, step.mesh, "lfu") for name, store in stores.items()}
    generator = Generator(config, state.params, rows, None, mesh)
    served = MemoryRows(step.reads.memories, rows)
    lengths_B, advance = np.resize([3, 7], B).astype(np.int32), jax.jit(generator.advance)
    segments = (np.arange(8) < lengths_B[:, None]).astype(np.int32)
    prompts = np.where(segments > 0, tokens_BxL[:, :8], 0)
    caches = [NewCache(16)] * config.model.num_layers
    logits, read = advance(
        state.params, served.serve(prompts, segments), prompts, lengths_B, caches
    )
    for number in range(4):
        places_B = lengths_B + number
        for b, place in enumerate(places_B):
            np.testing.assert_allclose(logits[b], expected_BxLxV[b, place - 1], atol=1e-4)
        token = np.take_along_axis(tokens_BxL, places_B[:, None], 1)
        next_rows = served.serve(token, before_BxR=read[2])
        logits, read = advance(state.params, next_rows, token, np.ones(B, np.int32), *read)
    for source in rows.values():
        source.close()
