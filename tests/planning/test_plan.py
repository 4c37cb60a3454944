"""The planner: it refuses what it must, says what does not fit and why, and plans for TPUs."""

import dataclasses
import importlib.util
import json
import sys

import jax
import pytest

from stem_jax import cli, plan
from stem_jax.errors import InputError
from stem_jax.hardware import CHIPS, Chip
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh
from stem_jax.parts import STEP
from stem_jax.planning import compiled
from stem_jax.planning import plan as plans
from stem_jax.planning.distinct_rows import step_distinct_rows
from stem_jax.planning.plan_text import as_json, as_text
from stem_jax.planning.program import naive_lookup_program, train_step_program
from stem_jax.planning.table_plan import tables_bytes
from stem_jax.planning.topology import KNOWN, Topology
from stem_jax.tables.hops import Hop
from stem_jax.tables.sharded_table import ShardedTable

pytestmark = pytest.mark.optimized

SMALL = {
    "model.num_layers": "2",
    "model.embed_dim": "64",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.ffn_dim": "128",
    "model.vocab_size": "512",
    "train.global_batch_size": "16",
    "train.seq_len": "128",
}


def _chip(hbm_bytes: float) -> Chip:
    return Chip("X", 100e12, hbm_bytes, 1e12, 4, 10e9, 1e9, "a test")


# --- Memory ---

REFUSED = [
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.31G) exceeds available HBM (15.75G).",
        17.31 * 2**30 - 100,
    ),
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
        "memory in memory space hbm. Used 16.01G of 15.75G hbm. Exceeded hbm capacity by 267.97M.\n"
        "\nTotal hbm usage >= 16.26G:\n    reserved        258.03M\n    program          14.84G\n"
        "\nProgram hbm requirement 14.84G:\n    scoped            2.81G\n",
        14.84 * 2**30,
    ),
]


@pytest.mark.parametrize(("message", "temporaries"), REFUSED)
def test_what_a_refusal_says_is_kept(message, temporaries):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    found = compiled.compile_program(plans.Program(Lowered(), 100, None))
    assert (found.refused, found.module, found.buffers) == (message, None, ())
    assert found.memory.arguments == 100
    assert found.memory.temporaries == int(temporaries)


def test_the_compilers_list_of_allocations_is_kept():
    message = """RESOURCE_EXHAUSTED: Used 16.01G of 15.75G hbm.
  Largest program allocations in hbm:

  1. Size: 2.81G
     Operator: op_name="jit(_update)/shard_map/while/body/all_to_all"
     Shape: u8[3014656000]{0}
     Unpadded size: 2.81G
     Tag: scoped memory for all_to_all.50
     XLA label: all_to_all.50 = all-to-all(copy.5855)
     ==========================

  2. Size: 960.00M
     Operator: op_name="jit(_update)/gather"
     Shape: bf16[20480,5,8192]{2,1,0:T(8,128)(2,1)}
     ==========================
"""
    assert compiled._allocations(message) == (
        compiled.Buffer(int(2.81 * 2**30), "u8[3014656000]", "scoped memory for all_to_all.50"),
        compiled.Buffer(960 * 2**20, "bf16[20480,5,8192]", "jit(_update)/gather"),
    )


def test_other_failures_are_not_hidden():
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no such instruction"):
        compiled.compile_program(plans.Program(Lowered(), 100, None))


# --- Topologies ---


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:8x8", "v5e", "", "cpu:7"])
def test_unknown_topologies_list_the_known(name):
    with pytest.raises(InputError, match=f"--topology={name} is unknown; known are v4:2x2x1 ") as e:
        Topology.parse(name)
    for kind in ("v4", "v5e", "v5p", "v6e", "cpu"):
        assert f"{kind}:{' '.join(KNOWN[kind])}" in str(e.value)


@pytest.mark.parametrize(("name", "slices"), [("v5e:8x8", 0), ("cpu:8", 2)])
def test_impossible_slices_are_refused(name, slices):
    with pytest.raises(InputError, match=f"--slices={slices} must be at least 1"):
        Topology.parse(name, slices)


def test_missing_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs libtpu, .*: pip install \"jax\[tpu\]\""):
        Topology.parse("v6e:2x4").devices()


def test_more_cpu_devices_than_there_are():
    with pytest.raises(InputError, match="this process has 8 CPU devices; set XLA_FLAGS="):
        Topology.parse("cpu:64").devices()


def test_every_tpu_has_peak_figures_and_a_source():
    assert all(chip.source.startswith("docs.cloud") for chip in CHIPS if "TPU" in chip.name)
    v5e = next(chip for chip in CHIPS if chip.name == "TPU v5 lite")
    assert v5e.interconnect == 200e9


# --- The program ---


def _main(*flags, overrides=()):
    keys = {**SMALL, **dict(overrides)}
    plan.main(["--config=configs/tiny.py", *flags, *(f"--config.{k}={v}" for k, v in keys.items())])


