"""How a run stands, for people."""

from stem_jax.goodput.account import PARTS
from stem_jax.goodput.totals import Totals
from stem_jax.standing.standing import COMPLETE, NEVER_STARTED, Standing, moment


def text(found: Standing) -> str:
    """Some lines, and the table of where the time went."""
    as_of = "" if found.as_of is None else f", as of {found.as_of:.0f} s ago"
    lines = [f"{found.workdir}: {found.state} ({found.why}){as_of}"]
    if found.state == NEVER_STARTED:
        return lines[0]
    lines.append(f"step         {_progress(found)}")
    lines += [f"loss         {found.loss:.4f}, {_speed(found)}"] if found.loss is not None else []
    lines.append(f"checkpoints  {_saves(found)}")
    for member in found.members:
        start = member.start
        said = start.doing if member.lives else start.end or "gone"
        lines.append(
            f"process      {start.process} of {start.processes}: {start.pid} on {start.host} since "
            f"{moment(start.began_time)}, step {start.step}, {said}, "
            f"last record {member.silent:.0f} s ago"
        )
    if found.totals:
        lines += _table(found.totals)
    return "\n".join(lines)


def _progress(found: Standing) -> str:
    if found.steps is None:
        return str(found.step)
    share = f"{found.step} of {found.steps} ({found.step / found.steps:.0%})"
    if found.hours_left is None or found.state == COMPLETE:
        return share
    return f"{share}, {found.hours_left:.1f} hours left at the speed so far"


def _speed(found: Standing) -> str:
    if found.tokens_per_second is None or found.step_seconds is None:
        return "no speed yet"
    return f"{found.tokens_per_second:,.0f} tokens/s, {found.step_seconds:.3g} s a step"


def _saves(found: Standing) -> str:
    saves = found.saves
    if not saves.steps:
        parts = ["none"]
    else:
        parts = [f"newest {saves.steps[-1]}, of {', '.join(map(str, saves.steps))}"]
    if saves.best is not None:
        parts.append(f"best {saves.best} (validation loss {saves.best_loss:.4f})")
    if saves.damage is not None:
        parts.append(f"{saves.steps[-1]} is damaged: {saves.damage}")
    if saves.set_aside:
        parts.append(f"damaged, set aside: {', '.join(map(str, saves.set_aside))}")
    return "; ".join(parts)


def _table(totals: list[Totals]) -> list[str]:
    """A line for each process: its time in seconds, and shares of it."""
    parts = [part for part in PARTS if any(found.parts.get(part) for found in totals)]
    rows = [["process", "starts", "steps", "again", "seconds", *parts]]
    for found in totals:
        shares = [f"{found.parts[part] / max(found.seconds, 1e-9):.1%}" for part in parts]
        counts = [found.process, found.starts, found.steps, found.redone]
        rows.append([*map(str, counts), f"{found.seconds:.0f}", *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
