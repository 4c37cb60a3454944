"""What rows in bfloat16, and one moment for each vector, cost in held-out bits per byte.

python -m benchmarks.row_formats --folder=runs/row_formats [--steps=300] [--seeds=3]

Trains tiny.py and ngram_tiny.py with rows of each format on the same text, each a minute or two on
two idle cores; what the folder has of them is not trained again. Of each format the difference
to float32 with AdamW's moments is taken seed by seed. Exits with 1 if the whole 95% interval of one
lies above the limit.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.seeds import SeedRuns, bits_per_byte, interval, markdown, write_csv

CONFIGS = ("tiny", "ngram_tiny")
# Dtype of rows, their moments; the first is what others are compared with.
FORMATS = (
    ("float32", "adamw"),
    ("bfloat16", "adamw"),
    ("float32", "rowwise"),
    ("bfloat16", "rowwise"),
)
# Bits per byte.
LIMIT = 0.02


def main() -> None:
    """Trains, compares, prints a table and writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/row_formats"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    args = parser.parse_args()
    runs, found = SeedRuns(args.folder), {}
    for seed in range(args.seeds):
        for config in CONFIGS:
            for row_format, moments in FORMATS:
                keys = {"tables.row_format": row_format, "tables.moments": moments}
                name = f"{config}_{row_format}_{moments}"
                workdir = runs.train(config, name, seed, args.steps, keys)
                found[config, row_format, moments, seed] = bits_per_byte(workdir)
    heads = "config row_format moments seed bits_per_byte".split()
    figures = [dict(zip(heads, [*key, f"{bits:.6f}"])) for key, bits in found.items()]
    write_csv(args.folder / "row_formats.csv", figures)
    lines, over = [], []
    for config in CONFIGS:
        for form in FORMATS:
            each = [found[config, *form, seed] for seed in range(args.seeds)]
            line = [config, *form, ", ".join(f"{bits:.4f}" for bits in each)]
            if form != FORMATS[0]:
                base = [found[config, *FORMATS[0], seed] for seed in range(args.seeds)]
                mean, low, high = interval([a - b for a, b in zip(each, base, strict=True)])
                line += [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]
                if low > LIMIT:
                    over.append(f"{config}, {' '.join(form)}: {low:+.4f} or more")
            lines.append(line + [""] * (6 - len(line)))
    heads = ["configuration", "rows", "moments", "bits per byte", "difference", "95% interval"]
    print(markdown(heads, lines))
    print("\n".join(over) or f"no interval lies above {LIMIT:+} whole")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
