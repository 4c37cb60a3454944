"""Cycles for what the compiler gives none: kernels, gathers, scatters, sorts, copies.

Charged is the longest of three times: its matmuls at 70% of the chip's peak, all its other
arithmetic at the 4,096 elements a cycle that the vector unit of a core takes, and its bytes at 80%
of the HBM's bandwidth. An account without them would reward hiding work in them.
"""

import dataclasses
import math
import re

from stem_jax.hardware import Chip
from stem_jax.planning.collectives import AWAITS, KINDS, STARTS
from stem_jax.planning.gpu_kernels import GPU_KERNELS, gpu_kernel_work
from stem_jax.planning.hlo import Instruction, Module
from stem_jax.planning.kernel_body import KernelWork, kernel_work
from stem_jax.planning.traffic import FREE, moved_bytes

_TPU_KERNEL = "tpu_custom_call"
MATMULS = ("dot", "convolution")
_MATMUL_SHARE, _HBM_SHARE = 0.7, 0.8
_VECTOR_ELEMENTS = 4096
# Names and places of memory, without work.
_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
# They move values, in another shape or format.
MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "dynamic-slice"),
    *("dynamic-update-slice", "gather", "get-tuple-element", "iota", "pad", "parameter"),
    *("reshape", "reverse", "scatter", "slice", "transpose", "tuple", "fusion", "custom-call"),
    *("copy-start", "copy-done", "slice-start", "slice-done"),
}
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Charge:
    """Of one run of an instruction. kind: kernel, scatter, gather, sort, copy (in the background),
    or "other"; kernels whose body cannot be read are "unread kernel", charged by their bytes alone.
    """

    kind: str
    cycles: float


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one run of an instruction: FLOPs of matmuls, elements of all other arithmetic, bytes from
    and to HBM. kind: as in `Charge`. float8: of the FLOPs, products of 8-bit floats.
    """

    kind: str
    flops: int
    operations: int
    bytes: int
    float8: int = 0


def work_of(module: Module, instruction: Instruction) -> Work | None:
    """The work of one run; None for what does none or is all wires."""
    inside = [instruction, *module.fused(instruction)]
    if _free(instruction, inside):
        return None
    moved = moved_bytes(module, instruction)
    if is_kernel(instruction):
        work = _kernel_work(module, instruction)
        if work is None:
            return Work("unread kernel", 0, 0, moved)
        return Work(
            "kernel", work.flops, work.operations, moved if work.bytes is None else work.bytes
        )
    flops = [_matmul_flops(module, i) for i in inside]
    float8 = sum(n for n, i in zip(flops, inside, strict=True) if n and _of_float8(module, i))
    operations = sum(_operations(module, i) for i in inside)
    return Work(_kind(inside), sum(flops), operations, moved, float8)


def charge(module: Module, instruction: Instruction, chip: Chip) -> Charge | None:
    """The charge for one run; None for what has an estimate, does no work, or is all wires."""
    if instruction.estimated_cycles is not None:
        return None
    work = work_of(module, instruction)
    if work is None:
        return None
    return Charge(
        work.kind,
        max(
            work.flops / (_MATMUL_SHARE * chip.flops) * chip.clock,
            work.operations / (_VECTOR_ELEMENTS * chip.cores),
            work.bytes / (_HBM_SHARE * chip.hbm_bandwidth) * chip.clock,
        ),
    )


def is_kernel(instruction: Instruction) -> bool:
    """Whether it calls a kernel that is not the compiler's own."""
    target = instruction.target
    return target == _TPU_KERNEL or target.startswith(GPU_KERNELS)


def _kernel_work(module: Module, instruction: Instruction) -> KernelWork | None:
    if instruction.target == _TPU_KERNEL:
        return kernel_work(instruction.attributes)
    return gpu_kernel_work(module, instruction)


def holds_matmul(module: Module, instruction: Instruction) -> bool:
    """Whether a scheduled instruction is a matmul, or has one fused into it."""
    return any(i.opcode in MATMULS for i in (instruction, *module.fused(instruction)))


def _free(instruction: Instruction, inside: list[Instruction]) -> bool:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or instruction.target in _TARGETS:
        return True
    # Collectives are charged in seconds; `send` and `recv` are those between slices.
    wires = {*KINDS, "send", "recv"}
    return any(
        i.opcode.removesuffix("-start") in wires or i.target in (STARTS, AWAITS) for i in inside
    )


def _kind(inside: list[Instruction]) -> str:
    opcodes = {i.opcode for i in inside}
    if opcodes & {"copy-start", "slice-start"}:
        return "copy"
    return next((kind for kind in ("scatter", "gather", "sort") if kind in opcodes), "other")


def _found(pattern: re.Pattern[str], instruction: Instruction) -> re.Match[str]:
    found = pattern.search(instruction.attributes)
    if found is None:
        raise ValueError(
            f"{instruction.opcode} without {pattern.pattern}: {instruction.attributes}"
        )
    return found


def _matmul_flops(module: Module, instruction: Instruction) -> int:
    if instruction.opcode not in MATMULS:
        return 0
    left, right = module.operands(instruction)[:2]
    result = math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "dot":
        places = _found(_CONTRACTED, instruction).group(1)
        return 2 * result * math.prod(left.shape[int(p)] for p in places.split(",") if p)
    # Of a kernel [.., i, o] each result takes everything but the outputs.
    outputs = right.shape[_found(_LABELS, instruction).group(2).index("o")]
    return 2 * result * math.prod(right.shape) // outputs


def _of_float8(module: Module, matmul: Instruction) -> bool:
    return all(array.dtype.startswith("f8") for array in module.operands(matmul)[:2])


def _operations(module: Module, instruction: Instruction) -> int:
    """Elements that the vector unit computes."""
    opcode = instruction.opcode
    if opcode in FREE or opcode in MATMULS or opcode in MOVES - {"convert"}:
        return 0
    made = max((math.prod(array.shape) for array in instruction.arrays), default=0)
    if opcode == "sort":
        # A sorting network: log n (log n + 1) / 2 stages, each over all that is sorted.
        stages = math.ceil(math.log2(max(2, max(instruction.arrays[0].shape, default=1))))
        return stages * (stages + 1) // 2 * sum(math.prod(a.shape) for a in instruction.arrays)
    if opcode in ("reduce", "reduce-window", "map"):
        return max([made, *(math.prod(array.shape) for array in module.operands(instruction))])
    return made
