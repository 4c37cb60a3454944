"""Measures a trained model: standard tasks, bits per byte of texts, or needles in a haystack.

python -m stem_jax.evaluate --workdir=runs/tiny --tasks=arc_easy,path/to/task_yamls --limit=100
python -m stem_jax.evaluate --workdir=runs/tiny --perplexity=facts,notes.txt
python -m stem_jax.evaluate --workdir=runs/needle --niah --keys=1,4 --lengths=64,256
"""

import json
import sys

from stem_jax import cli
from stem_jax.evaluation.flags import parse
from stem_jax.evaluation.heatmap import draw_retrieval
from stem_jax.evaluation.niah import format_retrieval, retrieval
from stem_jax.evaluation.perplexity import format_perplexity, perplexity
from stem_jax.evaluation.report import check_out, write_json
from stem_jax.evaluation.tasks import evaluate_tasks, format_results
from stem_jax.loading import load_run


def main(argv: list[str]) -> None:
    """Parses flags, loads the run, prints a table and writes the results."""
    args = parse(argv, __doc__)
    run = load_run(args.workdir, args.step, args.resident_rows)
    check_out(args.out)
    common = {"batch_size": args.batch_size, "progress": not args.no_progress}
    written = [args.out]
    if args.niah:
        grid = {"lengths": args.lengths, "depths": args.depths, "keys": args.keys}
        result = retrieval(run, **grid, samples=args.samples, seed=args.seed, **common)
        table = format_retrieval(result)
        written.append(args.out.with_suffix(".png"))
    elif args.tasks is not None:
        options = {"limit": args.limit, "num_fewshot": args.num_fewshot}
        options |= {"max_gen_toks": args.max_gen_toks, "log_samples": args.log_samples}
        result = evaluate_tasks(run, args.tasks, **options, **common)
        table = format_results(result)
        if result["truncated"]:
            note = (
                f"{result['truncated']} requests were longer than the context: beginnings are cut"
            )
            print(f"note: {note}", file=sys.stderr)
    else:
        result = perplexity(run, args.perplexity, limit=args.limit, **common)
        table = format_perplexity(result)
    record = {"workdir": args.workdir, "step": run.step, **result}
    write_json(args.out, record)
    if args.niah:
        draw_retrieval(result, written[-1])
    if args.json:
        print(json.dumps(record, default=str))
        return
    print(f"{table}\n\nstep {run.step} of {args.workdir}: {', '.join(map(str, written))}")


if __name__ == "__main__":
    cli.run(main)
