"""Turns text into token stores that training reads, and the tokenizer that goes with them.

python -m stem_jax.prepare --input='data/*.jsonl.zst' --vocab-size=32000 --out=stores/mine
"""

import json
from pathlib import Path

from stem_jax import cli
from stem_jax.data.formats import Reading
from stem_jax.data.prepare import format_summary, prepare_stores, summarize
from stem_jax.data.prepare_flags import parse
from stem_jax.data.sources import read_sources
from stem_jax.data.tokenizer import load_tokenizer, train_sentencepiece


def main(argv: list[str]) -> None:
    """Parses flags, prepares, and prints a summary."""
    args = parse(cli.Parser("stem_jax.prepare", __doc__), argv)
    names, path, folder = args.input + args.corpus, args.tokenizer_path, Path(args.out, "tokenizer")
    reading = Reading(args.text_field, args.format)
    if args.vocab_size is not None:
        path = folder / "tokenizer.model"
        texts = (document.text for document in read_sources(names, reading))
        train_sentencepiece(texts, path, args.vocab_size)
    tokenizer = load_tokenizer(args.tokenizer, path)
    documents = read_sources(names, reading)
    split = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    stores = prepare_stores(
        documents, tokenizer, args.out, name=",".join(names), progress=not args.json, **split
    )
    tokenizer.save(folder)
    summary = {"out": str(args.out), **summarize(stores)}
    print(json.dumps(summary) if args.json else format_summary(summary))


if __name__ == "__main__":
    cli.run(main)
