"""Plans for GPUs on machines without one: what is compiled, counted and refused."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.errors import InputError
from stem_jax.hardware import chip_of
from stem_jax.mesh import BATCH_AXES, make_mesh
from stem_jax.planning import gpus
from stem_jax.planning import plan as plans
from stem_jax.planning.collectives import Collective
from stem_jax.planning.plan_text import as_json, as_text
from stem_jax.planning.ring import crossing_share
from stem_jax.planning.roofline import roofline
from stem_jax.planning.topology import KNOWN, Topology
from stem_jax.tables.lookup import close_rows, lookup, open_rows
from tests.children import ROOT

needs_compiler = pytest.mark.skipif(
    gpus.missing() is not None, reason=f"{gpus.missing()} is not installed: {gpus.INSTALL_CUDA}"
)


@dataclasses.dataclass(frozen=True)
class _Described:
    device_kind: str
    process_index: int = 0


# --- Topologies ---


def test_hosts_of_gpus_are_named_by_what_is_in_one():
    two = Topology.parse("h100:8", 2)
    assert (two.shape, two.slices, str(two)) == ((8,), 2, "2 hosts of h100:8")
    assert two.slices_of([_Described("", 0), _Described("", 1)]) == [0, 1]
    for kind in gpus.KINDS:
        assert KNOWN[kind] == ("1", "2", "4", "8")
    with pytest.raises(
        InputError, match=r"--topology=h100:3 is unknown; known are .* h100:1 2 4 8"
    ):
        Topology.parse("h100:3")


@pytest.mark.parametrize("kind", gpus.KINDS)
def test_every_gpu_has_peak_figures_and_its_memory(kind):
    name, _, _, memory, bandwidth, *_ = gpus._FACTS[kind]
    chip = chip_of(_Described(name))
    # A run reserves three quarters.
    assert (chip.hbm_bytes, chip.reserved) == (0.75 * memory, 0.75)
    assert chip.hbm_bandwidth == pytest.approx(bandwidth, rel=0.01)
    assert chip.network and chip.elements and "datasheet" in chip.source
    # Twice as many products of half the bits.
    assert chip.peak("float8") == chip.float8 == pytest.approx(2 * chip.flops, rel=1e-3)
    assert chip.peak(None) == chip.flops


def test_a_chip_without_units_for_eight_bits_is_measured_by_its_other_peak():
    for kind in ("NVIDIA A100-SXM4-80GB", "TPU v5 lite", "TPU v6 lite"):
        chip = chip_of(_Described(kind))
        assert chip.peak("float8") == chip.flops


@pytest.mark.parametrize(
    ("absent", "reason"), [("jax-cuda", "JAX's CUDA plugin"), ("nvidia", "CUDA's nvcc")]
)
def test_what_is_missing_is_named_with_its_install_command(monkeypatch, tmp_path, absent, reason):
    def version(package):
        if package.startswith(absent):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "none"))
    with pytest.raises(InputError) as refused:
        Topology.parse("h200:2").devices()
    assert str(refused.value) == (
        f"--topology=h200:2 needs {reason}, to compile for GPUs on any Linux machine; "
        f"install it with: {gpus.INSTALL_CUDA}"
    )


# --- Wires ---


def test_rings_leave_a_host_once_from_each_of_its_gpus():
    hosts = [0] * 4 + [1] * 4
    assert crossing_share("all-gather", hosts[:4]) == 0
    assert crossing_share("reduce-scatter", hosts) == 1 / 4
    # Four of the seven to whom a device sends.
    assert (
        crossing_share("all-to-all", hosts) == crossing_share("ragged-all-to-all", hosts) == 4 / 7
    )
    assert crossing_share("collective-permute", [0, 1]) == crossing_share("all-reduce", [0, 1]) == 1


def test_gpus_of_a_host_send_at_the_speed_of_all_links(tiny_config):
    chip = chip_of(_Described("NVIDIA H100 80GB HBM3"))
    sent = Collective("all-to-all", "c", "", 7e9, 1, 8, 4 / 7)
    found = roofline(tiny_config(), Topology.parse("h100:4", 2), chip, [sent], 0)
    # NVLink 450 GB/s, the network 50: it binds.
    assert found.interconnect == pytest.approx(3e9 / 450e9)
    assert (found.network, found.binds) == (pytest.approx(4e9 / 50e9), "network")


# --- Programs ---

_SMALL = {
    "model.num_layers": 2,
    "model.stem_layers": (1,),
    "model.head_dim": 64,
    "train.seq_len": 128,
    "model.compute_dtype": "bfloat16",
}


@pytest.mark.long
@needs_compiler
def test_a_plan_for_hosts_of_gpus(tiny_config):
    """Rows and gradients of two hosts of one GPU; attention in chunks, which needs no tokamax."""
    one = {"model.num_layers": 1, "model.stem_layers": (0,), "model.attention": "chunked"}
    config = tiny_config(**_SMALL | one | {"mesh.data": 2})
    plan = plans.make_plan(config, Topology.parse("h100:1", 2))
    assert (plan.chips, plan.fits, plan.device_kind) == (2, True, "NVIDIA H100 80GB HBM3")
    assert plan.limit == int(0.75 * 84942979072)
    assert plan.attention == "chunked"
    assert plan.memory.temporaries > 0 == plan.memory.workspace
    for kind in ("all-to-all", "all-reduce"):
        sent = plan.collectives[kind]
        assert sent.bytes_between_slices == sent.bytes > 0
    assert plan.roofline.network > 0 == plan.roofline.interconnect
    parts = {part.name: part for part in plan.work.parts}
    for name in ("block_matmuls", "head_loss", "attention"):
        assert parts[name].flops > 0
    for name in ("row_lookup", "row_gradient", "row_optimizer", "optimizer"):
        assert parts[name].flops == 0 < parts[name].bytes
    assert parts["exchange"].wire_seconds > 0
    # What collectives read and write beside.
    assert plan.hbm_traffic == plan.work.traffic > plan.work.bytes
    assert all(0 <= p.covered_seconds <= p.wire_seconds for p in parts.values())
    text, record = as_text(plan), json.loads(as_json(plan))
    assert "the 0.75 of 79.11 GiB that a run reserves" in text and "between hosts" in text
    assert "work         part" in text
    assert record["work"]["flops"] == sum(p["flops"] for p in record["work"]["parts"])


@needs_compiler
def test_a_gpu_makes_room_for_the_gradients_of_its_own_rows_alone(tiny_config):
    mesh = make_mesh(tiny_config(**{"mesh.data": 2}).mesh, Topology.parse("h100:2").devices())

    def read(vectors, inverse):
        rows = open_rows(vectors)

        def layer(carry, number):
            x, thread = carry
            rows_here = dataclasses.replace(rows, thread=thread)
            value, thread = lookup(rows_here, number, inverse, None, mesh)
            return (x + value, thread), None

        start = jnp.zeros((*inverse.shape, vectors.shape[-1])), rows.thread
        (x, thread), _ = jax.lax.scan(layer, start, jnp.arange(2))
        return close_rows(x, dataclasses.replace(rows, thread=thread), mesh)

    def pulled(vectors, inverse, gradient):
        return jax.vjp(lambda rows: read(rows, inverse), vectors)[1](gradient)

    def shape(*sizes, spec, dtype=jnp.float32):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    batch = (BATCH_AXES,)
    operands = (
        shape(2, 2 * 40, 24, spec=(None, BATCH_AXES)),
        shape(4, 16, dtype=jnp.int32, spec=batch),
        shape(4, 16, 24, spec=batch),
    )
    text = jax.jit(pulled).lower(*operands).compile(gpus.OPTIONS).as_text()
    assert "f32[2,40,24]" in text and "f32[2,80,24]" not in text


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("attention", ["cudnn", "tokamax"])
def test_attention_is_charged_though_its_calls_are_opaque(tiny_config, attention):
    # Not by importing it: it would look for the libraries of CUDA before they are shown.
    if attention == "tokamax" and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed")
    config = tiny_config(**_SMALL, **{"model.attention": attention})
    plan = plans.make_plan(config, Topology.parse("h100:1"))
    [found] = [calls for calls in plan.work.kernels if calls.part == "attention"]
    assert found.kind == "kernel"
    batch, heads, length, layers = 8, 4, 128, 2
    products = 2 + (7 if attention == "tokamax" else 5)
    pairs = length * (length + 1) // 2
    assert found.flops == layers * 2 * products * batch * heads * pairs * 64
    expected = 0 if attention == "tokamax" else 2 * 4 * batch * length * heads * 64
    assert plan.memory.workspace == expected + (4 * batch * heads * length if expected else 0)
    assert ("workspace of cuDNN" in as_text(plan)) == (attention == "cudnn")


# --- Starts ---


@needs_compiler
@pytest.mark.parametrize("platforms", [None, "cpu"])
def test_the_plugin_says_nothing_where_there_is_no_gpu(platforms):
    if list(Path("/dev").glob("nvidia*")):
        pytest.skip("this machine may have a GPU")
    environment = {name: value for name, value in os.environ.items() if "TPU_" not in name}
    environment.pop("JAX_PLATFORMS", None)
    if platforms:
        environment["JAX_PLATFORMS"] = platforms
    program = "from stem_jax.jax_start import start_jax; start_jax(); import jax; jax.devices()"
    argv = [sys.executable, "-c", program]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(argv, timeout=120, **options)
    assert (done.returncode, done.stderr) == (0, "")
