"""A plan: one program of a configuration, compiled for a pod, and what that says."""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.hardware import Chip, chip_of
from stem_jax.kernels.head_loss import tokens_at_a_time
from stem_jax.memory.catalogue import table_specs, with_eos
from stem_jax.mesh import AXES, BATCH_AXES, CONTEXT, axis_size, make_mesh
from stem_jax.planning import gpus
from stem_jax.planning.account import Account, make_account
from stem_jax.planning.collectives import KINDS, Collective, collectives_of
from stem_jax.planning.compiled import Buffer, Compiled, compile_program
from stem_jax.planning.distinct_rows import step_distinct_rows
from stem_jax.planning.gpu_kernels import cudnn_workspace
from stem_jax.planning.hlo import Module
from stem_jax.planning.memory import Memory
from stem_jax.planning.program import Program, naive_lookup_program, train_step_program
from stem_jax.planning.roofline import Roofline, roofline, step_flops
from stem_jax.planning.table_load import HOST
from stem_jax.planning.table_plan import (
    TableBytes,
    overfull,
    table_remedies,
    tables_bytes,
    total_seconds,
)
from stem_jax.planning.topology import Topology
from stem_jax.planning.traffic import hbm_bytes
from stem_jax.planning.work_account import WorkAccount, make_work_account
from stem_jax.training.start_report import attention_kernel

_NAIVE = ("the train step, without --naive-lookup: there distinct rows travel once",)


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of a kind: how many run in a step, and the bytes a chip sends in them."""

    count: int
    bytes: int
    bytes_between_slices: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures are per chip and step unless they say otherwise.

    program: "train step" or "naive lookup". attention: its kernel. matmul_dtype: of projections;
    None: as all else. limit: bytes of HBM that programs may use; None where unknown. model_flops,
    all_flops: matmuls on all chips, without and with recomputation. compiler_flops: the compiler's
    own count of one chip, where loops count once and kernels not at all. hbm_traffic, collectives,
    roofline: None where there is no program or no peak figures. open_ended_loops: end when the
    device says so, counted as open_ended_rounds each.
    account: None unless asked for. work: of GPUs, by part; else None.
    """

    program: str
    topology: str
    device_kind: str
    chips: int
    mesh: dict[str, int]
    sequences: int
    tokens_per_step: int
    attention: str
    matmul_dtype: str | None
    memory: Memory
    limit: int | None
    fits: bool
    refused: str
    buffers: tuple[Buffer, ...]
    tables: dict[str, TableBytes]
    model_flops: int
    all_flops: int
    compiler_flops: float | None
    hbm_traffic: int | None
    collectives: dict[str, CollectiveTotal] | None
    open_ended_loops: int
    open_ended_rounds: int
    roofline: Roofline | None
    peaks: Chip | None
    compile_seconds: float
    remedies: tuple[str, ...]
    account: Account | None = None
    work: WorkAccount | None = None


