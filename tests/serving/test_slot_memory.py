"""Slots that do not fit into memory are refused with figures, before anything is compiled."""

import jax
import pytest
from jax.sharding import PartitionSpec

from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.serving import slot_memory
from stem_jax.serving.engine import Engine
from stem_jax.serving.slot_memory import check_slots, device_bytes, free_bytes
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state

CONTEXT = 48


@pytest.fixture(scope="module")
def engine(tiny_config, device_mesh):
    config = tiny_config(**{"train.seq_len": CONTEXT, "mesh.data": 1})
    mesh = device_mesh((1, 1, 1))
    state = init_state(Blueprint(config, mesh))
    rows = ResidentRows(state.tables["stem"].rows, table_specs(config)["stem"], mesh)
    return Engine(config, state.params, {"stem": rows}, None, mesh, slots=6)


def test_bytes_on_a_device(device_mesh):
    mesh = device_mesh((2, 2, 2))
    divided = jax.NamedSharding(mesh, PartitionSpec("data", "tensor"))
    shapes = {
        "divided": jax.ShapeDtypeStruct((8, 6, 3), "bfloat16", sharding=divided),
        "whole": jax.ShapeDtypeStruct((5,), "int32"),
    }
    assert device_bytes(shapes) == 8 * 6 * 3 * 2 // 4 + 20


def test_slots_that_do_not_fit_are_refused_before_compiling(engine, monkeypatch):
    model = engine.generator.config.model
    width = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    caches = 6 * CONTEXT * width * 4
    monkeypatch.setattr(slot_memory, "available_host_bytes", lambda: caches // 2)
    with pytest.raises(InputError) as said:
        engine.start()
    assert str(said.value).startswith(
        f"--slots=6, each of {CONTEXT} tokens, take {caches / 2**30:.2f} GiB on each device, which "
    )
    # What a slot has beside its cache counts, too.
    assert "give --slots=2 or fewer, " in str(said.value)
    assert engine._programs.compiled == 0 and not engine.ready


def test_what_devices_have_left():
    class Gpu:
        platform = "gpu"

        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    full, empty = ({"bytes_limit": 100, "bytes_in_use": used} for used in (70, 10))
    assert free_bytes([Gpu(full), Gpu(empty)]) == 30
    assert free_bytes([Gpu(None), Gpu({"bytes_in_use": 1})]) is None
    check_slots(10**15, None, 8, 64)
    check_slots(30, 30, 8, 64)
    with pytest.raises(InputError, match=r"GiB left; a larger device or more of them"):
        check_slots(31 * 8, 30, 8, 64)
