"""What a plan reads from a compiled program, and the bounds that follow."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stem_jax.hardware import Chip
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.cost import projection_flops_per_token
from stem_jax.planning import hlo
from stem_jax.planning.collectives import Collective, collectives_of
from stem_jax.planning.distinct_rows import needs_of, step_distinct_rows
from stem_jax.planning.roofline import roofline, step_flops
from stem_jax.planning.topology import Topology
from stem_jax.planning.traffic import hbm_bytes, moved_bytes
from stem_jax.tables.block_sizes import BlockSizes
from stem_jax.tables.sharded_table import ShardedTable

pytestmark = pytest.mark.optimized

# --- Reading programs ---

MODULE = """HloModule jit_f, is_scheduled=true

%sliced (p0: bf16[64,128], p1: s32[]) -> bf16[8,128] {
  %p0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero)
}

%fixed_condition (c: (s32[], f32[16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %c = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%open_condition (o: (s32[], s32[])) -> pred[] {
  %o = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %first = s32[]{:T(128)} get-tuple-element(%o), index=0
  %second = s32[]{:T(128)} get-tuple-element(%o), index=1
  ROOT %lower = pred[]{:T(512)} compare(%first, %second), direction=LT
}

%body (b: (s32[], f32[16])) -> (s32[], f32[16]) {
  %b = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %one = f32[16]{0:T(128)} get-tuple-element(%b), index=1
  %kernel = f32[16]{0:T(128)} custom-call(%one), attributes={a={
"x": "{1}"
}}, metadata={op_name="jit(f)/kernel"}
  %sum = f32[16]{0:T(128)} all-reduce(%kernel), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%b, %sum)
}

%open_body (ob: (s32[], s32[])) -> (s32[], s32[]) {
  %ob = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %moved = s32[4]{0:T(128)} all-to-all(%ob), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %same = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%ob)
}

ENTRY %main (a: f32[16], t: bf16[64,128], i: s32[]) -> f32[16] {
  %a = f32[16]{0:T(128)} parameter(0)
  %t = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %few = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%t, %i), kind=kLoop, calls=%sliced
  %start = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%i, %a)
  %five = (s32[]{:T(128)}, /*index=1*/f32[16]{0:T(128)}) while(%start), condition=%fixed_condition, body=%body
  %rounds = (s32[]{:T(128)}, s32[]{:T(128)}) while(%start), condition=%open_condition, body=%open_body
  %known = (s32[]{:T(128)}, f32[16]{0:T(128)}) while(%start), condition=%open_condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %result = f32[16]{0:T(128)} get-tuple-element(%five), index=1
}
"""  # noqa: E501


def test_a_module_is_read():
    module = hlo.parse(MODULE)
    assert module.entry == "main"
    kernel = module.instructions["kernel"]
    assert (kernel.opcode, kernel.operands) == ("custom-call", ("one",))
    # Attributes with line breaks neither end the computation nor hide what follows.
    assert kernel.op_name == "jit(f)/kernel"
    assert [array.on_chip for array in module.instructions["few"].arrays] == [True]
    assert [str(array) for array in module.instructions["five"].arrays] == ["s32[]", "f32[16]"]
    loops = {name: module.trip_count(module.instructions[name]) for name in ("five", "known")}
    assert loops == {"five": 5, "known": 3}
    assert module.trip_count(module.instructions["rounds"]) is None
    runs = [times for instruction, times in module.scheduled() if instruction.name == "sum"]
    assert runs == [5, 3]


def test_padding_follows_the_layout():
    [array] = hlo.arrays_of("bf16[20480,5,8192]{2,1,0:T(8,128)(2,1)}")
    assert (array.bytes, array.padded_bytes) == (20480 * 5 * 8192 * 2, 20480 * 8 * 8192 * 2)
    [turned] = hlo.arrays_of("bf16[20480,5,8192]{2,0,1:T(8,128)(2,1)}")
    assert turned.padded_bytes == turned.bytes


def test_traffic_counts_what_is_taken_and_not_what_it_is_taken_from():
    module = hlo.parse(MODULE)
    # The slice reads 8 of 64 rows (and its index) and leaves them on the chip; a round of a loop
    # reads and writes 16 floats in the kernel and in the sum, one of the open loop 8 and 16 bytes.
    per_round = 2 * (2 * 16 * 4)
    assert hbm_bytes(module) == 8 * 128 * 2 + 4 + (5 + 3) * per_round + 8 + 16


def test_traffic_of_what_goes_between_chip_and_hbm():
    """A window made on the chip is written into HBM; a slice of HBM taken to the chip is read."""
    whole, window = "bf16[64,128]{1,0}", "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}"
    module = hlo.parse(
        f"""HloModule m
