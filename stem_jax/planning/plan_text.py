"""A plan as text to read, and as JSON."""

import dataclasses
import json

from stem_jax.planning.plan import Plan
from stem_jax.planning.table_plan import TablesPlan
from stem_jax.planning.table_text import bytes_text, overfull_text, table_lines, tables_text

# Origins are paths of calls; what is left says which one.
_ORIGIN_LENGTH = 90
_LISTED_CYCLES = 100_000


def as_json(plan: Plan | TablesPlan) -> str:
    """One JSON object with every field of the plan; sizes in bytes, times in seconds."""
    return json.dumps(dataclasses.asdict(plan), indent=2)


def as_text(plan: Plan | TablesPlan) -> str:
    """The plan for a reader."""
    if isinstance(plan, TablesPlan):
        return tables_text(plan)
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"program      {plan.program}, compiled in {plan.compile_seconds:.1f} s",
        f"pod          {plan.topology}: {plan.chips} x {plan.device_kind}; mesh {mesh}",
        f"batch        {plan.tokens_per_step:,} tokens a step; {plan.sequences} sequences a "
        "micro-batch and device group",
        f"attention    {plan.attention}",
        *_memory_lines(plan),
        *table_lines(plan.tables),
        *_buffer_lines(plan),
        *_work_lines(plan),
        *_roofline_lines(plan),
        *_account_lines(plan),
        *_work_account_lines(plan),
    ]
    if not plan.fits:
        lines.append(f"to change    {'; or '.join(plan.remedies)}")
    return "\n".join(lines)


def verdict(plan: Plan | TablesPlan) -> str:
    """One line: whether it fits."""
    crowded = overfull_text(plan.tables)
    words = "fits" if plan.fits else "does not fit"
    if isinstance(plan, TablesPlan):
        return f"{plan.program} {words} {plan.topology}{crowded}"
    memory = plan.memory
    if plan.limit is None:
        return f"needs {bytes_text(memory.total)} per device{crowded}"
    return (
        f"{plan.program} {words} {plan.topology}: {bytes_text(memory.total)} of "
        f"{bytes_text(plan.limit)} HBM per chip{_reserve(plan)}{crowded}"
    )


def _reserve(plan: Plan) -> str:
    share = 1.0 if plan.peaks is None else plan.peaks.reserved
    if share == 1 or plan.limit is None:
        return ""
    return f", the {share:g} of {bytes_text(plan.limit / share)} that a run reserves"


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    note = " (as far as the compiler got)" if plan.refused else ""
    workspace = f", workspace of cuDNN {bytes_text(memory.workspace)}" if memory.workspace else ""
    return [
        f"memory       per chip: {verdict(plan)}{note}",
        f"             arguments {bytes_text(memory.arguments)} (state, batch), of which outputs "
        f"take over {bytes_text(memory.aliased)}; other outputs {bytes_text(memory.outputs)}",
        f"             temporaries {bytes_text(memory.temporaries)}{workspace}, generated code "
        f"{bytes_text(memory.code)}; host {bytes_text(memory.host)}",
    ]


def _buffer_lines(plan: Plan) -> list[str]:
    if not plan.buffers:
        return []
    lines = ["buffers      the largest, where the compiler tells at the peak of memory:"]
    for buffer in plan.buffers:
        times = f"{buffer.count} x " if buffer.count > 1 else ""
        origin = buffer.origin.removeprefix("jit(_update)/")[:_ORIGIN_LENGTH]
        lines.append(f"             {times}{bytes_text(buffer.bytes)} {buffer.shape} {origin}")
    return lines


def _work_lines(plan: Plan) -> list[str]:
    lines = []
    if plan.program == "train step":
        again = plan.all_flops / plan.model_flops - 1
        own = "" if plan.compiler_flops is None else (
            f"; the compiler counts {plan.compiler_flops / 1e12:.2f} a chip, loops once and "
            "kernels not at all"
        )  # fmt: skip
        lines.append(
            f"matmuls      {plan.model_flops / 1e12:,.1f} TFLOP a step on all chips, "
            f"{again:+.0%} recomputed{own}"
        )
    if plan.hbm_traffic is not None:
        lines.append(
            f"HBM          {bytes_text(plan.hbm_traffic)} read and written per chip and step"
        )
    if plan.collectives is not None:
        lines.append("collectives  sent per chip and step (ring algorithm):")
        for kind, total in plan.collectives.items():
            if total.count:
                between = total.bytes_between_slices
                places = "slices" if plan.work is None else "hosts"
                crossing = f", {bytes_text(between)} of it between {places}" if between else ""
                sent = f"{bytes_text(total.bytes):>12}{crossing}"
                lines.append(f"             {kind:<18} {sent} in {total.count}")
        if plan.open_ended_loops:
            lines.append(
                f"             {plan.open_ended_loops} loops end when the device says so (rounds "
                f"of the exchange): counted as {plan.open_ended_rounds} each"
            )
    return lines


