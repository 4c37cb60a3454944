"""Tables of a plan as text to read."""

from stem_jax.planning.table_load import DEVICE, DISK, HOST, TableLoad, Tier
from stem_jax.planning.table_plan import WIRES, TableBytes, TablesPlan, overfull

_INDENT = " " * 13
# Of each tier: where rows lie, and what has a share of them.
_PLACES = {
    DEVICE: ("on devices", "chips", "HBM"),
    HOST: ("in host memory", "hosts", "memory"),
    DISK: ("on disk", "hosts", "disk"),
}


def tables_text(plan: TablesPlan) -> str:
    """A plan of the tables alone."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"program      {plan.program}: nothing is compiled",
        f"pod          {plan.topology}: {plan.chips} x {plan.device_kind} of {plan.hosts} hosts; "
        f"mesh {mesh}",
        f"batch        {plan.tokens_per_step:,} tokens a step",
        *table_lines(plan.tables),
        *_bound_lines(plan),
    ]
    if not plan.fits:
        lines.append(f"to change    {'; or '.join(plan.remedies)}")
    return "\n".join(lines)


def table_lines(tables: dict[str, TableBytes]) -> list[str]:
    """What a plan says of its tables."""
    if not tables:
        return ["table        none: a dense model"]
    return [line for name, table in tables.items() for line in _lines_of(name, table)]


def overfull_text(tables: dict[str, TableBytes]) -> str:
    """Which memory has too little room for all tables; "" for none."""
    return "".join(
        f"; tables need {bytes_text(needed)} of the {bytes_text(room)} of a "
        f"{'chip' if tier == DEVICE else tier}"
        for tier, (needed, room) in overfull(tables).items()
    )


def _lines_of(name: str, table: TableBytes) -> list[str]:
    moments = f"rows {bytes_text(table.rows)}, moments {bytes_text(table.moments)}"
    lines = [f"table        {name}, per chip: {moments}"]
    if table.row_block:
        lines.append(
            f"{_INDENT}row block {bytes_text(table.row_block)}, room for {table.unique_rows:,} "
            f"distinct rows; {table.owned_rows:,} rows asked of an owner; a padded exchange buffer "
            f"{bytes_text(table.exchange)}"
        )
    if table.load is not None:
        lines += [f"{_INDENT}{line}" for line in _load_lines(name, table.load)]
    return lines


def _load_lines(name: str, load: TableLoad) -> list[str]:
    size = f"{load.num_rows:,} rows of {load.row_bytes:,} bytes with moments"
    lines = [f"{size}, {load.parameters / 1e9:,.3f} G parameters"]
    lines += [_tier_line(tier, *_PLACES[place]) for place, tier in load.tiers.items()]
    asked = f"{load.keys:,} keys a step ask for {load.distinct_step:,} distinct rows"
    lines += [
        f"{asked} ({load.origin}),",
        f"  {load.distinct_device:,} those of a chip, {load.distinct_owner:,} of an owner",
    ]
    if load.slots_needed > load.tiers[DEVICE].rows:
        lines.append(
            f"  more than there are slots: such a batch needs resident_rows of {name} of "
            f"{load.slots_needed:,} or more"
        )
    network = f", {bytes_text(load.network_bytes)} between slices" if load.network_bytes else ""
    lines.append(
        f"sent per chip and step: {bytes_text(load.interconnect_bytes)}{network}; rows are "
        f"{bytes_text(load.exchange_bytes)} of it, there and back"
    )
    if HOST in load.tiers:
        lines.append(
            f"with a hit rate of {load.hit_rate:.3f}: {bytes_text(load.entering_bytes)} from the "
            f"host to a chip, {bytes_text(load.leaving_bytes)} back with the lists of rows"
        )
        lines.append(f"each process keeps books of {load.booked_rows:,} rows a step")
    return lines


def _tier_line(tier: Tier, where: str, places: str, memory: str) -> str:
    room = "" if tier.capacity is None else f" of {bytes_text(tier.capacity)} {memory}"
    return (
        f"{tier.rows:,} {where}: {bytes_text(tier.bytes)}{room} of each of {tier.places} {places}"
    )


def _bound_lines(plan: TablesPlan) -> list[str]:
    bounds, peaks = plan.bounds, plan.peaks
    matmuls = f"{plan.all_flops / 1e12:,.1f} TFLOP of matmuls on all chips"
    if bounds is None or peaks is None:
        return [f"bounds       none: no published peak figures for {plan.device_kind}; {matmuls}"]
    wires = {name: getattr(bounds, name) for name in WIRES}
    times = ", ".join(f"{name} {_milliseconds(value)}" for name, value in wires.items())
    link = "" if peaks.host_link is None else f", link to the host {peaks.host_link / 1e9:g} GB/s"
    return [
        f"bounds       compute {_milliseconds(bounds.compute)} ({matmuls}); tables: {times}",
        f"{_INDENT}what binds: {bounds.binds}; HBM and the backbone's traffic need a compiled plan",
        f"{_INDENT}peaks of {peaks.name} ({peaks.source}){link} each way; books by what a "
        "core took (see docs/planning.md)",
    ]


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def bytes_text(size: float) -> str:
    """In GiB or MiB, whichever reads better."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
