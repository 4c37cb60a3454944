"""What the devices of a compiled program send each other, by kind."""

import dataclasses
import re

from stem_jax.planning.device_groups import device_groups
from stem_jax.planning.hlo import Instruction, Module
from stem_jax.planning.ring import crossing_share, sent_bytes

_EXCHANGES = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter")
KINDS = (*_EXCHANGES, "all-reduce", "collective-permute")
# Between slices a TPU program hands its data to the host: a `send` that names what it is part of.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# What libtpu puts into the fusion that starts a collective, and into the one that awaits it.
STARTS, AWAITS = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    bytes: what a chip sends in one run of it, by the ring algorithm: (n - 1) / n of the whole array
    for a gather, scatter or exchange in a group of n, twice that for an all-reduce. times: runs per
    step. group: the chips that take part, or between slices the slices. crossing: the share of the
    bytes that goes from slice to slice. scheduled: the instruction that starts it.
    """

    kind: str
    name: str
    origin: str
    bytes: float
    times: int
    group: int
    crossing: float
    scheduled: str = ""

    @property
    def total(self) -> float:
        """Bytes that a chip sends in a step."""
        return self.bytes * self.times

    @property
    def between(self) -> float:
        """Those of them that go from slice to slice, over the data-centre network."""
        return self.total * self.crossing


def collectives_of(module: Module, slices: list[int]) -> list[Collective]:
    """All collectives of a program.

    Args:
        module: the optimised program of one device.
        slices: slice, or host of GPUs, of each device, in the order of the mesh.
    """
    found = []
    for scheduled, instruction, times in _with_fused(module):
        kind = instruction.opcode.removesuffix("-start")
        read = [array.bytes for array in module.operands(instruction)]
        # A ragged exchange is told where to write and how much, beside what it sends.
        total = sum(read[:1] if kind.startswith("ragged") else read)
        if kind == "send" and (between := _BETWEEN_SLICES.search(instruction.attributes)):
            kind, crossing = between.group(1).lower().replace("_", "-"), 1.0
            # Only the data axis spans slices, so that every transfer joins all of them.
            size = len(set(slices))
        elif kind in KINDS:
            groups = device_groups(instruction.attributes, len(slices))
            size = max(map(len, groups), default=1)
            crossing = max(
                (crossing_share(kind, [slices[d] for d in g]) for g in groups), default=0
            )
        else:
            continue
        if sent := sent_bytes(kind, total, size):
            names = instruction.name, instruction.op_name
            found.append(Collective(kind, *names, sent, times, size, crossing, scheduled.name))
    return found


def _with_fused(module: Module):
    """The scheduled instructions and, for those that wrap a collective, what they wrap.

    libtpu writes an asynchronous collective once into the fusion that starts it and again into each
    that works beside it and into the one that awaits it, all with the same channel.
    """
    scheduled = list(module.scheduled())
    inside = {i.name: list(module.fused(i)) for i, _ in scheduled}
    started = {name: any(i.target == STARTS for i in inner) for name, inner in inside.items()}
    channels = {_channel(i) for name, inner in inside.items() if started[name] for i in inner}
    for instruction, times in scheduled:
        yield instruction, instruction, times
        for inner in inside[instruction.name]:
            if started[instruction.name] or _channel(inner) not in channels:
                yield instruction, inner, times


def _channel(instruction: Instruction) -> tuple[str, str] | None:
    found = _CHANNEL.search(instruction.attributes)
    return (instruction.opcode, found.group(1)) if found else None
