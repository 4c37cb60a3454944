"""What matmuls cover of the collectives that run beside them, and how often a collective counts."""

import pytest

from stem_jax.planning import hlo
from stem_jax.planning.collectives import collectives_of
from stem_jax.planning.overlap import covered_seconds

CLOCK = 1e3
# libtpu writes an asynchronous gather into the fusion that starts it, into each matmul that works
# beside it and into the fusion that awaits it; between them goes a semaphore. Cut from a real one.
PIECES = """
%begin (a: bf16[8,64]) -> (bf16[8,64], bf16[64,64], s32[2]) {
  %a = bf16[8,64]{1,0} parameter(0)
  %gather.1 = bf16[64,64]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %starts = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, s32[2]{0:S(4)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (b: bf16[8,64], c: bf16[64,64], d: s32[2], e: bf16[64,64]) -> (bf16[64,64], bf16[64,64], s32[2]) {
  %b = bf16[8,64]{1,0} parameter(0)
  %c = bf16[64,64]{1,0} parameter(1)
  %d = s32[2]{0:S(4)} parameter(2)
  %e = bf16[64,64]{1,0} parameter(3)
  %gather.2 = bf16[64,64]{1,0} all-gather(%b), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  %product = bf16[64,64]{1,0} convolution(%e, %e), dim_labels=bf_io->bf
  ROOT %on = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, s32[2]{0:S(4)}) tuple(%product, %gather.2, %d)
}

%finish (g: bf16[8,64], h: s32[2]) -> bf16[64,64] {
  %g = bf16[8,64]{1,0} parameter(0)
  %h = s32[2]{0:S(4)} parameter(1)
  %gather.3 = bf16[64,64]{1,0} all-gather(%g), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %done = bf16[64,64]{1,0} custom-call(%g, %gather.3, %h), custom_call_target="AsyncCollectiveDone"
}

%multiply (l: bf16[64,64]) -> bf16[64,64] {
  %l = bf16[64,64]{1,0} parameter(0)
  ROOT %dot = bf16[64,64]{1,0} convolution(%l, %l), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,64], y: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  %before = bf16[64,64]{1,0} fusion(%y), kind=kOutput, calls=%multiply, backend_config={"estimated_cycles":"5000"}
  %start = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, s32[2]{0:S(4)}) fusion(%x), kind=kCustom, calls=%begin
  %place = bf16[64,64]{1,0} get-tuple-element(%start), index=1
  %flag = s32[2]{0:S(4)} get-tuple-element(%start), index=2
  %step = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, s32[2]{0:S(4)}) fusion(%x, %place, %flag, %before), kind=kOutput, calls=%beside, backend_config={"estimated_cycles":"700"}
  %value = bf16[64,64]{1,0} get-tuple-element(%step), index=0
  %flag.2 = s32[2]{0:S(4)} get-tuple-element(%step), index=2
  %norm = bf16[64,64]{1,0} exponential(%value), backend_config={"estimated_cycles":"9000"}
  %end = bf16[64,64]{1,0} fusion(%x, %flag.2), kind=kCustom, calls=%finish
  %after = bf16[64,64]{1,0} fusion(%end), kind=kOutput, calls=%multiply, backend_config={"estimated_cycles":"5000"}
  ROOT %sum = bf16[64,64]{1,0} add(%after, %norm)
}
"""  # noqa: E501


def _seconds(instruction) -> float:
    """Of a matmul."""
    return (instruction.estimated_cycles or 0) / CLOCK


def test_pieces_of_one_collective_count_once():
    [found] = collectives_of(hlo.parse(PIECES), [0] * 8)
    # 7 of 8 shards of 8 x 64 come from the others.
    assert (found.name, found.scheduled, found.total) == ("gather.1", "start", 7 * 8 * 64 * 2)


def test_fused_collectives_that_nothing_started_count():
    """A reduce-scatter as libtpu has it, beside the pieces of another: a sum in a fusion."""
    text = PIECES.replace("%multiply (l", "%scatter (m: f32[8]) -> f32[8] {\n  %m = f32[8]{0} parameter(0)\n  ROOT %all = f32[8]{0} all-reduce(%m), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add\n}\n\n%multiply (l")  # noqa: E501  # fmt: skip
    text = text.replace(
        "  %norm", "  %part = f32[8]{0} fusion(%x), kind=kCustom, calls=%scatter\n  %norm"
    )
    found = {c.kind: c.scheduled for c in collectives_of(hlo.parse(text), [0] * 8)}
    assert found == {"all-gather": "start", "all-reduce": "part"}


