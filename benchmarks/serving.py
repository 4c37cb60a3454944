"""Continuous over static batches inside the engine: see `benchmarks.batching`.

python -m benchmarks.serving [--shape=small|cpu|toy] [--slots=16] [--context=256] [--rounds=3]

Its memory is as the server's: in large pages, unless the environment says otherwise.
"""

import argparse
import json

from stem_jax.kept_memory import take_large_pages


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("small", "cpu", "toy"), default="small")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampled", action="store_true", help="as generate does by default")
    args = parser.parse_args()
    # Before JAX is imported.
    take_large_pages()
    from benchmarks.batching import measure

    print(json.dumps(measure(args), indent=2))


if __name__ == "__main__":
    main()
