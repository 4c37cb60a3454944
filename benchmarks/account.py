"""The account of a step on TPUs, by part, from programs that the TPU's compiler makes without one.

python -m benchmarks.account [--configs=stem_1b,dense_1b] [--topologies=v5e:8x8] [--keep=DIR]

Compiles each shipped config whole with full effort (4 to 7 minutes each on two quiet cores) and
prints a table in Markdown for each topology, as it stands in benchmarks/RESULTS.md. With --keep
each plan is written to DIR as soon as it is made, and what DIR holds is not compiled again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONFIGS = ("stem_1b", "dense_1b", "stem_350m", "dense_350m")
TOPOLOGIES = ("v5e:8x8", "v5p:4x4x4")


def planned(config: str, topology: str, keep: Path | None, overrides: list[str]) -> dict:
    """The plan of a shipped config as `stem_jax.plan` prints it; in a process of its own, so that
    a compilation's memory is free before the next.
    """
    kept = keep and keep / f"{config}-{topology.replace(':', '-')}.json"
    if kept and kept.exists():
        return json.loads(kept.read_text())
    command = [sys.executable, "-m", "stem_jax.plan", f"--config=configs/{config}.py"]
    command += [f"--topology={topology}", "--account", "--json", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    # A plan that does not fit is printed, too.
    if not done.stdout:
        raise SystemExit(f"{config} on {topology}: {done.stderr}")
    if kept:
        keep.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout)
    return json.loads(done.stdout)


def table(plans: dict[str, dict]) -> str:
    """One topology's accounts: M cycles, estimated + charged, and ms on the wires (covered)."""
    names = list(plans)
    parts = [part["name"] for part in next(iter(plans.values()))["account"]["parts"]]
    rows = [f"| part | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for part in parts:
        rows.append(f"| {part} | {' | '.join(_cell(_part(plans[n], part)) for n in names)} |")
    rows += [
        _row("**all**", names, lambda n: _sum(plans[n], {})),
        _row("all without attention", names, lambda n: _sum(plans[n], {"attention"})),
        _row(
            "ms, uncovered wires too",
            names,
            lambda n: f"{1e3 * _account(plans[n])['seconds']:,.0f}",
        ),
        _row("rounds of the exchange", names, lambda n: str(_account(plans[n])["open_rounds"])),
        _row("HBM GiB of a chip", names, lambda n: f"{_memory(plans[n]) / 2**30:.2f}"),
        _row("HBM traffic GiB", names, lambda n: f"{plans[n]['hbm_traffic'] / 2**30:,.0f}"),
        _row("sent GiB", names, lambda n: f"{_sent(plans[n]) / 2**30:.2f}"),
    ]
    return "\n".join(rows)


def _row(title: str, names: list[str], cell) -> str:
    return f"| {title} | {' | '.join(cell(name) for name in names)} |"


def _account(plan: dict) -> dict:
    return plan["account"]


def _part(plan: dict, name: str) -> dict | None:
    return next((part for part in _account(plan)["parts"] if part["name"] == name), None)


def _cell(part: dict | None) -> str:
    if part is None or not (part["cycles"] or part["charged"] or part["wire_seconds"]):
        return "-"
    text = f"{part['cycles'] / 1e6:,.1f} + {part['charged'] / 1e6:,.1f}"
    if part["wire_seconds"] >= 5e-5:
        text += f"; {1e3 * part['wire_seconds']:.1f} ms ({1e3 * part['covered_seconds']:.1f})"
    return text


def _sum(plan: dict, without: set[str]) -> str:
    parts = [part for part in _account(plan)["parts"] if part["name"] not in without]
    cycles, charged = (sum(part[key] for part in parts) / 1e6 for key in ("cycles", "charged"))
    return f"{cycles:,.1f} + {charged:,.1f} = {cycles + charged:,.1f}"


def _memory(plan: dict) -> int:
    memory = plan["memory"]
    return sum(memory[kind] for kind in ("arguments", "outputs", "temporaries", "code"))


def _sent(plan: dict) -> int:
    return sum(kind["bytes"] for kind in plan["collectives"].values())


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--keep", type=Path)
    args, overrides = parser.parse_known_args()
    for topology in args.topologies.split(","):
        plans = {
            config: planned(config, topology, args.keep, overrides)
            for config in args.configs.split(",")
        }
        print(f"{topology}\n\n{table(plans)}\n", flush=True)


if __name__ == "__main__":
    main()
