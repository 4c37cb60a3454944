"""Measures a trained model: standard tasks, bits per byte of texts, memorization, needles, facts.

python -m stem_jax.evaluate --workdir=runs/tiny --tasks=arc_easy,path/to/task_yamls --limit=100
python -m stem_jax.evaluate --workdir=runs/tiny --perplexity=facts,notes.txt --by-frequency
python -m stem_jax.evaluate --workdir=runs/tiny --memorization
python -m stem_jax.evaluate --workdir=runs/needle --niah --keys=1,4 --lengths=64,256
python -m stem_jax.evaluate --workdir=runs/facts --facts
"""

import contextlib
import json

from stem_jax import cli
from stem_jax.evaluation.flags import parse
from stem_jax.jax_start import start_jax
from stem_jax.processes.cluster import Gang, membership
from stem_jax.processes.together import killed_by_sigterm, stdout_kept


def main(argv: list[str]) -> None:
    """Parses flags, measures, and prints a table, or JSON."""
    args = parse(argv, __doc__)
    start_jax(args.compilation_cache)
    from stem_jax.evaluation.division import PATIENCE_SECONDS
    from stem_jax.evaluation.measurement import measure
    from stem_jax.processes.agreement import is_first, unanimous

    killed_by_sigterm()
    again = "nothing was written, start all processes again"
    with membership(Gang.from_flags(args), again):
        # With several processes, JAX's own messages would stand before the JSON.
        quiet = stdout_kept() if args.json else contextlib.nullcontext()
        with quiet, unanimous(PATIENCE_SECONDS, tell_failures=True):
            found = measure(args)
        if not is_first():
            return
        if args.json:
            print(json.dumps(found.record, default=str))
            return
        where = f"step {found.record['step']} of {args.workdir}: {', '.join(map(str, found.files))}"
        cli.say(f"{found.table}\n\n{where}")


if __name__ == "__main__":
    cli.run(main)
