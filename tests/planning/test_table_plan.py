"""Plans of the tables alone: their figures by hand, at any size, and what is said of them."""

import importlib.util
import json
import math
import tracemalloc

import numpy as np
import pytest

from stem_jax import plan
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.errors import InputError
from stem_jax.hardware import Chip
from stem_jax.memory.catalogue import memories, table_specs
from stem_jax.mesh import make_mesh
from stem_jax.planning import table_load, table_plan
from stem_jax.planning.distinct_rows import step_distinct_rows
from stem_jax.planning.plan_text import as_text, verdict
from stem_jax.planning.table_load import host_bytes
from stem_jax.planning.table_plan import plan_tables
from stem_jax.planning.topology import Topology
from stem_jax.run_checks import check_mesh

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU topologies"
)

# Two hashes of one order in one layer, rows of 8 numbers; 16 tokens on each of 8 devices.
NGRAM = {
    "model.stem_layers": "none",
    "ngram.layers": (1,),
    "ngram.max_order": 2,
    "ngram.heads": 2,
    "ngram.keys_per_head": 500,
    "ngram.width": 16,
    "ngram.row_format": "bfloat16",
    "ngram.moments": "rowwise",
    "ngram.resident_rows": 256,
    "ngram.eos_id": 87,
    "tables.pad_multiple": 128,
}


def _tables(config, topology="cpu:8", **options):
    return plan_tables(config, Topology.parse(topology), **options)


