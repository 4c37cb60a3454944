"""What a table of n-grams brings to a backbone that was trained without one.

python -m benchmarks.graft --folder=runs/graft [--steps=200] [--seeds=3]

Trains tiny.py, a STEM model; then goes on from its weights (train.init_from) for as many steps of
other batches, with the n-grams of ngram_tiny.py before attention of layer 1, and without. Both have
the same batches and the same rates. W_V of the reader begins at zero, so both begin with the same
loss. What the folder has of these runs is not trained again. Exits with 1 if they begin apart, or
if for any seed the run with the table does not end with fewer held-out bits per byte.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.seeds import SeedRuns, bits_per_byte, interval, markdown, records, write_csv

# As in ngram_tiny.py.
NGRAMS = {
    "ngram.layers": 1,
    "ngram.max_order": 3,
    "ngram.heads": 4,
    "ngram.keys_per_head": 50000,
    "ngram.width": 192,
    "ngram.lr_multiplier": 5.0,
    "ngram.weight_decay": 0.0,
}
# Losses of the first batch, before any update.
APART = 1e-3
# Batches of what goes on are those of another seed than the origin's.
_ON = 1000


def first_loss(workdir: Path) -> float:
    """Of the first batch, before any update."""
    first = records(workdir)[0]
    assert first["step"] == 1
    return first["train/loss"]


def main() -> None:
    """Trains, compares, prints a table and writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/graft"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    args = parser.parse_args()
    runs, figures, missed = SeedRuns(args.folder), [], []
    for seed in range(args.seeds):
        origin = runs.train("tiny", "origin", seed, args.steps, {})
        on = {"train.init_from": origin}
        without = runs.train("tiny", "without", _ON + seed, args.steps, on)
        grafted = runs.train("tiny", "grafted", _ON + seed, args.steps, on | NGRAMS)
        line = {
            "seed": seed,
            "origin": bits_per_byte(origin),
            "without": bits_per_byte(without),
            "grafted": bits_per_byte(grafted),
            "first_loss_without": first_loss(without),
            "first_loss_grafted": first_loss(grafted),
        }
        figures.append(line)
        if abs(line["first_loss_grafted"] - line["first_loss_without"]) > APART:
            missed.append(f"seed {seed} begins apart")
        if line["grafted"] >= line["without"]:
            missed.append(f"seed {seed} ends no lower")
    write_csv(args.folder / "graft.csv", figures)
    heads = ["seed", "origin", "without", "grafted", "difference", "first loss, without / grafted"]
    rows = [
        [
            str(line["seed"]),
            *(f"{line[name]:.4f}" for name in heads[1:4]),
            f"{line['grafted'] - line['without']:+.4f}",
            f"{line['first_loss_without']:.6f} / {line['first_loss_grafted']:.6f}",
        ]
        for line in figures
    ]
    print(markdown(heads, rows))
    mean, low, high = interval([line["grafted"] - line["without"] for line in figures])
    print(f"difference {mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f}")
    print("\n".join(missed) or "begins as the origin, and ends lower for every seed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
