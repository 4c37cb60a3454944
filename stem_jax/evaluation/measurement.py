"""One measurement as its flags describe it: loaded, made, written, and as a table for people."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from stem_jax.bucket_files import shown
from stem_jax.checkpoints.loading import LoadedRun, load_run
from stem_jax.evaluation.heatmap import draw_retrieval
from stem_jax.evaluation.memorization import format_memorization, memorization
from stem_jax.evaluation.niah import format_retrieval, retrieval
from stem_jax.evaluation.perplexity import format_perplexity, perplexity
from stem_jax.evaluation.recall import format_recall, recall
from stem_jax.evaluation.results import check_out, write_json
from stem_jax.evaluation.tasks import evaluate_tasks, format_results
from stem_jax.evaluation.training_text import open_training_text
from stem_jax.processes.agreement import PREPARING_SECONDS, check_same, is_first, unanimous
from stem_jax.processes.together import facts_of
from stem_jax.training.run_data import reading_of


@dataclasses.dataclass(frozen=True)
class Measurement:
    """record: the results, as written. table: the same for people. files: that were written."""

    record: dict[str, Any]
    table: str
    files: list[Path]


def measure(args: argparse.Namespace) -> Measurement:
    """Loads the run and measures it; every process has the results, process 0 writes them.

    Args:
        args: see `flags.parse`.

    Raises:
        InputError: what cannot be loaded, measured or written; or processes that differ.
    """
    files = [args.out] + [args.out.with_suffix(".png")] * args.niah
    with unanimous():
        run = load_run(args.workdir, args.step, args.resident_rows, devices=args.devices)
        if is_first():
            check_out(*files)
    check_same(_facts(args, run))
    common = {"batch_size": args.batch_size, "progress": not args.no_progress}
    if args.niah:
        grid = {"lengths": args.lengths, "depths": args.depths, "keys": args.keys}
        result = retrieval(run, **grid, samples=args.samples, seed=args.seed, **common)
        table = format_retrieval(result)
    elif args.tasks is not None:
        options = {"limit": args.limit, "num_fewshot": args.num_fewshot}
        options |= {"max_gen_toks": args.max_gen_toks, "log_samples": args.log_samples}
        result = evaluate_tasks(run, args.tasks, **options, **common)
        table = format_results(result)
        if result["truncated"] and is_first():
            note = (
                f"{result['truncated']} requests were longer than the context: beginnings are cut"
            )
            print(f"note: {note}", file=sys.stderr)
    elif args.facts:
        result = recall(run, limit=args.limit, **common)
        table = format_recall(result)
    elif args.memorization:
        with unanimous(PREPARING_SECONDS):
            text = open_training_text(run, args.workdir)
        result = memorization(run, text, limit=args.limit, **common)
        table = format_memorization(result)
    else:
        reading = reading_of(run.config.data, args.text_field, args.format)
        options = {"limit": args.limit, "reading": reading}
        if args.by_frequency:
            with unanimous(PREPARING_SECONDS):
                options["counts"] = open_training_text(run, args.workdir).pair_counts()
        result = perplexity(run, args.perplexity, **options, **common)
        table = format_perplexity(result)
    record = {"workdir": shown(args.workdir), "step": run.step, **result}
    write_json(args.out, record)
    if args.niah:
        draw_retrieval(result, files[-1])
    return Measurement(record, table, files)


def _facts(args: argparse.Namespace, run: LoadedRun) -> dict[str, str]:
    """What must be the same in all processes."""
    of_run = {"the step of the checkpoint": str(run.step), "checkpoint": run.fingerprint}
    return facts_of(args) | of_run