def _roofline_lines(plan: Plan) -> list[str]:
    bounds, peaks = plan.roofline, plan.peaks
    if peaks is None:
        return [f"roofline     none: no published peak figures for {plan.device_kind}"]
    if bounds is None:
        return []
    times = {
        "compute": bounds.compute,
        "hbm": bounds.hbm,
        "interconnect": bounds.interconnect,
        "network": bounds.network,
        "link": bounds.link,
        "books": bounds.books,
    }
    listed = ", ".join(f"{name} {1e3 * value:,.1f} ms" for name, value in times.items())
    network = (
        ", network unknown and not counted"
        if peaks.network is None
        else f", network {peaks.network / 1e9:g} GB/s"
    )
    float8 = f" and {peaks.float8 / 1e12:g} float8 (of which MFU is a share)"
    float8 = float8 if plan.matmul_dtype == "float8" and peaks.float8 else ""
    return [
        f"roofline     {listed}",
        f"             at most {bounds.tokens_per_second:,.0f} tokens/s, MFU {bounds.mfu:.1%}; "
        f"{bounds.binds} binds",
        f"             peaks of {peaks.name}: {peaks.flops / 1e12:g} bf16 TFLOP/s{float8}, HBM "
        f"{peaks.hbm_bandwidth / 1e9:,g} GB/s, {peaks.links} links of "
        f"{peaks.link_bandwidth / 1e9:g} GB/s each way{network} ({peaks.source})",
    ]


def _account_lines(plan: Plan) -> list[str]:
    account = plan.account
    if account is None:
        return []
    columns = "{:<20}{:>11}{:>11}{:>10}{:>12}"
    lines = [
        "account      " + columns.format("part", "M cycles", "charged", "wires ms", "covered ms")
    ]
    for part in account.parts:
        cycles = (f"{part.cycles / 1e6:,.1f}", f"{part.charged / 1e6:,.1f}")
        times = (f"{1e3 * part.wire_seconds:,.1f}", f"{1e3 * part.covered_seconds:,.1f}")
        lines.append(" " * 13 + columns.format(part.name, *cycles, *times))
    lines.append(
        f"             {account.total_cycles / 1e6:,.1f} M cycles of a chip and step, estimated by "
        f"the compiler and charged: {1e3 * account.seconds:,.1f} ms with uncovered wires"
    )
    lines.append("             charged, for want of an estimate (runs, M cycles):")
    for entry in account.charges:
        if entry.cycles >= _LISTED_CYCLES:
            charged = f"{entry.count:>9,} {entry.cycles / 1e6:>9,.1f}"
            lines.append(f"             {entry.part:<20}{entry.kind:<16}{charged}")
    rest = [entry for entry in account.charges if entry.cycles < _LISTED_CYCLES]
    total, count = sum(e.cycles for e in rest) / 1e6, sum(e.count for e in rest)
    lines.append(f"             {'all others':<36}{count:>9,} {total:>9,.1f}")
    return lines


def _work_account_lines(plan: Plan) -> list[str]:
    work = plan.work
    if work is None:
        return []
    columns = "{:<20}{:>10}{:>12}{:>11}{:>9}{:>10}{:>12}"
    heads = ("part", "TFLOP", "G results", "HBM GiB", "ms", "wires ms", "covered ms")
    lines = ["work         " + columns.format(*heads)]
    for part in work.parts:
        counts = (f"{part.flops / 1e12:,.2f}", f"{part.operations / 1e9:,.1f}")
        times = (part.seconds, part.wire_seconds, part.covered_seconds)
        cells = (*counts, f"{part.bytes / 2**30:,.1f}", *(f"{1e3 * t:,.1f}" for t in times))
        lines.append(" " * 13 + columns.format(part.name, *cells))
    lines.append(
        f"             {work.flops / 1e12:,.2f} TFLOP and {bytes_text(work.bytes)} of a chip and "
        f"step: at the least {1e3 * work.seconds:,.1f} ms with uncovered wires"
    )
    for calls in work.kernels:
        done = f"{calls.flops / 1e12:,.2f} TFLOP, {bytes_text(calls.bytes)}"
        lines.append(
            f"             {calls.part:<20}{calls.count:>7,} calls of a {calls.kind}: {done}"
        )
    return lines
