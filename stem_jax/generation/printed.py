"""Completions on a terminal, or as JSON on stdout."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling


def print_completions(
    args: argparse.Namespace,
    generator: Generator,
    prompts: Sequence[str],
    shown: Sequence[str],
    sampling: Sampling,
) -> None:
    """Completes prompts and prints them; a single one piece by piece.

    Args:
        args: see `generation.flags`.
        shown: what stands before each completion.

    Raises:
        InputError: see `Generator.complete`.
    """
    # The prompt goes out with the first piece, when no error can follow any more.
    left = iter(shown)
    stream = len(prompts) == 1 and not (args.json or args.no_stream)
    on_text = (lambda _, text: print(next(left, "") + text, end="", flush=True)) if stream else None
    how = args.max_new_tokens, sampling, args.seed, args.batch_size
    as_tokens = args.special_tokens == "special"
    found = generator.complete(prompts, *how, on_text=on_text, special=as_tokens)
    if args.json:
        print(json.dumps([dataclasses.asdict(completion) for completion in found]))
        return
    for number, completion in enumerate(found, start=1):
        label = f"[{number}] " if len(found) > 1 else ""
        print(next(left, "") if stream else label + shown[number - 1] + completion.text)
        if completion.stop == "context":
            note = f"{label}stopped at the context of {generator.context} tokens, prompt included"
            print(f"note: {note}", file=sys.stderr)
