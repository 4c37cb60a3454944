"""Trains configs/needle.py in its two stages and asks it for needles.

python -m benchmarks.needle --folder=runs

Prints what `evaluate --niah` prints, for one, two and four needles, and the seconds of each part.
Exits with 1 if 90% of the needles, or fewer, were found.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.children import environment

ENOUGH = 0.9


def main() -> None:
    """Runs the programs as a user would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs", type=Path, help="of both work folders")
    parser.add_argument("--samples", type=int, default=20, help="prompts for each length and depth")
    args = parser.parse_args()
    pairs, whole = args.folder / "needle_pairs", args.folder / "needle"
    train = ["-m", "stem_jax.train", "--config=configs/needle_pairs.py", f"--workdir={pairs}"]
    _run("name pairs", train)
    train = ["-m", "stem_jax.train", "--config=configs/needle.py", f"--workdir={whole}"]
    _run("haystacks", [*train, f"--config.train.init_from={pairs}"])
    ask = ["-m", "stem_jax.evaluate", f"--workdir={whole}", "--niah", "--keys=1,2,4"]
    _run("asking", [*ask, f"--samples={args.samples}"])
    for table in json.loads((whole / "evaluation" / "niah.json").read_text())["tables"]:
        if table["mean"] <= ENOUGH:
            sys.exit(f"{table['mean']:.1%} found of {table['keys']} hidden, not over {ENOUGH:.0%}")


def _run(name: str, command: list[str]) -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, env=environment())
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
