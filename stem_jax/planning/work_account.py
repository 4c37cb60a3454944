"""What each part of a step does on GPUs: FLOPs, bytes, and the least seconds that takes.

A compiler for GPUs estimates no cycles. So all work is counted as charged work is for TPUs
(`charges.work_of`), and an instruction takes at least the longest of three times at the device's
peaks: its matmuls, its other arithmetic, its bytes. Collectives take seconds on the wires, of which
matmuls scheduled meanwhile cover some (`overlap`).
"""

import collections
import dataclasses
from typing import Any

from stem_jax.hardware import Chip
from stem_jax.parts import STEP
from stem_jax.planning.assignment import parts_by_instruction
from stem_jax.planning.charges import Work, work_of
from stem_jax.planning.collectives import Collective
from stem_jax.planning.hlo import Instruction, Module
from stem_jax.planning.overlap import covered_seconds
from stem_jax.planning.roofline import ici_seconds, network_seconds
from stem_jax.planning.topology import Topology
from stem_jax.planning.traffic import moved_bytes


@dataclasses.dataclass(frozen=True)
class PartWork:
    """Of one GPU and step. flops: of matmuls, those in kernels too. operations: elements of all
    other arithmetic. bytes: from and to HBM. seconds: at the least, without the wires.
    wire_seconds: of its collectives, covered_seconds of them under matmuls.
    """

    name: str
    flops: int
    operations: int
    bytes: int
    seconds: float
    wire_seconds: float
    covered_seconds: float


@dataclasses.dataclass(frozen=True)
class KernelCalls:
    """Calls of kernels that are not the compiler's own in a part, and their work together."""

    part: str
    kind: str
    count: int
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class WorkAccount:
    """parts: those of every step, then others. flops, bytes: of all parts. traffic: the bytes, and
    those that collectives read and write. open_rounds: counted of each loop whose end the device
    finds. seconds: of all parts, and of wires that no matmul covers.
    """

    parts: tuple[PartWork, ...]
    kernels: tuple[KernelCalls, ...]
    flops: int
    bytes: int
    traffic: int
    open_rounds: int
    seconds: float


def make_work_account(
    module: Module, collectives: list[Collective], topology: Topology, chip: Chip
) -> WorkAccount:
    """The account of a program compiled for GPUs."""
    part_of = parts_by_instruction(module)
    works = {i.name: work_of(module, i) for i, _ in module.scheduled()}
    sums: collections.defaultdict[str, dict[str, Any]] = collections.defaultdict(
        collections.Counter
    )
    kernels: dict[tuple[str, str], list[int]] = {}
    wired = 0
    for instruction, times in module.scheduled():
        work = works[instruction.name]
        if work is None:
            wired += times * moved_bytes(module, instruction)
            continue
        found = sums[part_of[instruction.name]]
        found["flops"] += times * work.flops
        found["operations"] += times * work.operations
        found["bytes"] += times * work.bytes
        found["seconds"] += times * least_seconds(work, chip)
        if work.kind.endswith("kernel"):
            calls = kernels.setdefault((part_of[instruction.name], work.kind), [0, 0, 0])
            for place, value in enumerate((1, work.flops, work.bytes)):
                calls[place] += times * value

    def seconds_of(instruction: Instruction) -> float:
        work = works[instruction.name]
        return 0.0 if work is None else least_seconds(work, chip)

    wires: dict[str, float] = {}
    for collective in collectives:
        seconds = ici_seconds(collective, topology, chip) + network_seconds(collective, chip)
        sums[part_of[collective.scheduled]]["wire_seconds"] += seconds
        before = wires.get(collective.scheduled, 0.0)
        wires[collective.scheduled] = before + seconds / max(1, collective.times)
    for name, seconds in covered_seconds(module, wires, seconds_of).items():
        sums[part_of[name]]["covered_seconds"] += seconds
    fields = [field.name for field in dataclasses.fields(PartWork)[1:]]
    parts = tuple(
        PartWork(name, **{field: sums[name][field] for field in fields})
        for name in (*STEP, *sorted(set(part_of.values()) - set(STEP)))
    )
    return WorkAccount(
        parts=parts,
        kernels=tuple(KernelCalls(p, kind, *calls) for (p, kind), calls in sorted(kernels.items())),
        flops=sum(part.flops for part in parts),
        bytes=sum(part.bytes for part in parts),
        traffic=wired + sum(part.bytes for part in parts),
        open_rounds=module.open_rounds,
        seconds=sum(p.seconds + p.wire_seconds - p.covered_seconds for p in parts),
    )


def least_seconds(work: Work, chip: Chip) -> float:
    """Of one run, at the peaks."""
    return max(
        (work.flops - work.float8) / chip.flops + work.float8 / chip.peak("float8"),
        work.operations / chip.elements,
        work.bytes / chip.hbm_bandwidth,
    )
