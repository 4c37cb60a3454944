"""Edits what a model knows by writing rows, and shows or measures what that does.

python -m stem_jax.edit --workdir=runs/facts --swap="Spain=>Germany" \\
    --prompt="The capital of Spain is" --save=runs/facts/spain.safetensors
python -m stem_jax.edit --workdir=runs/facts --measure=facts
"""

import argparse
import json

from stem_jax import cli
from stem_jax.editing.flags import parse
from stem_jax.jax_start import start_jax
from stem_jax.processes.together import together


def main(argv: list[str]) -> None:
    """Parses flags; makes a patch and prints completions before and after it, or measures edits."""
    start_jax((args := parse(argv, __doc__)).compilation_cache)
    if args.measure is not None:
        with together(args) as first:
            return _measure(args, first)
    from stem_jax.checkpoints.loading import load_run
    from stem_jax.editing.comparison import compare, format_comparison
    from stem_jax.editing.patch import edited_run, make_patch
    from stem_jax.editing.patch_file import check_new, format_patch, read_patch
    from stem_jax.editing.swaps import recipes_of

    base = [read_patch(path) for path in args.edits]
    if args.list:
        return print("\n".join(map(format_patch, base)) or "no patches")
    if args.save:
        check_new(args.save)
    run = load_run(args.workdir, args.step, args.resident_rows)
    recipes = recipes_of(run.tokenizer, args.swap, args.inject, args.strategy)
    where = {"layers": args.layers, "scale": args.scale, "base": base, "memory": args.memory}
    patch = make_patch(run, recipes, description="; ".join([*args.swap, *args.inject]), **where)
    print(format_patch(patch, run.tokenizer))
    old, new = edited_run(run, base, [patch]), edited_run(run, [*base, patch])
    for found in compare(old, new, args.prompt, args.max_new_tokens, args.top):
        print(f"\n{format_comparison(found)}")
    if args.save:
        patch.save(args.save)
        cli.say(f"\nsaved as {args.save}; use it with generate --edits={args.save}")


def _measure(args: argparse.Namespace, first: bool) -> None:
    from stem_jax.checkpoints.loading import load_run
    from stem_jax.editing.trial import Trial, write_trial

    run = load_run(args.workdir, args.step, args.resident_rows)
    trial, out = Trial.from_flags(args), args.out or args.workdir / "editing"
    result, files = write_trial(run, trial, out, first)
    if first:
        where = ", ".join(map(str, files))
        cli.say(json.dumps(result.record()) if args.json else f"{result.format()}\n\n{where}")


if __name__ == "__main__":
    cli.run(main)
