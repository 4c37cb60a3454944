"""What calls of GPUs' kernels are charged with, from texts of real programs, cut short."""

import dataclasses

import pytest

from stem_jax.hardware import Chip
from stem_jax.planning import hlo
from stem_jax.planning.charges import work_of
from stem_jax.planning.gpu_kernels import cudnn_workspace
from stem_jax.planning.work_account import least_seconds

# A layer of the 350M shape on one GPU: 16 sequences of 2048, 15 heads of 64 that share 5 of keys.
_Q, _K, _BIAS = (
    "bf16[16,2048,15,64]{3,2,1,0}",
    "bf16[16,2048,5,64]{3,2,1,0}",
    "bf16[16,1,2048,2048]",
)
# cuDNN's results have heads before positions.
_DQ, _DK = "bf16[16,15,2048,64]{3,1,2,0}", "bf16[16,5,2048,64]{3,1,2,0}"
_SUMS, _STARTS, _BLOCKS = "f32[16,15,2048]{2,1,0}", "s32[16,1,2048]{2,1,0}", "s32[16,1,16]{2,1,0}"
_PAIRS = 16 * 15 * 2048 * 2049 // 2
_ALL_PAIRS = 16 * 15 * 2048 * 2048
_TOKAMAX = (
    'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/part.attention/tokamax:{\\"op\\"'
    ':{\\"__type\\":\\"tokamax._src.ops.attention\\"}}"}'
)


def _called(operands: tuple[str, ...], result: str, attributes: str):
    """The module and the call, of a program of one call."""
    lines = [f"  %p{n} = {kind} parameter({n})" for n, kind in enumerate(operands)]
    names = ", ".join(f"%p{n}" for n in range(len(operands)))
    lines.append(f"  ROOT %call = {result} custom-call({names}), {attributes}")
    module = hlo.parse("ENTRY %main (p: f32[]) -> f32[] {\n" + "\n".join(lines) + "\n}\n")
    return module, module.instructions["call"]


def _cudnn(target: str, mask: str) -> str:
    return (
        f'custom_call_target="__cudnn$fmha{target}", backend_config={{"cudnn_fmha_backend_config": '
        f'{{"fmha_scale": 0.125, "mask_type": "{mask}"}}}}'
    )


@pytest.mark.parametrize(
    ("operands", "result", "products"),
    [
        ((_Q, _K, _K, _STARTS, _BLOCKS, _BLOCKS), f"({_Q}, {_SUMS}, {_SUMS})", 2),
        ((_Q, _K, _K, _STARTS, _BLOCKS, _BLOCKS), _Q, 2),
        # Queries alone, then keys and values: both compute the scores and their gradients.
        ((_Q, _K, _K, _Q, _SUMS, _SUMS, _SUMS, _STARTS), _Q, 3),
        ((_Q, _K, _K, _Q, _SUMS, _SUMS, _SUMS, _STARTS), f"({_Q}, {_Q})", 4),
        # On Blackwell all at once, into arrays that are handed in.
        ((_Q, _K, _K, _Q, _SUMS, _SUMS, _STARTS, _Q, _Q, _Q), f"({_Q}, {_Q}, {_Q})", 5),
    ],
)
def test_attention_of_tokamax_computes_the_causal_half(operands, result, products):
    work = work_of(*_called(operands, result, _TOKAMAX))
    assert (work.kind, work.flops) == ("kernel", 2 * products * _PAIRS * 64)
    assert work.operations == 5 * _PAIRS
    # Each array goes once.
    text = " ".join(operands) + result
    assert work.bytes == sum(array.bytes for array in hlo.arrays_of(text))


@pytest.mark.parametrize("alone", [False, True])
def test_one_sequence_on_a_device_has_no_batch_in_attention_of_tokamax(alone):
    """As with long sequences; the kernels of Blackwell's gradients keep a batch of one."""
    queries, heads, sums = (
        text.replace("[16,", "[1," if alone else "[").replace("{3,2,1,0}", "").split("{")[0]
        for text in (_Q, _K, _SUMS)
    )
    pairs = _PAIRS // 16
    read = (queries, heads, heads)
    forward = work_of(*_called(read, f"({queries}, {sums}, {sums})", _TOKAMAX))
    assert (forward.flops, forward.operations) == (2 * 2 * pairs * 64, 5 * pairs)
    taken = (*read, queries, sums, sums, sums)
    for result, products in ((queries, 3), (f"({queries}, {queries})", 4)):
        assert work_of(*_called(taken, result, _TOKAMAX)).flops == 2 * products * pairs * 64


