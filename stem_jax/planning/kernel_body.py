"""What a Pallas kernel for TPUs does, read from the body that its call carries.

The compiler gives kernels no cycles. A call holds the kernel's program as MLIR bytecode: its grid,
the windows that move between HBM and the chip, and what one grid step computes. A step counts
whole, with the branches that a mask or a first step would skip, and a loop without constant bounds
counts once. How often a branch copies is data, and what a kernel says that it moves (its
`cost_estimate`) is believed of such copies alone: never less than all the others move, nor more
than if every step took every branch.
"""

import base64
import dataclasses
import math
import re

_BODY = re.compile(r'"custom_call_config":\{"body":"([^"]+)"')
_DECLARED = re.compile(r'"cost_estimate":\{[^{}]*"bytes_accessed":"(\d+)"')
_SHAPED = re.compile(r"(?:vector|memref)<((?:\d+x)*)([a-z]+\d+)")
_PREFIX = "stable_mosaic."
# They name values, or move them between registers and the chip's memory: no vector arithmetic.
_MOVES = ("constant", "shape_cast", "load", "store", "slice", "bitcast", "yield", "extract")
# A float32 product at the highest precision is six passes of bfloat16.
_HIGHEST_PASSES = 6


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Of one call: FLOPs of matmuls, elements of all other arithmetic, bytes from and to HBM; None
    for the bytes where the kernel names no windows.
    """

    flops: int
    operations: int
    bytes: int | None


def kernel_work(attributes: str) -> KernelWork | None:
    """The work of a call with these attributes; None if it holds no body that can be read."""
    found = _BODY.search(attributes)
    if not found:
        return None
    # The dialect of these bodies comes with JAX's own compiler bindings.
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        context.load_all_available_dialects()
        try:
            module = ir.Module.parse(base64.b64decode(found.group(1)))
        except (ir.MLIRError, ValueError):
            return None
        functions = {
            ir.StringAttr(op.operation.attributes["sym_name"]).value: op.operation
            for op in module.body.operations
            if "sym_name" in op.operation.attributes
        }
        main = next(f for f in functions.values() if "iteration_bounds" in f.attributes)
        grid = _integers(main.attributes["iteration_bounds"])
        work = _Work()
        work.add(main.regions[0].blocks[0], math.prod(grid))
        moved = _window_bytes(main, functions, grid)
        if moved is not None:
            declared = _DECLARED.search(attributes)
            most = moved + work.copied
            least = most - work.copied_in_branches
            moved = min(max(least, int(declared.group(1))), most) if declared else most
        return KernelWork(work.flops, work.operations, moved)


@dataclasses.dataclass
class _Work:
    flops: int = 0
    operations: int = 0
    copied: int = 0
    copied_in_branches: int = 0

    def add(self, block, times: int, branch: bool = False) -> None:
        """Adds what a block does in so many runs."""
        for op in block.operations:
            operation = op.operation
            name = operation.name.removeprefix(_PREFIX)
            if name in ("tpu.matmul", "vector.contract"):
                self.flops += times * _matmul_flops(operation)
            elif name == "tpu.enqueue_dma":
                size = times * _bytes(operation.operands[0].type)
                self.copied += size
                self.copied_in_branches += size if branch else 0
            elif not operation.regions and not name.endswith(_MOVES):
                sizes = [_elements(value.type) for value in _values(operation, name)]
                self.operations += times * max(sizes, default=0)
            rounds = _rounds(operation) if name == "scf.for" else 1
            for region in operation.regions:
                for inner in region.blocks:
                    self.add(inner, times * rounds, branch or name == "scf.if")


def _values(operation, name: str):
    """What the size of an operation shows in: a reduction reads more than it gives."""
    return operation.operands if "reduc" in name else operation.results


def _matmul_flops(operation) -> int:
    left, right, _ = (_shape(value.type) for value in list(operation.operands)[:3])
    result = _shape(operation.results[0].type)
    batch = result[0] if len(result) == len(left) == 3 else 1
    inner = math.isqrt(math.prod(left) * math.prod(right) // (math.prod(result) * batch))
    named = operation.attributes
    highest = "precision" in named and "<fp32>" in str(named["precision"])
    passes = _HIGHEST_PASSES if highest else 1
    return 2 * math.prod(result) * inner * passes


def _rounds(loop) -> int:
    """Rounds of a loop with constant bounds."""
    bounds = []
    for operand in list(loop.operands)[:3]:
        owner = operand.owner
        value = re.match(r"(-?\d+) :", str(getattr(owner, "attributes", {}).get("value", "")))
        if value is None:
            return 1
        bounds.append(int(value.group(1)))
    first, end, step = bounds
    return max(0, -(-(end - first) // step))


def _window_bytes(main, functions, grid: list[int]) -> int | None:
    """Bytes of the windows: one is moved again when its place changes from a step to the next."""
    if "window_params" not in main.attributes:
        return None
    windows = list(main.attributes["window_params"])
    arguments = list(main.regions[0].blocks[0].arguments)[len(grid) :]
    prefetched = int(str(main.attributes["scalar_prefetch"]).split(" ")[0])
    total = sum(_bytes(argument.type) for argument in arguments[:prefetched])
    for argument, window in zip(arguments[prefetched:], windows, strict=False):
        place = re.search(r"transform_indices = @([\w.\-]+)", str(window))
        # What stays in HBM is read by copies of the body's own.
        if place is None or not re.search(r"<[vs]mem>", str(argument.type)):
            continue
        block = functions[place.group(1)].regions[0].blocks[0]
        last = max(_depends_on(block, len(grid)), default=-1)
        total += _bytes(argument.type) * math.prod(grid[: last + 1])
    return total


def _depends_on(block, grid: int) -> set[int]:
    """Dimensions of the grid that the results of a block depend on."""
    operations = [op.operation for op in block.operations]
    made = {str(r.get_name()): o for o in operations for r in o.results}
    arguments = {str(a.get_name()): place for place, a in enumerate(block.arguments)}
    pending, seen = list(operations[-1].operands), set()
    while pending:
        name = str(pending.pop().get_name())
        if name not in seen:
            seen.add(name)
            pending += list(made[name].operands) if name in made else []
    return {arguments[name] for name in seen if arguments.get(name, grid) < grid}


def _integers(attribute) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", str(attribute).partition(":")[2])]


def _shape(kind) -> list[int]:
    found = _SHAPED.search(str(kind))
    return [int(size) for size in found.group(1).split("x") if size] if found else []


def _elements(kind) -> int:
    """Of a vector; 0 for a scalar, which another unit computes."""
    return math.prod(_shape(kind)) if str(kind).startswith("vector") else 0


def _bytes(kind) -> int:
    found = _SHAPED.search(str(kind))
    assert found is not None, kind
    bits = int(re.sub(r"\D", "", found.group(2)))
    return math.prod(_shape(kind)) * max(bits // 8, 1)
