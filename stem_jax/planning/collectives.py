"""What the devices of a compiled program send each other, by kind."""

import dataclasses
import re

from stem_jax.planning.hlo import Module

KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# Between slices a TPU program hands its data to the host: a `send` that names what it is part of.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    bytes: what a chip sends in one run of it, by the ring algorithm: (n - 1) / n of the whole array
    for a gather, scatter or exchange in a group of n, twice that for an all-reduce. times: runs per
    step. group: the chips that take part, or between slices the slices. crosses: whether the bytes
    go from slice to slice, over the data-centre network.
    """

    kind: str
    name: str
    origin: str
    bytes: float
    times: int
    group: int
    crosses: bool

    @property
    def total(self) -> float:
        """Bytes that a chip sends in a step."""
        return self.bytes * self.times


def collectives_of(module: Module, slices: list[int]) -> list[Collective]:
    """All collectives of a program.

    Args:
        module: the optimised program of one device.
        slices: slice of each device, in the order of the mesh.
    """
    found = []
    for instruction, times in _with_fused(module):
        kind = instruction.opcode.removesuffix("-start")
        read = sum(array.bytes for array in module.operands(instruction))
        if kind == "send" and (between := _BETWEEN_SLICES.search(instruction.attributes)):
            kind, crosses = between.group(1).lower().replace("_", "-"), True
            # Only the data axis spans slices, so that every transfer joins all of them.
            size = len(set(slices))
        elif kind in KINDS:
            groups = device_groups(instruction.attributes, len(slices))
            size = max(map(len, groups), default=1)
            crosses = any(len({slices[device] for device in group}) > 1 for group in groups)
        else:
            continue
        sent = _sent(kind, read, size)
        if sent:
            found.append(
                Collective(kind, instruction.name, instruction.op_name, sent, times, size, crosses)
            )
    return found


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of devices that a collective joins, in any of the notations of XLA."""
    if found := _PAIRS.search(attributes) or _EXPLICIT.search(attributes):
        return _groups(found.group(1))
    if found := _IOTA.search(attributes):
        shape, reshape, order = (_numbers(part or "") for part in found.groups())
        return _chunks(_transposed(reshape, order or list(range(len(reshape)))), shape[-1])
    if found := _MESH.search(attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        names, joined = list(axes), re.findall(r"'([^']+)'", found.group(2))
        sizes = [int(axes[name]) for name in names]
        apart = [index for index, name in enumerate(names) if name not in joined]
        together = [names.index(name) for name in joined]
        size = 1
        for index in together:
            size *= sizes[index]
        return _chunks(_transposed(sizes, apart + together), size)
    return [list(range(devices))]


def _groups(text: str) -> list[list[int]]:
    """Reads {1,2},{3,4}."""
    return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]


def _with_fused(module: Module):
    """The scheduled instructions and, for those that wrap a collective, what they wrap."""
    for instruction, times in module.scheduled():
        yield instruction, times
        if instruction.opcode == "fusion":
            for inner in module.computations.get(instruction.called("calls") or "", ()):
                yield inner, times


def _sent(kind: str, read: int, size: int) -> float:
    share = (size - 1) / size
    sent = {
        "all-to-all": read * share,
        "all-gather": read * (size - 1),
        "reduce-scatter": read * share,
        "all-reduce": 2 * read * share,
    }
    return sent.get(kind, read)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """The numbers 0, 1, ... as an array of these sizes, its dimensions reordered, flattened."""
    strides = [1] * len(sizes)
    for index in range(len(sizes) - 2, -1, -1):
        strides[index] = strides[index + 1] * sizes[index + 1]
    numbers = [0]
    for dimension in order:
        numbers = [n + i * strides[dimension] for n in numbers for i in range(sizes[dimension])]
    return numbers


def _chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
