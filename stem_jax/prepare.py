"""Turns text into token stores that training reads, and the tokenizer that goes with them.

python -m stem_jax.prepare --input='data/*.jsonl.zst' --vocab-size=32000 --out=stores/mine
"""

import argparse
import json
from pathlib import Path

from stem_jax import cli
from stem_jax.data.corpora import BUILTIN
from stem_jax.data.prepare import format_summary, prepare_stores, summarize
from stem_jax.data.sources import read_source
from stem_jax.data.tokenizer import KINDS, load_tokenizer, train_sentencepiece


def main(argv: list[str]) -> None:
    args = _parse(argv)
    names, path, folder = args.input + args.corpus, args.tokenizer_path, Path(args.out, "tokenizer")
    if args.vocab_size is not None:
        path = folder / "tokenizer.model"
        texts = (document.text for name in names for document in read_source(name, args.text_field))
        train_sentencepiece(texts, path, args.vocab_size)
    tokenizer = load_tokenizer(args.tokenizer, path)
    documents = (document for name in names for document in read_source(name, args.text_field))
    split = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    stores = prepare_stores(
        documents, tokenizer, args.out, name=",".join(names), progress=not args.json, **split
    )
    tokenizer.save(folder)
    summary = {"out": args.out, **summarize(stores)}
    print(json.dumps(summary) if args.json else format_summary(summary))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", action="extend", default=[], help="text, .jsonl, .parquet; .gz, .zst")
    add("--corpus", action="append", choices=BUILTIN, default=[], help="a built-in corpus")
    add("--text-field", "--text_field", default="text", help="JSONL field or Parquet column")
    add("--tokenizer", choices=KINDS, default="sentencepiece", help="kind of tokenizer")
    add("--tokenizer-path", "--tokenizer_path", help="a .model file or a tokenizer.json")
    add("--vocab-size", "--vocab_size", type=int, help="train SentencePiece on the text instead")
    add("--out", required=True, help="folder for train/, validation/ and tokenizer/")
    add("--validation-fraction", "--validation_fraction", type=float, default=0.02, help="share")
    add("--seed", type=int, default=0, help="of the split into train and validation")
    add("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    models = [args.tokenizer_path is not None, args.vocab_size is not None]
    if not args.input + args.corpus:
        parser.error("give --input or --corpus")
    if sum(models) != (args.tokenizer != "bytes") or (models[1] and args.tokenizer == "hf"):
        parser.error(
            "give --tokenizer-path or, to train SentencePiece, --vocab-size; none to bytes"
        )
    return args


if __name__ == "__main__":
    cli.run(main)