ENTRY %main (whole: bf16[64,128], at: s32[]) -> bf16[64,128] {{
  %whole = {whole} parameter(0)
  %at = s32[]{{:T(128)S(6)}} parameter(1)
  %taken = {window} dynamic-slice(%whole, %at, %at), dynamic_slice_sizes={{8,128}}
  ROOT %put = {whole} dynamic-update-slice(%whole, %taken, %at, %at)
}}
"""
    )
    window_bytes = 8 * 128 * 2
    assert moved_bytes(module, module.instructions["taken"]) == window_bytes
    assert moved_bytes(module, module.instructions["put"]) == window_bytes


def test_collectives_of_a_compiled_program(device_mesh):
    """Sizes by hand: 8 devices, each with [8, 16] floats, 512 bytes."""
    mesh = device_mesh((2, 4, 1))

    def local(x):
        def body(carry, _):
            return jax.lax.psum(carry, "fsdp") * 0.5, None

        x, _ = jax.lax.scan(body, x, length=3)
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, "fsdp", tiled=True)
        swapped = jax.lax.all_to_all(x, ("data", "fsdp"), 0, 0, tiled=True)
        return scattered, jax.lax.ppermute(swapped, "data", [(0, 1), (1, 0)])

    batch = PartitionSpec(("data", "fsdp"))
    program = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=batch, out_specs=(batch, batch), check_vma=False)
    )
    text = program.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()
    found = collectives_of(hlo.parse(text), [0] * 4 + [1] * 4)
    sent = {c.kind: (c.total, c.group, c.crossing) for c in found}
    assert sent == {
        "all-reduce": (3 * 2 * 512 * 3 / 4, 4, 0),
        "all-gather": (512, 2, 1),
        "reduce-scatter": (1024 * 3 / 4, 4, 0),
        # Four of a device's seven partners are in the other slice.
        "all-to-all": (512 * 7 / 8, 8, 4 / 7),
        "collective-permute": (512, 2, 1),
    }


# --- Bounds ---


def _chip(**changes) -> Chip:
    chip = Chip("X", 100e12, 2**30, 1e12, 4, 10e9, 1e9, "a test")
    return dataclasses.replace(chip, **changes)


def _sent(kind: str, size: float, group: int, crossing=0.0) -> Collective:
    return Collective(kind, "c", "", size, 1, group, crossing)


def test_the_slowest_part_bounds_the_step(tiny_config):
    config = tiny_config()
    flops, with_remat = step_flops(config)
    assert flops == with_remat
    topology = Topology.parse("v5e:2x2")
    bounds = roofline(config, topology, _chip(), [], 10**9)
    assert (bounds.binds, bounds.step) == ("hbm", 1e-3)
    assert bounds.tokens_per_second == config.tokens_per_step / 1e-3
    assert bounds.mfu == pytest.approx(flops / 4 / 100e12 / 1e-3)
    slow = roofline(config, topology, _chip(flops=1e6), [], 10**9)
    assert (slow.binds, slow.mfu) == ("compute", pytest.approx(1))


def test_products_of_eight_bits_are_bounded_by_their_own_peak(tiny_config):
    """Projections alone; utilisation is a share of that peak, or of bfloat16's where none is."""
    topology, found = Topology.parse("v5e:2x2"), {}
    for kind in (None, "float8"):
        for remat in ("none", "full"):
            config = tiny_config(**{"model.matmul_dtype": kind, "model.remat": remat})
            found[kind, remat] = [
                roofline(config, topology, _chip(flops=1e6, float8=peak), [], 0)
                for peak in (0.0, 4e6)
            ]
    flops, _ = step_flops(config)
    projections = projection_flops_per_token(config) * config.tokens_per_step
    assert 0 < 3 * projections < flops
    for remat, passes in (("none", 3), ("full", 4)):
        (plain, other), (without, with_units) = found[None, remat], found["float8", remat]
        assert plain == other == without
        saved = passes * projections * (1 / 1e6 - 1 / 4e6) / 4
        assert with_units.compute == pytest.approx(plain.compute - saved)
        assert with_units.mfu == pytest.approx(flops / 4 / 4e6 / with_units.step)


