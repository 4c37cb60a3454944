"""A job of completions that ends up in a file."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.errors import InputError
from stem_jax.generation.completion_file import CompletionFile, file_digests, prompts_digest
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling


def complete_into_file(
    args: argparse.Namespace,
    run: LoadedRun,
    generator: Generator,
    prompts: Sequence[str],
    sampling: Sampling,
) -> None:
    """Completes prompts into `--out`, or those that are not in it yet.

    Raises:
        InputError: see `Generator.steps` and `CompletionFile.open`.
    """
    job = {
        "prompts": prompts_digest(prompts),
        "checkpoint": run.fingerprint,
        "edits": file_digests(args.edits),
        **dataclasses.asdict(sampling),
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "special_tokens": args.special_tokens,
    }
    how = args.max_new_tokens, sampling, args.seed, args.batch_size
    special = args.special_tokens == "special"
    # What is wrong with them is said before there is a file.
    generator.batches(prompts, *how, special=special)
    with CompletionFile.open(args.out, job) as file:
        if file.done > len(prompts):
            raise InputError(
                f"--out={args.out} has {file.done} lines for {len(prompts)} prompts; remove it"
            )
        if file.done:
            print(f"note: {file.done} of {len(prompts)} are there already", file=sys.stderr)
        for batch in generator.batches(prompts, *how, special=special, done=file.done):
            file.add(batch)
    print(f"{args.out}: {len(prompts)} completions")
