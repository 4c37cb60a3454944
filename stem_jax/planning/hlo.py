"""Reads the text of an optimised HLO module: its instructions, and how often each one runs.

Enough of the language for accounts of memory and traffic. A loop runs as often as XLA says
(`known_trip_count`), or as its condition says when that compares a counter with a constant
(counters start at 0 and rise by 1, as JAX writes them). The rounds of the exchange end on the
device; whoever reads the program says how many to expect of such a loop.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM_BYTES = {"pred": 1, "s4": 1, "u4": 1, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_MEMORY_SPACE = re.compile(r"S\(([1-9]\d*)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result, or of an operand.

    order: dimensions from minor to major. tile: of the minor dimensions; empty when untiled.
    on_chip: whether it lies in the chip's own memory (VMEM, registers) and not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * _item_bytes(self.dtype)

    @property
    def padded_bytes(self) -> int:
        """Bytes with the minor dimensions rounded up to the tile."""
        sizes = [self.shape[dimension] for dimension in self.order] or list(self.shape)
        for index, tile in enumerate(reversed(self.tile)):
            if index < len(sizes):
                sizes[index] = -(-sizes[index] // tile) * tile
        return math.prod(sizes) * _item_bytes(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. arrays: the leaves of the result. literal: the text between the parentheses;
    attributes: what follows. root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = _TARGET.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of one run; None where it makes none."""
        found = _CYCLES.search(self.attributes)
        return int(found.group(1)) if found else None

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    def called(self, role: str) -> str | None:
        """The computation named by an attribute such as `body`."""
        return next((name for key, name in _CALLED.findall(self.attributes) if key == role), None)

    @property
    def body(self) -> str:
        """Of a loop, the computation of a round."""
        return self.called("body") or ""


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: instructions by computation. entry: the name of the one that runs first.
    open_rounds: counted of a loop whose end only the device knows. distinct: rows that are counted
    of the values of a sum by row, over these values.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    open_rounds: int = 1
    distinct: float = 1.0

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions by name; names are unique in a module."""
        return {i.name: i for body in self.computations.values() for i in body}

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays an instruction reads."""
        found = (self.instructions.get(name) for name in instruction.operands)
        return [array for operand in found if operand for array in operand.arrays]

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """What runs inside a fusion, fusions in it included."""
        if instruction.opcode == "fusion":
            for inner in self.computations.get(instruction.called("calls") or "", ()):
                yield inner
                yield from self.fused(inner)

    def scheduled(self, computation: str = "") -> Iterator[tuple[Instruction, int]]:
        """What runs on its own in one run of the program or of a computation, and how often."""
        yield from self._walk(computation or self.entry, 1)

    def trip_count(self, loop: Instruction) -> int | None:
        """Rounds of a `while`; None when the device decides."""
        known = _TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known.group(1))
        for root in self.computations.get(loop.called("condition") or "", ()):
            if root.root and root.opcode in ("compare", "fusion"):
                bounds = (self.instructions.get(name) for name in root.operands)
                constants = [b.literal for b in bounds if b and b.opcode == "constant"]
                if len(constants) == 1 and constants[0].isdigit():
                    return int(constants[0])
        return None

    def rounds(self, loop: Instruction) -> int:
        """Rounds that are counted of a `while`."""
        known = self.trip_count(loop)
        return self.open_rounds if known is None else known

    def _walk(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations.get(computation, ()):
            yield instruction, times
            if instruction.opcode == "while":
                rounds = self.rounds(instruction)
                yield from self._walk(instruction.body, times * rounds)
            elif instruction.opcode == "conditional":
                yield from self._walk_branches(instruction, times)
            elif instruction.opcode in ("call", "async-start"):
                called = instruction.called("to_apply") or instruction.called("calls")
                yield from self._walk(called or "", times)

    def _walk_branches(self, instruction: Instruction, times: int):
        branches = _BRANCHES.search(instruction.attributes)
        names = _NAME.findall(branches.group(1)) if branches else []
        names += [instruction.called(f"{side}_computation") for side in ("true", "false")]
        for name in names:
            if name:
                yield from self._walk(name, times)


def parse(text: str, open_rounds: int = 1, distinct: float = 1.0) -> Module:
    """Reads the text of a module; the numbers as in `Module`."""
    bodies: dict[str, list[list[str]]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = bodies.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.append([line])
        elif current:
            # Attributes of kernels may hold line breaks.
            current[-1].append(line)
    computations = {
        name: tuple(_instruction(" ".join(lines)) for lines in body)
        for name, body in bodies.items()
    }
    return Module(computations, entry, open_rounds, distinct)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays in a type such as `(f32[8,16]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if found is None:
        raise ValueError(f"no instruction: {line}")
    root, name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        arrays=arrays_of(kind),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        literal=inside,
        root=root is not None,
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _array(dtype: str, shape: str, layout: str) -> Array:
    sizes = tuple(int(size.lstrip("<=")) for size in shape.split(",") if size)
    order, _, tiling = layout.strip("{}").partition(":")
    tile = _TILE.search(tiling)
    return Array(
        dtype=dtype,
        shape=sizes,
        order=tuple(int(d) for d in order.split(",") if d.isdigit()),
        tile=tuple(int(t) for t in tile.group(1).split(",") if t.isdigit()) if tile else (),
        on_chip=_MEMORY_SPACE.search(tiling) is not None,
    )


def _item_bytes(dtype: str) -> int:
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return max(int(digits.group(1)) // 8, 1) if digits else 1