def test_a_plan_for_cpu_devices(capsys):
    _main("--topology=cpu:8", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["program"], found["chips"], found["fits"]) == ("train step", 8, True)
    assert found["mesh"] == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    # One STEM layer: 512 rows of 128 floats over 8 devices, mu, nu and last_step beside them.
    assert found["tables"]["stem"]["rows"] == 512 * 128 * 4 // 8
    assert found["tables"]["stem"]["moments"] == 2 * found["tables"]["stem"]["rows"] + 512 * 4 // 8
    assert found["tables"]["stem"]["row_block"] == found["tables"]["stem"]["unique_rows"] * 128 * 4
    # What the arithmetic of the tables says: rows of 128 floats, and one number to ask for each.
    table = found["tables"]["stem"]
    others = table["exchange"] // (128 * 4) * 7 // 8
    sent = table["load"]["exchange_bytes"] + others * 4
    assert found["collectives"]["all-to-all"]["bytes"] == sent
    assert found["collectives"]["all-reduce"]["bytes"] > 0
    # The rounds of the exchange are known beforehand.
    assert found["open_ended_loops"] == 0
    assert found["memory"]["aliased"] > 0.9 * found["memory"]["arguments"] > 0
    assert found["roofline"] is None


@pytest.mark.parametrize(
    ("row_format", "moments", "of_rows", "of_moments"),
    [("bfloat16", "adamw", 2, 4 * 128 + 4), ("bfloat16", "rowwise", 2, 4 + 4)],
)
def test_a_plan_counts_rows_in_their_format(
    tiny_config, device_mesh, row_format, moments, of_rows, of_moments
):
    """One vector of 128 numbers; host memory has all fields of all rows."""
    keys = {"model.vocab_size": 512, "model.ffn_dim": 128, "model.stem_layers": (1,)}
    keys |= {"tables.row_format": row_format, "tables.moments": moments}
    config = tiny_config(**keys, **{"tables.resident_rows": 256})
    mesh, topology = device_mesh((8, 1, 1)), Topology.parse("cpu:8")
    planned = {"stem": ShardedTable(table_specs(config)["stem"], mesh, 16)}
    distinct = step_distinct_rows(config, mesh)
    found = tables_bytes(config, topology, mesh, planned, distinct)["stem"]
    assert found.rows == 256 * 128 * of_rows // 8
    assert found.moments == 256 * of_moments // 8
    assert found.host == 512 * (128 * of_rows + of_moments)
    # Compared with a lookup in float32, which says nothing of formats.
    plain = tiny_config(**{k: v for k, v in keys.items() if not k.startswith("tables.")})
    sizes = {naive_lookup_program(c, mesh).argument_bytes for c in (config, plain)}
    assert len(sizes) == 1


def test_a_plan_reads_well_and_fails_clearly(monkeypatch, capsys):
    monkeypatch.setattr(plans, "chip_of", lambda device: _chip(hbm_bytes=10_000))
    argv = ["plan", "--config=configs/tiny.py", "--topology=cpu:2", "--naive-lookup"]
    monkeypatch.setattr(sys, "argv", argv + [f"--config.{k}={v}" for k, v in SMALL.items()])
    with pytest.raises(SystemExit) as exit_status:
        cli.run(plan.main)
    captured = capsys.readouterr()
    assert exit_status.value.code == 1
    assert captured.err.startswith("error: naive lookup does not fit cpu:2: ")
    assert captured.err.count("\n") == 1
    assert "to change    the train step, without --naive-lookup" in captured.out
    assert "buffers      the largest" in captured.out


def test_remedies_name_the_keys(monkeypatch, capsys):
    monkeypatch.setattr(plans, "chip_of", lambda device: _chip(hbm_bytes=4_000_000))
    with pytest.raises(
        InputError, match=r"train step does not fit cpu:8: .* try model\.remat=full"
    ):
        _main("--topology=cpu:8")
    text = capsys.readouterr().out
    assert "to change    model.remat=full; or train.micro_batches=2; or " in text
    assert "train.global_batch_size=8; or a larger topology" in text


def test_a_dense_model_has_no_rows_to_look_up():
    with pytest.raises(InputError, match=r"model\.stem_layers=none has no table"):
        _main("--topology=cpu:2", "--naive-lookup", overrides={"model.stem_layers": "none"}.items())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"train.micro_batches=3 does not divide over the 8 dev"):
        _main("--topology=cpu:8", overrides={"train.global_batch_size": "3"}.items())


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
@pytest.mark.parametrize(
    ("name", "slices"),
    [
        *[
            pytest.param(name, 1, marks=pytest.mark.long)
            for name in ("v4:2x2x1", "v5e:2x2", "v6e:2x2")
        ],
        pytest.param("v5p:2x2x1", 2, marks=pytest.mark.long),
    ],
)
def test_a_plan_for_tpus(name, slices, tiny_config):
    config = tiny_config(**{"model.head_dim": 64, "train.seq_len": 128})
    found = plans.make_plan(config, Topology.parse(name, slices))
    assert (found.chips, found.fits, found.refused) == (4 * slices, True, "")
    assert found.mesh == {"data": 4 * slices, "fsdp": 1, "context": 1, "tensor": 1}
    assert found.roofline.step > 0
    assert found.collectives["all-to-all"].bytes > 0
    between = found.collectives["all-reduce"].bytes_between_slices
    assert (between > 0) == (slices > 1)
    assert "fits" in as_text(found)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