def test_queries_of_one_device_along_context_see_half_of_the_keys():
    """On the way there; the kernel of their gradients skips no blocks."""
    own = _Q.replace("2048", "1024")
    read = (own, _K, _K, "s32[16,1,1024]{2,1,0}", "s32[16,1,1024]{2,1,0}")
    sums = _SUMS.replace("2048", "1024")
    forward = work_of(*_called(read, f"({own}, {sums}, {sums})", _TOKAMAX))
    assert forward.flops == 2 * 2 * 16 * 15 * (1024 * 2049 // 2) * 64
    taken = (own, _K, _K, own, sums, sums, sums)
    all_pairs = 16 * 15 * 1024 * 2048
    for result, products in ((own, 3), (f"({_Q}, {_Q})", 4)):
        back = work_of(*_called(taken, result, _TOKAMAX))
        assert back.flops == 2 * products * all_pairs * 64


def test_attention_of_cudnn_computes_what_its_mask_says():
    forward = (_Q, _K, _K, _BIAS), f"({_DQ}, {_SUMS}, u8[0]{{0}})"
    dense = work_of(*_called(*forward, _cudnn("ScaleBiasSoftmax", "NO_MASK")))
    assert dense.flops == 2 * 2 * _ALL_PAIRS * 64
    causal = work_of(*_called(*forward, _cudnn("ScaleBiasSoftmax", "CAUSAL")))
    assert causal.flops == 2 * 2 * _PAIRS * 64


def test_workspace_of_cudnn_is_counted_though_the_program_has_none():
    operands = (_Q, _K, _K, _SUMS, _Q, _BIAS, _Q)
    result = f"({_DQ}, {_DK}, {_DK}, {_BIAS}, u8[0]{{0}})"
    module, call = _called(operands, result, _cudnn("ScaleBiasSoftmaxBackward", "NO_MASK"))
    assert work_of(module, call).flops == 2 * 5 * _ALL_PAIRS * 64
    # Queries and, as keys are shared, those again in float32, and a number for each query.
    assert cudnn_workspace(module) == 2 * 4 * 16 * 2048 * 15 * 64 + 4 * 16 * 15 * 2048
    equal = (_Q, _Q, _Q, _SUMS, _Q, _Q)
    made = f"({_DQ}, {_DQ}, {_DQ}, u8[0]{{0}})"
    module, _ = _called(equal, made, _cudnn("SoftmaxBackward", "CAUSAL"))
    assert cudnn_workspace(module) == 4 * 16 * 2048 * 15 * 64 + 4 * 16 * 15 * 2048
    module, _ = _called((_Q, _K, _K), _DQ, _cudnn("Softmax", "CAUSAL"))
    assert cudnn_workspace(module) == 256
    assert cudnn_workspace(_called((_Q,), _Q, _TOKAMAX)[0]) == 0


def test_sums_of_rows_read_each_value_once_and_write_one_layers_rows():
    into, values = "bf16[16,20480,2560]{2,1,0}", "bf16[32768,2560]{1,0}"
    operands = (into, "s32[1]{0}", values, "s32[32768]{0}", "s32[20480,2]{1,0}")
    attributes = (
        'custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, '
        'metadata={op_name="jit(f)/part.row_gradient/segment_sums/pallas_call"}'
    )
    work = work_of(*_called(operands, into, attributes))
    assert (work.kind, work.flops, work.operations) == ("kernel", 0, 32768 * 2560)
    assert work.bytes == 2 * (32768 + 20480) * 2560 + 4 * (32768 + 2 * 20480)


@pytest.mark.parametrize(("distinct", "rows"), [(0.25, 8192), (1.0, 20480)])
def test_sums_that_are_added_pass_over_the_rows_that_have_values(distinct, rows):
    """Each is read and written; others are left alone."""
    into, values = "f32[16,20480,2560]{2,1,0}", "bf16[32768,2560]{1,0}"
    operands = (into, "s32[1]{0}", values, "s32[32768]{0}", "s32[20480,2]{1,0}")
    attributes = (
        'custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, '
        'metadata={op_name="jit(f)/part.row_gradient/added_segment_sums/pallas_call"}'
    )
    module, call = _called(operands, into, attributes)
    work = work_of(dataclasses.replace(module, distinct=distinct), call)
    indices = 4 * (32768 + 2 * 20480)
    assert work.bytes == 2 * 32768 * 2560 + 2 * 4 * rows * 2560 + indices


def test_a_kernel_that_is_not_known_is_charged_its_bytes():
    other = 'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/other"}'
    work = work_of(*_called(("f32[8]{0}",), "f32[8]{0}", other))
    assert (work.kind, work.flops, work.bytes) == ("unread kernel", 0, 64)


@pytest.mark.parametrize(
    ("kinds", "share"),
    [(("f8e4m3fn", "f8e5m2"), 1), (("bf16", "bf16"), 0), (("bf16", "f8e5m2"), 0)],
)
def test_products_of_eight_bits_are_charged_by_their_own_peak(kinds, share):
    operands = f"{kinds[0]}[64,32]{{1,0}}", f"{kinds[1]}[32,16]{{1,0}}"
    lines = [f"  %p{n} = {kind} parameter({n})" for n, kind in enumerate(operands)]
    dot = "  ROOT %dot = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}"
    text = "ENTRY %main (p: f32[]) -> f32[] {\n" + "\n".join([*lines, dot]) + "\n}\n"
    module = hlo.parse(text)
    work = work_of(module, module.instructions["dot"])
    assert (work.flops, work.float8) == (2 * 64 * 32 * 16, share * 2 * 64 * 32 * 16)
    chip = Chip("X", 1e3, 1, 1e12, 1, 1, 1, "a test", elements=1.0, float8=4e3)
    assert least_seconds(work, chip) == work.flops / (4e3 if share else 1e3)
