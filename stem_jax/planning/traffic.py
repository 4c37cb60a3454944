"""Bytes between a chip's cores and its HBM, counted instruction by instruction."""

from stem_jax.planning.hlo import Array, Instruction, Module

# They move nothing themselves: names of other values, control flow, ends of what was started.
FREE = {
    "after-all",
    "async-start",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_RENAMES = {"bitcast", "reshape", "convert", "copy"}


def hbm_bytes(module: Module) -> int:
    """Bytes that a chip reads from and writes to HBM in one run of the program.

    Every scheduled instruction reads its operands and writes its result; what stays on the chip is
    free. Of an operand that is only sliced or gathered from, what is taken counts, and of one that
    is updated in place, the update.
    """
    return sum(
        moved_bytes(module, instruction) * times for instruction, times in module.scheduled()
    )


def moved_bytes(module: Module, instruction: Instruction) -> int:
    """Bytes of one run of a scheduled instruction."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    operands = (module.instructions.get(name) for name in instruction.operands)
    read = [_hbm(operand.arrays) if operand else 0 for operand in operands]
    written = _hbm(instruction.arrays)
    if opcode in _SLICES:
        # Of what it reads, as much as it makes, wherever that lies.
        return (instruction.bytes if read[0] else 0) + written
    if opcode in _UPDATES:
        return sum(read[1:]) + (_update_bytes(module, instruction) if written else 0)
    if opcode == "slice-start":
        # The result is (operands, destination, context): what the destination holds was read.
        taken = instruction.arrays[len(read)]
        return taken.bytes * (1 if taken.on_chip else 2)
    if opcode.endswith("-start"):
        # The result names the operand beside the destination, each where it lies.
        return written
    if opcode == "fusion":
        return _fusion(module, instruction, read, written)
    return sum(read) + written


def _fusion(module: Module, fusion: Instruction, read: list[int], written: int) -> int:
    inside = module.computations.get(fusion.called("calls") or "", ())
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for instruction in inside:
        for place, name in enumerate(instruction.operands):
            users.setdefault(name, []).append((instruction, place))
    parameters = {int(i.literal): i for i in inside if i.opcode == "parameter" and i.literal}
    total = 0
    for index, size in enumerate(read):
        parameter = parameters.get(index)
        if not size or parameter is None:
            total += size
            continue
        partial, updated = _partial_use(module, parameter.name, users)
        total += size if partial is None else min(partial, size)
        # An operand updated in place is the result too: only the update is written.
        written = min(written, max(written - size, 0) + updated) if updated else written
    return total + written


def _partial_use(module: Module, name: str, users, depth: int = 0) -> tuple[int | None, int]:
    """Bytes taken from a value and bytes written into it; (None, 0) where all of it is read."""
    taken = updated = 0
    for user, place in users.get(name, []):
        if user.opcode in _SLICES and place == 0:
            taken += user.bytes
        elif user.opcode in _UPDATES and place == 0:
            updated += _update_bytes(module, user)
        elif user.opcode in _RENAMES and depth < 4:
            inner, inner_updated = _partial_use(module, user.name, users, depth + 1)
            if inner is None:
                return None, 0
            taken, updated = taken + inner, updated + inner_updated
        else:
            return None, 0
    return taken, updated


def _update_bytes(module: Module, user: Instruction) -> int:
    place = 1 if user.opcode == "dynamic-update-slice" else -1
    update = module.instructions.get(user.operands[place])
    return update.bytes if update else 0


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)
