"""Which part of the step each scheduled instruction belongs to.

A fusion belongs to its matmul if it holds one; else to its own mark, which is that of its result;
else to what it was made from. What has no mark of its own has that of the loop around it. What has
none at all (copies, fills and slices that the compiler or a scan adds) goes where what it gives is
used or, failing that, made, if that is one part alone; the others are the rest.
"""

import collections

from stem_jax.parts import KERNELS, MOVED_FOR, REST, parts_of
from stem_jax.planning.charges import MATMULS, MOVES, is_kernel
from stem_jax.planning.hlo import Instruction, Module
from stem_jax.planning.value_flow import ValueFlow

_SUMS = ("all-reduce", "reduce-scatter")


def parts_by_instruction(module: Module) -> dict[str, str]:
    """The part of every scheduled instruction, by its name."""
    scheduled = {instruction.name: instruction for instruction, _ in module.scheduled()}
    by_kernel = _kernel_parts(module, scheduled.values())
    marked = {name: _marked(module, i, by_kernel) for name, i in scheduled.items()}
    found = _in_loops(module, marked)
    found |= {name: part for name, part in marked.items() if part is not None}
    moves = {name for name, i in scheduled.items() if name not in found and _moves(module, i)}
    flow = ValueFlow(module)

    def placed(name: str, through: set[str], both: bool) -> str | None:
        users, makers = (
            {found[n] for n in side(name, through) if n in found}
            for side in (flow.users, flow.makers)
        )
        if both and not (users and makers):
            return None
        # A sum of gradients is its makers'.
        if scheduled[name].opcode.startswith(_SUMS):
            users, makers = makers, users
        # What a scan itself carries from part to part belongs to neither.
        if scheduled[name].op_name and through and len(users | makers) > 1:
            return _moved_for(users | makers) or REST
        return _between(users, makers, name in moves)

    # First what stands between two marks, past other moves; then the others, one after the other.
    pending = scheduled.keys() - found.keys()
    fresh = {name: placed(name, moves, True) for name in pending}
    while any(fresh.values()):
        found |= {name: part for name, part in fresh.items() if part is not None}
        pending -= found.keys()
        fresh = {name: placed(name, set(), False) for name in pending}
    return found | dict.fromkeys(pending, REST)


def _in_loops(module: Module, marked: dict[str, str | None]) -> dict[str, str]:
    """Of what runs in loops with a mark, the part of the innermost."""
    found: dict[str, str] = {}
    # An outer loop is scheduled before those inside it.
    for name, part in marked.items():
        if part is not None and module.instructions[name].opcode == "while":
            body = module.instructions[name].body
            found |= dict.fromkeys((i.name for i, _ in module.scheduled(body)), part)
    return found


def _between(users: set[str], makers: set[str], moves: bool) -> str | None:
    if moves and len(users | makers) > 1 and (part := _moved_for(users | makers)):
        return part
    clear = next((side for side in (users, makers) if len(side) == 1), None)
    return None if clear is None else _outside(next(iter(clear)))


def _moved_for(parts: set[str]) -> str | None:
    """The part of what moves between these, where one of them has its own."""
    special = {MOVED_FOR[part] for part in parts if part in MOVED_FOR}
    return special.pop() if len(special) == 1 else None


def _kernel_parts(module: Module, scheduled) -> set[str]:
    """Parts of kernels that this program computes by kernels, not by plain operations."""
    calls = [i for i in scheduled if is_kernel(i)]
    return {part for call in calls for part in parts_of(call.op_name)[-1:] if part in KERNELS}


def _marked(module: Module, instruction: Instruction, by_kernel: set[str]) -> str | None:
    inside = list(module.fused(instruction))
    matmuls = [i for i in (instruction, *inside) if i.opcode in MATMULS]
    for candidate in (*matmuls, instruction):
        if part := _innermost(candidate, instruction, by_kernel):
            return part
    # The largest results say most of what a fusion does.
    sizes: collections.Counter[str] = collections.Counter()
    for inner in inside:
        if part := _innermost(inner, instruction, by_kernel):
            sizes[part] += inner.bytes
    return sizes.most_common(1)[0][0] if sizes else None


def _innermost(named: Instruction, scheduled: Instruction, by_kernel: set[str]) -> str | None:
    parts = [
        part for part in parts_of(named.op_name) if part not in by_kernel or is_kernel(scheduled)
    ]
    return parts[-1] if parts else None


def _outside(part: str) -> str:
    return MOVED_FOR[part] if part in KERNELS else part


def _moves(module: Module, instruction: Instruction) -> bool:
    """Whether it only moves or fills."""
    inside = [instruction, *module.fused(instruction)]
    return all(i.opcode in MOVES and not is_kernel(i) for i in inside)
