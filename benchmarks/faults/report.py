"""What a campaign found, for people: a line for each kind of fault, and where the time went."""

import statistics
from collections.abc import Sequence
from typing import Any

from stem_jax.goodput.account import PARTS


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line per fault; of lost steps and of the time that it is down, the most."""
    lines = [
        "| fault | rounds | exit status | lost steps | in flight | promised | down "
        "| recovered, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted({record["fault"] for record in records}):
        own = [record for record in records if record["fault"] == name]
        codes = {"none" if r["exit_status"] is None else str(r["exit_status"]) for r in own}
        recovered = statistics.median(record["recovered_seconds"] for record in own)
        seconds = [r["down_seconds"] for r in own if r["down_seconds"] is not None]
        down = f"{max(seconds):.0f} s" if seconds else "no"
        lines.append(
            f"| {name} | {len(own)} | {', '.join(sorted(codes))} "
            f"| {max(r['lost_steps'] for r in own)} | {max(r['in_flight'] for r in own)} "
            f"| {own[0]['promise']} | {down} | {recovered:.0f} s |"
        )
    return "\n".join(lines)


def time_table(accounts: Sequence[dict[str, float]]) -> str:
    """A line per process: seconds by its account and by the kernel's clocks, shares of parts."""
    parts = [part for part in PARTS if any(found[part] for found in accounts)]
    lines = [
        f"| process | account | wall | {' | '.join(parts)} |",
        f"|{'---|' * (3 + len(parts))}",
    ]
    for process, found in enumerate(accounts):
        shares = " | ".join(f"{found[part] / found['account']:.1%}" for part in parts)
        lines.append(f"| {process} | {found['account']:.1f} s | {found['wall']:.1f} s | {shares} |")
    return "\n".join(lines)


def reshape_table(records: Sequence[dict[str, Any]]) -> str:
    """A line per shape of the start: how often, and the largest difference of a loss."""
    lines = [
        "| processes x devices | resident rows | starts | largest difference |",
        "|---|---|---|---|",
    ]
    shapes = sorted({(r["processes"], r["devices"], str(r["resident_rows"])) for r in records})
    for processes, devices, rows in shapes:
        own = [
            r
            for r in records
            if (r["processes"], r["devices"], str(r["resident_rows"])) == (processes, devices, rows)
        ]
        most = max(r["difference"] for r in own)
        lines.append(f"| {processes} x {devices} | {rows} | {len(own)} | {most:.1e} |")
    return "\n".join(lines)