def test_matmuls_between_start_and_end_cover():
    """Those before and after do not, nor what is no matmul; never more than the wires take."""
    module = hlo.parse(PIECES)
    assert covered_seconds(module, {"start": 2.0}, _seconds) == {"start": 0.7}
    assert covered_seconds(module, {"start": 0.5}, _seconds) == {"start": 0.5}


def _program(*lines: str, more: str = "") -> hlo.Module:
    """An entry computation of these lines, with matmuls `m NAME SECONDS`."""
    body = []
    for line in lines:
        if line.startswith("m "):
            _, name, seconds = line.split()
            line = f'%{name} = f32[8]{{0}} dot(%x, %x), lhs_contracting_dims={{0}}, backend_config={{"estimated_cycles":"{float(seconds) * CLOCK:.0f}"}}'  # noqa: E501
        body.append(f"  {line}")
    text = "\n".join(
        ["ENTRY %main (x: f32[8]) -> f32[8] {", "  %x = f32[8]{0} parameter(0)", *body]
    )
    return hlo.parse(f"{more}\n{text}\n  ROOT %r = f32[8]{{0}} add(%x, %x)\n}}\n")


def _start(name: str) -> str:
    return f"%{name} = (f32[8]{{0}}, f32[8]{{0}}) all-gather-start(%x), dimensions={{0}}"


def _done(name: str) -> str:
    return f"%{name}.done = f32[8]{{0}} all-gather-done(%{name})"


def test_no_matmul_covers_two_collectives():
    module = _program(_start("a"), _start("b"), "m one 3", _done("a"), "m two 4", _done("b"))
    # The first matmul goes to the one awaited first; what is left of it is not the other's.
    assert covered_seconds(module, {"a": 2.0, "b": 9.0}, _seconds) == {"a": 2.0, "b": 4.0}
    later = _program(_start("a"), _start("b"), "m one 3", _done("b"), "m two 4", _done("a"))
    assert covered_seconds(later, {"a": 9.0, "b": 2.0}, _seconds) == {"a": 4.0, "b": 2.0}


def test_a_collective_that_waits_at_once_is_not_covered():
    lines = ["m one 3", "%a = f32[8]{0} all-gather(%x), dimensions={0}", "m two 4"]
    assert covered_seconds(_program(*lines), {"a": 2.0}, _seconds) == {"a": 0.0}
    # Started and never awaited where it was started: nothing is known to cover it.
    assert covered_seconds(_program(_start("a"), "m one 3"), {"a": 2.0}, _seconds) == {"a": 0.0}


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %y = f32[8]{0} get-tuple-element(%p), index=1
  %c = (f32[8]{0}, f32[8]{0}) all-gather-start(%y), dimensions={0}
  %first = f32[8]{0} dot(%y, %y), lhs_contracting_dims={0}, backend_config={"estimated_cycles":"1000"}
  %c.done = f32[8]{0} all-gather-done(%c)
  %second = f32[8]{0} dot(%y, %y), lhs_contracting_dims={0}, backend_config={"estimated_cycles":"2000"}
  ROOT %next = (s32[], f32[8]{0}) tuple(%y, %second)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}
"""  # noqa: E501
WHILE = '%loop = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}'  # noqa: E501


def test_a_loop_covers_with_what_its_own_collectives_leave():
    module = _program(_start("a"), WHILE, _done("a"), more=LOOP)
    # Inside, ten times one second of the two that its own takes; outside, ten times two seconds.
    found = covered_seconds(module, {"a": 50.0, "c": 2.0}, _seconds)
    assert found == {"a": pytest.approx(20), "c": pytest.approx(10)}
    # Without need inside, all thirty are there for the one outside.
    assert covered_seconds(module, {"a": 50.0, "c": 0.0}, _seconds)["a"] == pytest.approx(30)
    # Two outside share the runs of the loop, none twice.
    both = _program(_start("a"), _start("b"), WHILE, _done("b"), _done("a"), more=LOOP)
    found = covered_seconds(both, {"a": 50.0, "b": 5.0, "c": 2.0}, _seconds)
    assert found == {"a": pytest.approx(14), "b": 5.0, "c": pytest.approx(10)}


WRAPPED = """
%swap (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %exchanged = f32[8]{0} all-to-all(%s), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def test_a_wrapped_exchange_counts_once_and_is_covered():
    module = _program(
        "%go = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%swap",
        "m one 3",
        "%on = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%go)",
        "%came = f32[8]{0} async-done(%on)",
        "m two 4",
        more=WRAPPED,
    )
    [found] = collectives_of(module, [0] * 8)
    assert (found.kind, found.total) == ("all-to-all", 8 * 4 * 7 / 8)
    assert covered_seconds(module, {found.scheduled: 5.0}, _seconds)["go"] == 3.0
