"""Turns text into token stores that training reads, and the tokenizer that goes with them.

python -m stem_jax.prepare --input='data/*.jsonl.zst' --vocab-size=32000 --out=stores/mine
python -m stem_jax.prepare --verify --out=stores/mine
"""

import json

from stem_jax import cli
from stem_jax.data.prepare_flags import parse
from stem_jax.data.prepare_job import prepare, verify
from stem_jax.data.store_summary import format_summary


def main(argv: list[str]) -> None:
    """Parses flags, prepares, and prints a summary."""
    args = parse(cli.Parser("stem_jax.prepare", __doc__), argv)
    summary = verify(args.out) if args.verify else prepare(args)
    print(json.dumps(summary) if args.json else format_summary(summary))


if __name__ == "__main__":
    cli.run(main)
