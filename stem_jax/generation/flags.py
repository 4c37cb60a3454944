"""The flags of `python -m stem_jax.generate`."""

import argparse

from stem_jax import cli
from stem_jax.processes.cluster import add_flags

# How the text of a special token in a prompt is read: as any text, or as the token.
SPECIAL = ("text", "special")


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags. Exits with 2 for wrong ones, 0 for --help."""
    parser = cli.Parser("stem_jax.generate", description)
    add = parser.add_argument
    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--prompt", action="append", default=[], help="text to complete; may be repeated")
    parser.add_file("--prompt-file", action="append", default=[], help="one prompt per line")
    add("--chat", action="store_true", help="prompts are what a user says; print the answers")
    parser.add_file(
        "--messages", action="append", default=[], help="JSON list of messages to go on with"
    )
    parser.add_file("--chat-template", help="a file; without it that of the run's tokenizer")
    add(
        "--special-tokens", choices=SPECIAL, default="text", help="what their texts are in a prompt"
    )
    add("--max-new-tokens", type=int, default=64, help="of each completion")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy")
    add("--top-k", type=int, default=40, help="only the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=0.95, help="fewest tokens that reach p; 1: all")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--seed", type=int, default=0, help="of the samples")
    add("--batch-size", type=int, default=32, help="prompts at a time")
    parser.add_result(
        "--out", help="file of JSON lines, one a prompt; goes on with one that is there"
    )
    add("--no-stream", action="store_true", help="print when all is done")
    add("--resident-rows", type=int, help="table rows kept on the devices")
    add("--devices", type=int, default=1, help="that the model is divided over")
    parser.add_files("--edits", default=[], help="patches of stem_jax.edit, in their order")
    add("--json", action="store_true", help="print a JSON list instead")
    add_flags(parser)
    parser.add_cache_flag()
    args = parser.parse_args(argv)
    for flag in ("max-new-tokens", "batch-size"):
        value = getattr(args, flag.replace("-", "_"))
        if value < 1:
            parser.error(f"--{flag}={value} must be at least 1")
    if args.out is not None and args.json:
        parser.error("--out writes JSON lines; leave --json out")
    if args.multihost and args.out is None:
        parser.error("--multihost needs --out: process 0 writes what all of them complete")
    if not args.prompt + args.prompt_file + args.messages:
        parser.error("give --prompt, --prompt-file or --messages")
    if args.messages and args.prompt + args.prompt_file and not args.chat:
        parser.error(
            "--messages are answered, prompts are gone on with: give --chat to answer both"
        )
    args.chat = args.chat or bool(args.messages)
    if args.chat:
        args.special_tokens = "special"
    if args.chat_template is not None and not args.chat:
        parser.error("--chat-template is of --chat and --messages")
    return args
