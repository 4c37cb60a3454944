"""Compiles a program and keeps what the compiler says of it, also where memory does not suffice."""

import dataclasses
import re
import tempfile
import time
from pathlib import Path

import jax

from stem_jax.planning import hlo
from stem_jax.planning.memory import SIZE, Memory, memory_of, refused_memory, size_of
from stem_jax.planning.program import Program

# One entry of the list of allocations in the compiler's message.
_ALLOCATION = re.compile(
    rf"^  \d+\. Size: {SIZE}$(?P<rest>(?:\n     .*)*)",
    re.MULTILINE,
)
_FIELD = re.compile(r"^     (Operator|Shape|Tag): (.*)$", re.MULTILINE)
_PEAK = re.compile(r"^  Live ranges at \d+ \(peak\):$", re.MULTILINE)
_LIVE = re.compile(r"^    ([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", re.MULTILINE)
_LITTLE_EFFORT = {"exec_time_optimization_effort": -1.0}
# Instructions whose result is somebody else's memory, or the caller's.
_NO_BUFFER = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant"}
_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that exists when most memory is used: its size, shape and origin."""

    bytes: int
    shape: str
    origin: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of a compilation.

    memory: by kind; where the compiler refused, arguments and temporaries as far as it said.
    refused: the compiler's words where it ran out of memory, else "". buffers: the largest.
    module: the optimised program; None if there is no text of it. flops, bytes_accessed: the
    compiler's own estimates, where loops count once and kernels not at all.
    """

    memory: Memory
    refused: str
    buffers: tuple[Buffer, ...]
    module: hlo.Module | None
    seconds: float
    flops: float | None
    bytes_accessed: float | None


def compile_program(
    program: Program, *, full_effort: bool = False, options: dict | None = None
) -> Compiled:
    """Compiles; running out of memory is a result, every other failure raises.

    Args:
        full_effort: search for the fastest code as a run does. Without it the same program and
            buffers come out in a fraction of the time (one FFN of the 1B shape: 1.4 s and not 19).
        options: what the compiler is told beside.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        refused, compiled = "", None
        try:
            # The dump holds the program and its peak of memory also when compilation fails.
            told = {"xla_dump_to": folder} | ({} if full_effort else _LITTLE_EFFORT)
            compiled = program.lowered.compile(compiler_options=told | (options or {}))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error)
        seconds = time.perf_counter() - start
        texts = _dumped(Path(folder))
    text = compiled.as_text() if compiled else texts.get("after_optimizations", "")
    module = hlo.parse(text, program.rounds, program.distinct) if text else None
    costs = (compiled.cost_analysis() or {}) if compiled else {}
    return Compiled(
        memory=memory_of(compiled, texts.get("after_optimizations-memory-usage-report", ""))
        if compiled
        else refused_memory(refused, program),
        refused=refused,
        buffers=_allocations(refused)
        or _buffers(texts.get("after_optimizations-live-range", ""), module),
        module=module,
        seconds=seconds,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
    )


def _dumped(folder: Path) -> dict[str, str]:
    """Text files of the largest module, by the part of their name that says what they are."""
    programs = sorted(folder.rglob("*after_optimizations.txt"), key=lambda p: p.stat().st_size)
    if not programs:
        return {}
    prefix = programs[-1].name.removesuffix("after_optimizations.txt")
    return {
        path.name.removeprefix(prefix).removesuffix(".txt"): path.read_text()
        for path in programs[-1].parent.glob(f"{prefix}*.txt")
    }


def _allocations(message: str) -> tuple[Buffer, ...]:
    """The compiler's own list of what takes most, padding and working memory included."""
    found = []
    for entry in _ALLOCATION.finditer(message):
        fields = dict(_FIELD.findall(entry["rest"]))
        origin = hlo.OP_NAME.search(fields.get("Operator", ""))
        shape = fields.get("Shape", "?").partition("{")[0]
        tag = fields.get("Tag") or (origin.group(1) if origin else "")
        found.append(Buffer(size_of(entry.group(1), entry.group(2)), shape, tag))
    return tuple(found[:_LISTED])


def _buffers(live_ranges: str, module: hlo.Module | None) -> tuple[Buffer, ...]:
    """The largest arrays at the peak; without an account of it, the largest results."""
    if module is None:
        return ()
    peak = _PEAK.search(live_ranges)
    if peak:
        lines = live_ranges[peak.end() :].partition("\n  Stack trace")[0]
        sized = [(name, place, int(size)) for name, place, size in _LIVE.findall(lines)]
    else:
        sized = [
            (instruction.name, "", sum(a.padded_bytes for a in instruction.arrays if not a.on_chip))
            for instruction, _ in module.scheduled()
        ]
    found: dict[tuple[str, str, int], int] = {}
    for name, place, size in sized:
        instruction = module.instructions.get(name)
        if instruction is None or instruction.opcode in _NO_BUFFER:
            continue
        arrays = instruction.arrays
        leaf = int(place.split(",")[0]) if place else 0
        shape = str(arrays[min(leaf, len(arrays) - 1)]) if arrays else "?"
        key = (shape, instruction.op_name or instruction.opcode, size)
        found[key] = found.get(key, 0) + 1
    ordered = sorted(found.items(), key=lambda item: -item[0][2] * item[1])[:_LISTED]
    return tuple(Buffer(size, shape, origin, count) for (shape, origin, size), count in ordered)
