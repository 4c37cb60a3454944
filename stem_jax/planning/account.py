"""The account of a step: cycles and seconds on the wires, by part, of a compiled TPU program.

Cycles are the compiler's own estimates times the runs of each instruction, loops counted. What it
gives none is charged (`charges`). Collectives take seconds on the wires, of which matmuls scheduled
meanwhile cover some (`overlap`). Every scheduled instruction belongs to one part, so the parts sum
to the whole.
"""

import collections
import dataclasses

from stem_jax.hardware import Chip
from stem_jax.parts import STEP
from stem_jax.planning.assignment import parts_by_instruction
from stem_jax.planning.charges import charge
from stem_jax.planning.collectives import Collective
from stem_jax.planning.hlo import Instruction, Module
from stem_jax.planning.overlap import covered_seconds
from stem_jax.planning.roofline import ici_seconds, network_seconds
from stem_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Part:
    """cycles: estimated by the compiler. charged: cycles for what it gives none. wire_seconds: of
    its collectives, covered_seconds of them under matmuls. Of one chip and step.
    """

    name: str
    cycles: int
    charged: int
    wire_seconds: float
    covered_seconds: float


@dataclasses.dataclass(frozen=True)
class Charged:
    """Runs of one kind without an estimate in a part, and the cycles charged for them together."""

    part: str
    kind: str
    count: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Account:
    """parts: those of every step, then others. charges: the largest first. total_cycles: estimated
    and charged, kernels included. open_rounds: counted of each loop whose end the device finds.
    seconds: all cycles at the chip's clock, and the wires that no matmul covers.
    """

    parts: tuple[Part, ...]
    charges: tuple[Charged, ...]
    total_cycles: int
    open_rounds: int
    seconds: float


def make_account(
    module: Module, collectives: list[Collective], topology: Topology, chip: Chip
) -> Account:
    """The account of a program that was compiled with full effort."""
    part_of = parts_by_instruction(module)
    cycles: collections.Counter[str] = collections.Counter()
    charged: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for instruction, times in module.scheduled():
        part = part_of[instruction.name]
        cycles[part] += times * (instruction.estimated_cycles or 0)
        if found := charge(module, instruction, chip):
            charged[part, found.kind] += times * found.cycles
            counts[part, found.kind] += times
    wires: dict[str, float] = {}
    runs: dict[str, int] = {}
    for collective in collectives:
        seconds = ici_seconds(collective, topology, chip) + network_seconds(collective, chip)
        before = wires.get(collective.scheduled, 0.0)
        wires[collective.scheduled] = before + seconds / max(1, collective.times)
        runs[collective.scheduled] = collective.times
    starts = _wrapped_in(module)

    def estimated(instruction: Instruction) -> float:
        return (instruction.estimated_cycles or 0) / chip.clock

    covered: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, seconds in covered_seconds(module, wires, estimated).items():
        covered[part_of[starts.get(name, name)]] += seconds
    sent: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, seconds in wires.items():
        sent[part_of[name]] += seconds * runs[name]
    charges = sorted(
        (Charged(p, k, counts[p, k], round(total)) for (p, k), total in charged.items()),
        key=lambda c: -c.cycles,
    )
    by_part: collections.Counter[str] = collections.Counter()
    for entry in charges:
        by_part[entry.part] += entry.cycles
    names = [*STEP, *sorted(set(part_of.values()) - set(STEP))]
    parts = tuple(
        Part(name, cycles[name], by_part[name], sent[name], covered[name]) for name in names
    )
    total = sum(part.cycles + part.charged for part in parts)
    uncovered = sum(part.wire_seconds - part.covered_seconds for part in parts)
    return Account(parts, tuple(charges), total, module.open_rounds, total / chip.clock + uncovered)


def _wrapped_in(module: Module) -> dict[str, str]:
    """The collective that a generic start wraps, by the start: the part is the collective's."""
    return {
        start.name: inner.name
        for start, _ in module.scheduled()
        if start.opcode == "async-start"
        for inner in module.computations.get(start.called("calls") or "", ())
        if inner.root
    }
