"""The flags of `python -m stem_jax.prepare`."""

import argparse

from stem_jax.data.bad_records import ON_BAD
from stem_jax.data.corpora import BUILTIN
from stem_jax.data.formats import CHAT, FORMATS
from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import KINDS
from stem_jax.data.tokenizer_source import tokenizer_source
from stem_jax.storage import local_path, place


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Exits with 2 for wrong flags, 0 for --help; raises InputError for an address as a path."""

    def add(name: str, **options) -> None:
        parser.add_argument(f"--{name}", **options)

    files = "text, .json, .jsonl, .parquet; also packed: .gz, .zst, .bz2, .xz; each file once"
    add("input", nargs="+", action="extend", default=[], help=files)
    add("corpus", action="append", choices=BUILTIN, default=[], help="a built-in corpus")
    add("text-field", default="text", help="JSON field or Parquet column")
    kinds = "of the files; auto: by name and content; chat: JSON with the messages of conversations"
    add("format", choices=(*FORMATS, CHAT), default="auto", help=kinds)
    add("chat-template", help="a file; without it that of the tokenizer's folder")
    add("on-bad", choices=ON_BAD, default="stop", help="at a record without usable text")
    add("tokenizer", choices=KINDS, default="sentencepiece", help="kind of tokenizer")
    add("tokenizer-path", help="a .model file, a tokenizer.json, or hf://ORG/NAME")
    SpecialFlags.add_flags(parser)
    add("vocab-size", type=int, help="train SentencePiece on the text instead")
    add("out", required=True, help="folder for train/, validation/, tokenizer/; also in a bucket")
    add("validation-fraction", type=float, default=0.02, help="share")
    add("seed", type=int, default=0, help="of the split into train and validation")
    add("processes", type=int, help="that tokenize, each on one core; without it, all cores")
    add("verify", action="store_true", help="only check the files of the stores in --out")
    add("json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    for pattern in args.input:
        place(pattern, "--input")
    # What is compared with its checksums is what is on this machine's disk.
    args.out = (local_path if args.verify else place)(args.out, "--out")
    if args.tokenizer_path is not None:
        args.tokenizer_path = tokenizer_source(args.tokenizer_path, "--tokenizer-path")
    if args.chat_template is not None:
        args.chat_template = local_path(args.chat_template, "--chat-template")
    models = [args.tokenizer_path is not None, args.vocab_size is not None]
    if args.verify:
        if args.input + args.corpus or any(models):
            parser.error("--verify checks what is in --out; leave out text and tokenizer")
        return args
    if not args.input + args.corpus:
        parser.error("give --input or --corpus")
    if args.format == CHAT and (args.corpus or args.vocab_size is not None):
        parser.error("--format=chat takes --input, and a tokenizer that is there: --tokenizer-path")
    if args.chat_template is not None and args.format != CHAT:
        parser.error("--chat-template is of --format=chat")
    if sum(models) != (args.tokenizer != "bytes") or (models[1] and args.tokenizer == "hf"):
        parser.error(
            "give --tokenizer-path or, to train SentencePiece, --vocab-size; none to bytes"
        )
    return args