def test_slices_send_each_other_what_the_last_hop_has_room_for(tiny_config):
    """Rows in bfloat16, their gradients as float32 sums, one number to ask for each."""
    sizes = {"train.global_batch_size": 8, "mesh.data": 2, "mesh.fsdp": 4}
    config = tiny_config(**sizes, **{"model.compute_dtype": "bfloat16"})
    topology = Topology.parse("v5e:2x2", 2)
    mesh = make_mesh(config.mesh, topology.devices())
    exchange = train_step_program(config, mesh).tables["stem"].exchange
    assert exchange.hops == (Hop(4, 1), Hop(2, 4))
    width = len(config.model.stem_layers) * config.model.ffn_dim
    found = plans.make_plan(config, topology).collectives["all-to-all"]
    assert found.bytes_between_slices == exchange.capacities[1] * (width * (2 + 4) + 4)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
def test_the_account_of_a_step_for_tpus(tiny_config):
    config = tiny_config(**{"model.head_dim": 64, "train.seq_len": 128, "mesh.data": -1})
    plan = plans.make_plan(config, Topology.parse("v5e:2x2"), account=True)
    found = json.loads(as_json(plan))["account"]
    parts = {part["name"]: part for part in found["parts"]}
    assert tuple(parts) == STEP
    # Every scope survives gradients, rematerialisation, loops and shardings.
    idle = {name for name, part in parts.items() if not part["cycles"] + part["charged"]}
    assert idle <= {"rest", "row_copies"}
    assert parts["attention"]["cycles"] == 0 < parts["attention"]["charged"]
    assert found["total_cycles"] == sum(p["cycles"] + p["charged"] for p in found["parts"])
    assert parts["exchange"]["wire_seconds"] > 0
    for part in found["parts"]:
        assert 0 <= part["covered_seconds"] <= part["wire_seconds"]
    text = as_text(plan)
    assert "account      part" in text
    assert all(name in text for name in STEP)


@pytest.mark.parametrize("flags", [["--topology=cpu:2"], ["--topology=v5e:2x2", "--naive-lookup"]])
def test_an_account_needs_the_estimates_of_a_tpu(flags):
    with pytest.raises(InputError, match=r"--account reads the cycles that libtpu estimates"):
        _main("--account", *flags)


@pytest.mark.long
def test_a_plan_of_an_offloaded_table(tiny_config):
    config = tiny_config(**{"tables.resident_rows": 32, "mesh.data": -1})
    resident = tiny_config(**{"mesh.data": -1})
    plan_of = {
        name: plans.make_plan(c, Topology.parse("cpu:8"))
        for name, c in (("offloaded", config), ("resident", resident))
    }
    rows, width = 96, 2 * 48
    assert plan_of["resident"].tables["stem"].host == 0
    assert plan_of["offloaded"].tables["stem"].host == rows * (3 * 4 * width + 4)
    assert plan_of["offloaded"].tables["stem"].rows == 32 // 8 * 4 * width
    assert plan_of["resident"].tables["stem"].rows == rows // 8 * 4 * width
    assert "in host memory" in as_text(plan_of["offloaded"])
    assert "in host memory" not in as_text(plan_of["resident"])


@dataclasses.dataclass(frozen=True)
class TpuOfSlice:
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": -1}, {"data": 3, "fsdp": 1}])
def test_only_data_spans_slices(tiny_config, sizes):
    config = tiny_config(**{f"mesh.{axis}": size for axis, size in sizes.items()}).mesh
    devices = [TpuOfSlice(0)] * 4 + [TpuOfSlice(1)] * 4
    expected = rf"mesh\.data={config.data} does not divide over 2 slices; .*data=2"
    with pytest.raises(InputError, match=expected):
        make_mesh(config, devices)


def test_slices_follow_each_other_along_data(tiny_config):
    """In their order, whatever order the devices come in; within a slice as without others."""
    config = tiny_config(**{"mesh.data": 4, "mesh.fsdp": 2, "mesh.tensor": 2}).mesh
    places = [(x, y, 0) for y in range(4) for x in range(2)]
    devices = [TpuOfSlice(part, at) for at in places for part in (1, 0)]
    mesh = make_mesh(config, devices)
    assert mesh.shape == {"data": 4, "fsdp": 2, "context": 1, "tensor": 2}
    one = dataclasses.replace(config, data=2)
    for part in (0, 1):
        alone = make_mesh(one, [device for device in devices if device.slice_index == part])
        assert (mesh.devices[2 * part : 2 * part + 2] == alone.devices).all()
    assert {device.slice_index for device in mesh.devices[2:].ravel()} == {1}


def test_slices_must_leave_room_for_the_other_axes(tiny_config):
    config = tiny_config(**{"mesh.data": -1, "mesh.fsdp": 8}).mesh
    with pytest.raises(InputError, match="8 devices of 2 equal slices"):
        make_mesh(config, [TpuOfSlice(0)] * 4 + [TpuOfSlice(1)] * 4)