def test_the_load_of_a_table_by_hand(tiny_config):
    config = tiny_config(**NGRAM, **{"mesh.data": 8})
    assert config.tokens_per_step == 128
    found = _tables(config, hit_rate=0.75)
    load = found.tables["ngram"].load
    # The primes from 500 on are 503 and 509; padded to 1,024 rows of 8 numbers, v and last_step.
    assert (load.num_rows, load.parameters, load.row_bytes) == (1024, 1024 * 8, 8 * 2 + 4 + 4)
    device, host = load.tiers["device"], load.tiers["host"]
    assert (device.rows, device.places, device.bytes) == (256, 8, 256 // 8 * 24)
    assert (host.rows, host.places, host.bytes) == (1024, 1, 1024 * 24)
    assert load.keys == 128 * 2
    for rows, devices in ((load.distinct_step, 8), (load.distinct_device, 1)):
        assert rows == round(1024 * (1 - (1 - 1 / 1024) ** (32 * devices)))
    step = 1024 * (1 - (1 - 1 / 1024) ** 256)
    assert load.distinct_owner == round(step / 8)
    assert load.slots_needed == 8 * math.ceil(step / 8)
    # Of an owner's rows a quarter is missing; its 2 x 32 rows and counts are told.
    assert load.entering_bytes == round(step / 8 / 4 * 24)
    assert load.leaving_bytes == load.entering_bytes + 64 * 8
    # Seven eighths of the slots of one hop: float32 rows there and back; numbers to ask for each,
    # again at the largest size of 8 x 32, with counts.
    slots = found.tables["ngram"].exchange // (8 * 4)
    assert load.exchange_bytes == slots * 7 // 8 * 8 * 4 * 2
    numbers = slots * 7 // 8 * 4 + 8 * 32 * 7 // 8 * 8
    assert load.interconnect_bytes == load.exchange_bytes + numbers
    assert (load.network_bytes, load.link_seconds, found.bounds) == (0, None, None)
    assert "no published peak figures" in as_text(found)


def test_resident_rows_move_nothing_and_tell_hosts_nothing(tiny_config):
    config = tiny_config(**{**NGRAM, "ngram.resident_rows": None, "mesh.data": 8})
    load = _tables(config).tables["ngram"].load
    assert list(load.tiers) == ["device"]
    assert (load.entering_bytes, load.leaving_bytes, load.slots_needed) == (0, 0, 0)
    assert (load.booked_rows, load.books_seconds) == (0, 0)


def test_rows_beyond_host_rows_lie_on_disk(tiny_config):
    keys = {"ngram.host_rows": 512, "tables.disk": "/nowhere", "mesh.data": 8}
    found = _tables(tiny_config(**NGRAM, **keys))
    tiers = found.tables["ngram"].load.tiers
    assert [(name, t.rows, t.places, t.bytes) for name, t in tiers.items()] == [
        ("device", 256, 8, 256 // 8 * 24),
        ("host", 512, 1, 512 * 24),
        ("disk", 1024, 1, 1024 * 24),
    ]
    assert found.tables["ngram"].host == 512 * 24
    assert "1,024 on disk: 0.0 MiB of each of 1 hosts" in as_text(found)


def test_without_a_stated_hit_rate_rows_are_asked_for_evenly(tiny_config):
    load = _tables(tiny_config(**NGRAM, **{"mesh.data": 8})).tables["ngram"].load
    assert load.hit_rate == 256 / 1024
    with pytest.raises(InputError, match=r"--hit-rate=1\.5 must be from 0 to 1"):
        _tables(tiny_config(**NGRAM, **{"mesh.data": 8}), hit_rate=1.5)


def test_the_slowest_binds_and_unknown_wires_are_not_counted(tiny_config, monkeypatch):
    config = tiny_config(**NGRAM, **{"mesh.data": 8})
    fast = {"host_memory": 1e9, "host_link": 1e12}
    chips: dict[str, Chip] = {
        "compute": Chip("X", 1e6, 2**30, 1e12, 4, 10e9, None, "a test", **fast),
        "interconnect": Chip("X", 1e15, 2**30, 1e12, 4, 1e3, None, "a test", **fast),
        "link": Chip("X", 1e15, 2**30, 1e12, 4, 10e9, None, "a test", host_link=1e3),
    }
    for name, chip in chips.items():
        monkeypatch.setattr(table_plan, "chip_of", lambda device, chip=chip: chip)
        found = _tables(config)
        assert found.bounds.binds == name
        load = found.tables["ngram"].load
        assert load.link_seconds == max(load.entering_bytes, load.leaving_bytes) / chip.host_link
        assert f"what binds: {name};" in as_text(found)
    # The one process books the rows of all owners.
    monkeypatch.setattr(table_load, "_BOOK_SECONDS", 1e3)
    found = _tables(config)
    assert found.bounds.binds == "books"
    assert load.booked_rows == load.distinct_step
    assert found.bounds.books == pytest.approx(1e3 * load.booked_rows, rel=1e-2)


def test_too_few_slots_are_named_and_too_little_memory_refused(tiny_config, monkeypatch):
    config = tiny_config(**{**NGRAM, "ngram.resident_rows": 128, "mesh.data": 8})
    assert "such a batch needs resident_rows of ngram of 232 or more" in as_text(_tables(config))
    small = Chip("X", 1e12, 2**30, 1e12, 4, 1e9, None, "a test", host_memory=1000.0)
    monkeypatch.setattr(table_plan, "chip_of", lambda device: small)
    found = _tables(config)
    assert not found.fits and found.remedies[0] == "a larger topology"
    assert "tables alone does not fit cpu:8; tables need 0.0 MiB of the 0.0 MiB of a host" in (
        verdict(found)
    )
    full = Chip("X", 1e12, 100, 1e12, 4, 1e9, None, "a test")
    monkeypatch.setattr(table_plan, "chip_of", lambda device: full)
    assert _tables(config).remedies[0].startswith("fewer ngram.resident_rows")


def test_distinct_rows_are_counted_in_a_token_store(tiny_config, tmp_path, device_mesh):
    """A text of two tokens in turn has two bigrams, and a third behind eos."""
    folder = tmp_path / "text"
    fields = {"fingerprint": "f" * 64, "bos_id": 86, "eos_id": 87, "name": "n", "split": "train"}
    with TokenStoreWriter(folder / "train", vocab_size=88, **fields) as writer:
        writer.add([5, 6] * 400, num_bytes=800)
    config = tiny_config(**{**NGRAM, "mesh.data": 8, "data.sources": str(folder)})
    found = step_distinct_rows(config, device_mesh((8, 1, 1)))["ngram"]
    memory = memories(config)["ngram"]
    # A row begins as behind eos, with any of the four; the text has one document.
    text, same = np.array([[86, 5, 6, 5, 6, 87]]), np.ones((1, 6), np.int64)
    firsts = text.reshape(-1, 1)
    keys = {int(key) for key in memory.keys(text, same).flat}
    keys |= {int(key) for key in memory.keys(firsts, np.ones_like(firsts)).flat}
    assert found.origin == f"counted in the first batch of {folder}"
    assert found.keys == 16 * 2
    # Two bigrams and two beginnings are in every batch of eight rows, about.
    assert 6 <= found.of(8) <= len(keys)
    assert found.of(1) < found.of(8)
    few = tiny_config(**{**NGRAM, "train.global_batch_size": 512, "data.sources": str(folder)})
    origin = step_distinct_rows(few, device_mesh((8, 1, 1)))["ngram"].origin
    assert origin.endswith("a bound; data.sources have fewer tokens than a step")


# --- Pods ---


@libtpu
@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp",)])
def test_slices_share_the_rows_or_have_copies(tiny_config, axes):
    """Two slices of a host each: half of the rows on a host, or all."""
    config = tiny_config(
        **NGRAM,
        **{"mesh.data": 2, "mesh.fsdp": 4, "tables.vocab_axes": axes},
        **{"model.compute_dtype": "bfloat16"},
    )
    topology = Topology.parse("v5p:2x2x1", 2)
    mesh = make_mesh(config.mesh, topology.devices())
    spec = table_specs(config)["ngram"]
    shared = "data" in axes
    assert (
        list(host_bytes(spec, mesh, spec.num_rows).values())
        == [1024 * 24 // (2 if shared else 1)] * 2
    )
    found = plan_tables(config, topology).tables["ngram"]
    assert found.host == 1024 * 24 * (1 if shared else 2)
    load = found.load
    # Of either host's process: four of eight owners, or all four.
    step = 1024 * (1 - (1 - 1 / 1024) ** 256)
    assert load.booked_rows == round(step / (2 if shared else 1))
    if shared:
        # Half of the last hop's slots: bfloat16 rows there, float32 sums back, a number to ask for
        # each; at the largest size numbers and counts.
        planned = table_plan.planned_tables(config, mesh, step_distinct_rows(config, mesh))
        exchange = planned["ngram"].exchange
        largest = planned["ngram"].largest_sizes
        between = exchange.capacities[1] * (8 * (2 + 4) + 4) + largest.pairs[1] * 8
    else:
        # Both copies sum what they have; first they tell each other which rows.
        largest = 256
        between = found.owned_rows * (8 * 4 + 4) + largest * 8
    assert load.network_bytes == round(between)
    assert load.network_seconds == pytest.approx(load.network_bytes / 6.25e9)


TERA = {
    # Rows of 160 and of 512, 32 hashes of both.
    "51": (10_000_000, 2560, 320_000_000, 160),
    "1000": (61_036_000, 8192, 1_953_152_000, 512),
}


@libtpu
@pytest.mark.parametrize("name", TERA)
def test_huge_tables_take_no_memory_to_plan(name, capsys):
    keys, width, rows, numbers = TERA[name]
    tracemalloc.start()
    plan.main(
        [
            "--config=configs/dense_1b.py",
            "--topology=v5p:8x8x8",
            "--tables",
            "--json",
            "--config.ngram.layers=1,8",
            f"--config.ngram.keys_per_head={keys}",
            f"--config.ngram.width={width}",
            "--config.ngram.row_format=bfloat16",
            "--config.ngram.moments=rowwise",
            "--config.ngram.resident_rows=134217728",
            "--config.tables.pad_multiple=1024",
        ]
    )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A byte for each row were 305 MiB.
    assert most < 2**26
    found = json.loads(capsys.readouterr().out)
    load = found["tables"]["ngram"]["load"]
    assert rows < load["num_rows"] < rows * 1.0001
    assert load["parameters"] == pytest.approx(rows * numbers, rel=1e-4)
    host = load["tiers"]["host"]
    assert (host["places"], host["capacity"]) == (128, 448_000_000_000)
    assert host["bytes"] == load["num_rows"] // 128 * (2 * numbers + 8)
    # 131,072 keys of a device, of which few have fallen together.
    assert load["keys"] == 512 * 131_072
    assert 131_000 < load["distinct_device"] < 131_072


def test_flags_of_what_is_compiled_are_wrong(capsys):
    with pytest.raises(SystemExit) as status:
        plan.main(["--config=configs/tiny.py", "--topology=cpu:8", "--tables", "--account"])
    assert status.value.code == 2
    assert "--tables compiles nothing" in capsys.readouterr().err


def test_rows_in_host_memory_divide_over_their_shards_too(tiny_config, device_mesh):
    """So many as there are slots may, where all do not."""
    config = tiny_config(**{**NGRAM, "mesh.data": 8, "tables.pad_multiple": 3})
    message = (
        r"ngram\.resident_rows keeps all rows in host memory, whose number=1026 does not divide "
        r"over the 8 devices of mesh axis data, fsdp; make tables\.pad_multiple a multiple"
    )
    with pytest.raises(InputError, match=message):
        _tables(config)
    with pytest.raises(InputError, match=message):
        check_mesh(config, device_mesh((8, 1, 1)))
