"""Where the values of a program come from and go to, past the instructions that only name them.

Tuples, their elements, bitcasts and the borders of loops make nothing: a copy in front of a loop
is used by what reads it inside.
"""

import collections
from collections.abc import Set

from stem_jax.planning.hlo import Instruction, Module

_RENAMES = {"bitcast", "copy-done", "slice-done", "opt-barrier", "after-all"}
_TARGETS = {"ConcatBitcast", "AllocateBuffer"}
_INDEX = "index="
# Steps from one instruction to another: what is further away says little.
_FAR = 40

# A value: an instruction and, in a tuple, the place in it; None for all of it.
_Value = tuple[str, int | None]


class ValueFlow:
    """The users and makers of the results of scheduled instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._names = {i.name: i for i, _ in module.scheduled()}
        self._users = collections.defaultdict(list)
        self._parameters, self._roots, self._loops = {}, {}, {}
        computation_of = {}
        for computation, body in module.computations.items():
            for instruction in body:
                computation_of[instruction.name] = computation
                for place, operand in enumerate(instruction.operands):
                    self._users[operand].append((instruction, place))
                if instruction.opcode == "parameter":
                    self._parameters[computation] = instruction.name
                if instruction.root:
                    self._roots[computation] = instruction
        self._computation_of = computation_of
        for instruction in self._names.values():
            if instruction.opcode == "while":
                self._loops[instruction.called("body")] = instruction

    def users(self, name: str, through: Set[str] = frozenset()) -> set[str]:
        """Scheduled instructions that read what this one gives, past those of `through`."""
        return self._reach(name, self._forward, through)

    def makers(self, name: str, through: Set[str] = frozenset()) -> set[str]:
        """Scheduled instructions that give what this one reads, past those of `through`."""
        return self._reach(name, self._back, through)

    def _reach(self, name: str, step, through: Set[str]) -> set[str]:
        found, seen = set(), set()
        pending = list(step((name, None), True))
        for _ in range(_FAR):
            ahead = []
            for value in pending:
                if value in seen:
                    continue
                seen.add(value)
                instruction = self._module.instructions[value[0]]
                if value[0] in through or self._passes(instruction):
                    ahead += step(value, False)
                elif value[0] != name and instruction.opcode != "constant":
                    found.add(value[0])
            pending = ahead
        return found

    def _passes(self, instruction: Instruction) -> bool:
        opcode = instruction.opcode
        return (
            opcode in _RENAMES
            or opcode in ("tuple", "get-tuple-element", "parameter", "while")
            or instruction.target in _TARGETS
        )

    def _forward(self, value: _Value, _first: bool):
        """The users of a value, each with the place at which the value goes on."""
        name, index = value
        instruction = self._module.instructions[name]
        for user, place in self._users[name]:
            if user.opcode == "get-tuple-element":
                if index is None or index == _place(user):
                    yield user.name, None
            elif user.opcode == "tuple":
                yield user.name, place
            elif user.opcode == "while":
                # What goes in at a place is read there inside, and comes out there.
                yield user.name, index
                if parameter := self._parameters.get(user.body):
                    yield parameter, index
            else:
                yield user.name, None
        computation = self._computation_of[name]
        if instruction.root and computation in self._loops:
            yield self._loops[computation].name, index
            yield self._parameters[computation], index

    def _back(self, value: _Value, first: bool):
        name, index = value
        instruction = self._module.instructions[name]
        if instruction.opcode == "parameter":
            loop = self._loops.get(self._computation_of[name])
            if loop is not None:
                yield loop.operands[0], index
                yield self._roots[self._computation_of[name]].name, index
        elif instruction.opcode == "while" and not first:
            yield self._roots[instruction.body].name, index
        elif instruction.opcode == "get-tuple-element":
            yield instruction.operands[0], _place(instruction)
        elif instruction.opcode == "tuple" and index is not None:
            yield instruction.operands[index], None
        else:
            for operand in instruction.operands:
                yield operand, None


def _place(element: Instruction) -> int:
    return int(element.attributes.partition(_INDEX)[2].split(",")[0])
