"""What kernels for GPUs do, told from the arrays that a call takes and gives.

Three are known: attention of tokamax (Mosaic GPU) and of cuDNN, and this package's sums of rows
(Triton). Of attention the products count that a causal mask leaves, those of one document per row:
kernels skip what lies between documents, of which a program without its batch says nothing.
"""

import math
import re

from stem_jax.kernels.row_segments import ADDED, PUT
from stem_jax.planning.hlo import Array, Instruction, Module
from stem_jax.planning.kernel_body import KernelWork

_CUDNN = "__cudnn$fmha"
_TRITON, _MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu"
# How the targets of their calls begin.
GPU_KERNELS = (_CUDNN, _TRITON, _MOSAIC)
# Products of a pair of positions: scores and values; on the way back scores, the gradient of the
# weights, and those of queries, keys and values, of which a kernel of its own for the queries
# makes three and one for keys and values four.
_FORWARD = 2
_BACKWARD = {1: 3, 2: 4, 3: 5}
_CAUSAL = re.compile(r'"mask_type": *"(?:PADDING_)?CAUSAL"')
_FORWARD_WORKSPACE = 256


def gpu_kernel_work(module: Module, call: Instruction) -> KernelWork | None:
    """The work of a call of `GPU_KERNELS`; None for a kernel that is not known."""
    read = module.operands(call)
    if ADDED in call.op_name:
        # Of each row that has values, the sum is read and written.
        values = math.prod(read[3].shape)
        return _sums_work(read, 2 * min(read[4].shape[0], math.ceil(module.distinct * values)))
    if PUT in call.op_name:
        return _sums_work(read, read[4].shape[0])
    if call.target.startswith(_CUDNN):
        causal = _CAUSAL.search(call.attributes) is not None
        return _attention_work(read, call.arrays, causal)
    if call.target.startswith(_MOSAIC) and "attention" in call.op_name:
        return _attention_work(read, call.arrays, causal=True)
    return None


def cudnn_workspace(module: Module) -> int:
    """Bytes that the largest call of cuDNN's attention takes for itself, of which a program that
    was compiled without cuDNN says nothing.

    Backward 4 B H L Dh, with fewer heads of keys as many again, and 4 B H L: within 256 bytes what
    cuDNN asks for at seven shapes on H100 and B200; forward 256.
    """
    calls = [i for i, _ in module.scheduled() if i.target.startswith(_CUDNN)]
    return max((_workspace(module.operands(call), call) for call in calls), default=0)


def _workspace(read: list[Array], call: Instruction) -> int:
    if "Backward" not in call.target:
        return _FORWARD_WORKSPACE
    (batch, length, heads, width), keys = (array.shape for array in read[:2])
    size = 4 * batch * heads * length * width
    return size * (2 if keys[2] != heads else 1) + 4 * batch * heads * length


def _attention_work(read: list[Array], made: tuple[Array, ...], causal: bool) -> KernelWork:
    (batch, length, number, width), (_, keys, *_) = (_with_batch(array) for array in read[:2])
    # In whatever order: arrays of queries, keys or values, and gradients of those; of keys and
    # values there is one for each head of the queries.
    like = [*(sorted(_with_batch(a)) for a in read[:2]), sorted((batch, keys, number, width))]
    taken, given = (sum(sorted(_with_batch(a)) in like for a in arrays) for arrays in (read, made))
    products = _BACKWARD[given] if taken > 3 else _FORWARD
    # Queries of one device along `context` see half of all keys too, early and late ones together;
    # but their gradients come from a kernel that skips no blocks.
    halved = causal and (length == keys or taken == 3)
    pairs = length * (keys + 1) // 2 if halved else length * keys
    pairs *= batch * number
    # The exponential and what stands around it: some five operations for each pair.
    return KernelWork(2 * products * pairs * width, 5 * pairs, None)


def _with_batch(array: Array) -> tuple[int, ...]:
    """Its shape, of four sizes at least: tokamax leaves a batch of one out."""
    return (1,) * (4 - len(array.shape)) + tuple(array.shape)


def _sums_work(read: list[Array], rows: int) -> KernelWork:
    """Each value is read once; rows: of the first array, that are read or written."""
    into, _, values, positions, bounds = read
    row = into.bytes // max(1, into.shape[0] * into.shape[1])
    moved = values.bytes + positions.bytes + bounds.bytes + rows * row
    return KernelWork(0, positions.shape[0] * into.shape[-1], moved)