def make_plan(
    config: Config,
    topology: Topology,
    *,
    naive_lookup: bool = False,
    all_distinct: bool = False,
    full_effort: bool = False,
    account: bool = False,
    hit_rate: float | None = None,
) -> Plan:
    """Compiles for the topology; takes from seconds to minutes.

    Args:
        naive_lookup: compile `program.naive_lookup_program` in place of the train step.
        all_distinct: as `program.train_step_program` has it.
        full_effort: as `compiled.compile_program` has it.
        account: make the account of the step; needs full effort, and takes it.
        hit_rate: as `table_load.table_load` has it, of each memory.

    Raises:
        InputError: the topology cannot be described, or the configuration does not suit it.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    distinct = {} if naive_lookup else step_distinct_rows(config, mesh)
    # Which token ends n-grams changes no size, and there is no tokenizer here that says it.
    config = with_eos(config, 0)
    chip = chip_of(mesh.devices.flat[0])
    if account and (naive_lookup or chip is None or not chip.clock):
        raise InputError(
            f"--account reads the cycles that libtpu estimates for a train step; {topology} with "
            f"naive_lookup={naive_lookup} has none: choose a TPU, without --naive-lookup"
        )

    def lowered() -> Program:
        if naive_lookup:
            return naive_lookup_program(config, mesh)
        return train_step_program(config, mesh, all_distinct=all_distinct, distinct=distinct)

    program, compiled = _compile(lowered, topology, mesh, full_effort or account)
    tables = tables_bytes(config, topology, mesh, program.tables, distinct, hit_rate)
    crowded = HOST in overfull(tables)
    limit = int(chip.hbm_bytes) if chip else None
    module, memory = compiled.module, compiled.memory
    if topology.switched and module is not None:
        memory = dataclasses.replace(memory, workspace=cudnn_workspace(module))
    on_chip = not compiled.refused and (limit is None or memory.total <= limit)
    slices = topology.slices_of(mesh.devices.flat)
    collectives = [] if module is None else collectives_of(module, slices)
    work = None
    if topology.switched and module is not None and chip is not None:
        work = make_work_account(module, collectives, topology, chip)
    # Of GPUs' kernels more is known than that they read and write whole arrays.
    traffic = work.traffic if work else None if module is None else hbm_bytes(module)
    model_flops, all_flops = step_flops(config)
    bound, cycles = None, None
    if chip is not None and module is not None and traffic is not None:
        if not naive_lookup:
            of_tables = [total_seconds(tables, wire) or 0.0 for wire in ("link", "books")]
            bound = roofline(config, topology, chip, collectives, traffic, *of_tables)
        cycles = make_account(module, collectives, topology, chip) if account else None
    remedies = table_remedies(tables, table_specs(config)) if crowded else ()
    if not on_chip:
        remedies = (
            *(_NAIVE if naive_lookup else _remedies(config, mesh, compiled, limit)),
            *remedies,
        )
    return Plan(
        program="naive lookup" if naive_lookup else "train step",
        topology=str(topology),
        device_kind=mesh.devices.flat[0].device_kind,
        chips=mesh.devices.size,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        sequences=config.micro_batch_size // axis_size(mesh, BATCH_AXES),
        tokens_per_step=config.tokens_per_step,
        attention=attention_kernel(config, mesh),
        matmul_dtype=config.model.matmul_dtype,
        memory=memory,
        limit=limit,
        fits=on_chip and not crowded,
        refused=compiled.refused,
        buffers=compiled.buffers,
        tables=tables,
        model_flops=model_flops,
        all_flops=all_flops,
        compiler_flops=compiled.flops,
        hbm_traffic=traffic,
        collectives=None if module is None else _totals(collectives),
        open_ended_loops=0 if module is None else _open_ended(module),
        open_ended_rounds=program.rounds,
        roofline=bound,
        peaks=chip,
        compile_seconds=compiled.seconds,
        remedies=remedies,
        account=cycles,
        work=work,
    )


def _compile(
    lowered: Callable[[], Program], topology: Topology, mesh: Mesh, effort: bool
) -> tuple[Program, Compiled]:
    if not topology.switched:
        program = lowered()
        return program, compile_program(program, full_effort=effort)
    with gpus.lowering_for(mesh.devices.flat[0]):
        program = lowered()
    # With less effort GPUs' compiler gets no faster.
    return program, compile_program(program, full_effort=True, options=gpus.OPTIONS)


def _totals(collectives: list[Collective]) -> dict[str, CollectiveTotal]:
    totals = {}
    for kind in KINDS:
        ours = [c for c in collectives if c.kind == kind]
        totals[kind] = CollectiveTotal(
            count=sum(c.times for c in ours),
            bytes=math.ceil(sum(c.total for c in ours)),
            bytes_between_slices=math.ceil(sum(c.between for c in ours)),
        )
    return totals


def _open_ended(module: Module) -> int:
    """Loops whose end only the device knows: the rounds of the exchange."""
    loops = (i for i, _ in module.scheduled() if i.opcode == "while")
    return sum(module.trip_count(loop) is None for loop in loops)


def _remedies(config: Config, mesh: Mesh, compiled: Compiled, limit: int | None) -> tuple[str, ...]:
    """What to change, the most likely first."""
    found = []
    batch_devices = axis_size(mesh, BATCH_AXES)
    vocab = config.model.vocab_size // mesh.shape["tensor"]
    wide = max((b.bytes * b.count for b in compiled.buffers if _ends_in(b, vocab)), default=0)
    if limit and compiled.memory.arguments > limit / 2:
        found.append("more chips, or more of them on mesh.fsdp and mesh.tensor: the state alone is "
                     "over half the memory")  # fmt: skip
    if config.model.remat != "full":
        found.append("model.remat=full")
    if config.micro_batch_size > batch_devices:
        found.append(f"train.micro_batches={2 * config.train.micro_batches}")
    sequences = config.micro_batch_size // batch_devices
    context = mesh.shape[CONTEXT]
    tokens = tokens_at_a_time(sequences * config.train.seq_len // context, vocab)
    positions = config.train.loss_chunk or tokens // sequences
    if limit and wide > limit / 16 and positions > 64:
        found.append(f"train.loss_chunk={positions // 2}")
    if sequences == 1 and config.train.seq_len % (4 * context) == 0:
        found.append(f"mesh.context={2 * context}")
    if config.train.global_batch_size > batch_devices:
        found.append(f"train.global_batch_size={config.train.global_batch_size // 2}")
    found.append("a larger topology")
    return tuple(found)


def _ends_in(buffer: Buffer, size: int) -> bool:
    return buffer.shape.endswith((f",{size}]", f"[{size}]"))
