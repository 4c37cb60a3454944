"""Trains configs/needle.py and asks it for needles.

python -m benchmarks.needle --workdir=runs/needle

Prints what `evaluate --niah` prints, for one needle and for four, and the seconds of both.
"""

import argparse
import subprocess
import sys
import time


def main() -> None:
    """Runs both programs as a user would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/needle")
    parser.add_argument("--samples", type=int, default=40, help="prompts for each length and depth")
    args, rest = parser.parse_known_args()
    train = ["-m", "stem_jax.train", "--config=configs/needle.py", *rest]
    ask = ["-m", "stem_jax.evaluate", "--niah", "--keys=1,4", f"--samples={args.samples}"]
    for name, command in (("training", train), ("asking", ask)):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command, f"--workdir={args.workdir}"], check=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