def test_recomputation_costs_a_forward_pass_without_the_head(tiny_config):
    config = tiny_config(**{"model.remat": "full"})
    flops, with_remat = step_flops(config)
    head = 2 * 88 * 32 * config.tokens_per_step
    assert with_remat == flops + (flops / 3 - head)


def test_links_of_a_corner_and_the_middle_of_a_slice(tiny_config):
    config = tiny_config()

    def seconds(name, *collectives, slices=1):
        found = roofline(config, Topology.parse(name, slices), _chip(), list(collectives), 0)
        return found.interconnect, found.network

    # A corner of 8x8 has two links of 10 GB/s; in the ring of 16x16 it has four.
    assert seconds("v5e:8x8", _sent("all-gather", 1e9, 64)) == (1e9 / 20e9, 0)
    assert seconds("v5e:16x16", _sent("all-gather", 1e9, 256)) == (1e9 / 40e9, 0)
    assert seconds("v5p:4x4x4", _sent("all-gather", 1e9, 64)) == (1e9 / 60e9, 0)
    # 32 chips send half of 1 GB each across 8 links; with rings 128 chips across 32.
    assert seconds("v5e:8x8", _sent("all-to-all", 1e9, 64)) == (16e9 / 80e9, 0)
    assert seconds("v5e:16x16", _sent("all-to-all", 1e9, 256)) == (64e9 / 320e9, 0)
    # Between slices the bytes take the network and no link.
    crossing = _sent("all-reduce", 2e9, 2, crossing=1.0)
    assert seconds("v5e:2x2", crossing, slices=2) == (0, 2e9 / 1e9)


def test_transfers_between_slices_are_sends_to_the_host():
    send = (
        "  %s = (s32[8,10]{1,0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=10, "
        "is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        '"xla_megascale_runtime",_xla_megascale_target={{100000,100002,200000,200002}},'
        '_xla_megascale_transfer_type="ALL_TO_ALL"}'
    )
    header = "ENTRY %main (x: s32[8,10]) -> s32[8,10] {\n  %x = s32[8,10]{1,0} parameter(0)\n"
    [found] = collectives_of(hlo.parse(f"{header}{send}\n}}\n"), [0, 0, 1, 1])
    # Half of the 320 bytes stay in the slice.
    assert (found.kind, found.bytes, found.group, found.crossing) == ("all-to-all", 160, 2, 1)


def _zipf_needs(config, mesh) -> BlockSizes:
    distinct = step_distinct_rows(config, mesh)["stem"]
    return needs_of(distinct, ShardedTable(table_specs(config)["stem"], mesh, distinct.keys))


def test_zipf_rows_are_fewer_than_tokens(tiny_config, device_mesh):
    config = tiny_config()
    needs = _zipf_needs(config, device_mesh((8, 1, 1)))
    unique, owned = needs.unique, needs.owned
    # 16 tokens of a device, 128 of all of them, 88 keys.
    assert 8 <= unique < 16
    single = _zipf_needs(config, device_mesh((1, 1, 1)))
    alone = single.unique
    assert single == BlockSizes(alone, alone) and needs.pairs[0] >= unique / 8
    assert unique < alone < 88
    assert owned == math.ceil(alone / 8)


def test_room_is_that_of_the_fullest_pair(tiny_config, device_mesh):
    """Against 400 draws of what 4 devices ask of 4 owners."""
    config = tiny_config(**{"model.vocab_size": 4096, "mesh.data": 4})
    mesh = device_mesh((4, 1, 1))
    spec = table_specs(config)["stem"]
    share = 1 / np.arange(1, 4097)
    share /= share.sum()
    random = np.random.default_rng(0)
    largest = []
    for _ in range(400):
        fullest = 0
        for _ in range(4):
            keys = np.unique(random.choice(4096, config.tokens_per_step // 4, p=share))
            owners = spec.layout.row_numbers(keys) // (spec.num_rows // 4)
            fullest = max(fullest, np.bincount(owners).max())
        largest.append(fullest)
    room = _zipf_needs(config, mesh).pairs[0]
    assert np.quantile(largest, 0.9) <= room <= 1.25 * max(largest)
