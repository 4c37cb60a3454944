"""A job of completions that ends up in a file; several processes divide its batches."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import pickle
import sys
from collections.abc import Sequence
from datetime import datetime

import jax

from stem_jax.bucket_files import shown
from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.errors import InputError
from stem_jax.generation.completion_file import (
    DATE,
    CompletionFile,
    begun_at,
    file_digests,
    prompts_digest,
)
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.processes.agreement import PREPARING_SECONDS, check_same, exchange, unanimous


def job_date(args: argparse.Namespace) -> datetime | None:
    """What is now to the chat template of a job: when it was begun, also if it goes on later.

    None: where prompts come from no template, or go into no file. All processes have the first
    one's.
    """
    if not args.chat or args.out is None:
        return None
    [first, *_] = exchange(lambda: pickle.dumps(begun_at(args.out)))
    return pickle.loads(first)


def complete_into_file(
    args: argparse.Namespace,
    run: LoadedRun,
    generator: Generator,
    prompts: Sequence[str],
    sampling: Sampling,
    begun: datetime | None = None,
) -> None:
    """Completes prompts into `--out`, or those that are not in it yet.

    Args:
        begun: see `job_date`.

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
    if begun is not None:
        job[DATE] = begun.isoformat()
    # Files and checkpoints of one name may be others on another host.
    check_same({name: json.dumps(value) for name, value in job.items()})
    how = args.max_new_tokens, sampling, args.seed, args.batch_size
    special = args.special_tokens == "special"
    # What is wrong with them is said before there is a file.
    generator.batches(prompts, *how, special=special)
    index, count = jax.process_index(), jax.process_count()
    writer = CompletionFile.open(args.out, job) if index == 0 else contextlib.nullcontext()
    with unanimous(), writer as file:
        [done, *_] = map(int, exchange(lambda: b"%d" % (0 if file is None else file.done)))
        if done > len(prompts):
            raise InputError(
                f"--out={args.out} has {done} lines for {len(prompts)} prompts; remove it"
            )
        if done and file is not None:
            print(f"note: {done} of {len(prompts)} are there already", file=sys.stderr)
        own = slice(index, None, count)
        batches = generator.batches(prompts, *how, special=special, done=done, own=own)
        # In each round every process completes a batch, and the first one writes them.
        for _ in range(-(-(len(prompts) - done) // (args.batch_size * count))):
            batch = next(batches, [])
            if count > 1:
                parts = exchange(functools.partial(pickle.dumps, batch), PREPARING_SECONDS)
                batch = list(itertools.chain.from_iterable(map(pickle.loads, parts)))
            if file is not None:
                file.add(batch)
    if index == 0:
        print(f"{shown(args.out)}: {len(prompts)} completions")
