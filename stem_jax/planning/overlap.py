"""How much of each collective's time the matmuls scheduled between its start and its end cover.

A matmul counts for one collective alone: for the one of those under way that is awaited first. A
loop between start and end offers the matmuls that no collective inside it has.
"""

import dataclasses
import math
from collections.abc import Callable

from stem_jax.planning.charges import holds_matmul
from stem_jax.planning.collectives import AWAITS, STARTS
from stem_jax.planning.hlo import Instruction, Module


@dataclasses.dataclass
class _UnderWay:
    name: str
    end: int
    missing: float


def covered_seconds(
    module: Module, wires: dict[str, float], seconds_of: Callable[[Instruction], float]
) -> dict[str, float]:
    """Seconds per step, by the instruction that starts the collective.

    Args:
        wires: seconds of one run of the collectives that a scheduled instruction starts.
        seconds_of: what one run of an instruction with a matmul takes.
    """
    covered = dict.fromkeys(wires, 0.0)
    _cover(module, module.entry, 1, wires, seconds_of, covered)
    return covered


def _cover(module: Module, computation: str, times: int, wires, seconds_of, covered):
    """Adds what one run of a computation covers, `times` over; the matmuls that are left over, as
    (seconds, runs).
    """
    body = module.computations.get(computation, ())
    ends = _ends(module, body)
    under_way: list[_UnderWay] = []
    left = []
    for place, instruction in enumerate(body):
        under_way = [c for c in under_way if c.end > place]
        name = instruction.name
        for seconds, runs in _matmuls(module, instruction, times, wires, seconds_of, covered):
            for collective in sorted(under_way, key=lambda c: c.end):
                used = min(runs, math.ceil(collective.missing / seconds))
                gain = min(collective.missing, used * seconds)
                collective.missing -= gain
                covered[collective.name] += gain * times
                runs -= used
            if runs:
                left.append((seconds, runs))
        if name in ends:
            under_way.append(_UnderWay(name, ends[name], _seconds(module, instruction, wires)))
            covered.setdefault(name, 0.0)
    return left


def _matmuls(module: Module, instruction: Instruction, times, wires, seconds_of, covered):
    opcode = instruction.opcode
    if opcode == "while":
        rounds = module.rounds(instruction)
        inner = _cover(module, instruction.body, times * rounds, wires, seconds_of, covered)
        return [(seconds, runs * rounds) for seconds, runs in inner]
    if opcode == "call":
        called = instruction.called("to_apply") or ""
        return _cover(module, called, times, wires, seconds_of, covered)
    if holds_matmul(module, instruction) and (seconds := seconds_of(instruction)):
        return [(seconds, 1)]
    return []


def _seconds(module: Module, start: Instruction, wires: dict[str, float]) -> float:
    """Of what an instruction starts; a generic start wraps the collective in a computation."""
    inside = module.computations.get(start.called("calls") or "", ())
    return sum(wires.get(name, 0.0) for name in {start.name, *(i.name for i in inside)})


def _ends(module: Module, body: tuple[Instruction, ...]) -> dict[str, int]:
    """Where each asynchronous collective that starts in a computation is awaited."""
    users: dict[str, list[int]] = {}
    for place, instruction in enumerate(body):
        for operand in instruction.operands:
            users.setdefault(operand, []).append(place)
    found = {}
    for instruction in body:
        wrapped = any(i.target == STARTS for i in module.fused(instruction))
        if wrapped or instruction.opcode.endswith("-start") or instruction.opcode == "send":
            end = _end(module, body, users, instruction, wrapped)
            if end is not None:
                found[instruction.name] = end
    return found


def _end(module: Module, body, users, start: Instruction, wrapped: bool) -> int | None:
    pending = [start.name]
    seen: set[int] = set()
    while pending:
        places = sorted({place for name in pending for place in users.get(name, ())} - seen)
        seen.update(places)
        pending = []
        for place in places:
            user = body[place]
            if user.opcode.endswith("-done") or any(i.target == AWAITS for i in module.fused(user)):
                return place
            # Between start and end libtpu hands on a semaphore, through what works beside.
            element = user.opcode == "get-tuple-element"
            if not wrapped or not element or _is_semaphore(user):
                pending.append(user.name)
    return None


def _is_semaphore(element: Instruction) -> bool:
    [array] = element.arrays
    return array.dtype == "s32" and array.shape == (2,) and array.on_chip
