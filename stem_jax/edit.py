"""Edits what a model knows by writing rows, and shows what that does.

python -m stem_jax.edit --workdir=runs/facts --swap="Spain=>Germany" \\
    --prompt="The capital of Spain is" --save=runs/facts/spain.safetensors
"""

import argparse

from stem_jax import cli
from stem_jax.errors import InputError
from stem_jax.knowledge.comparison import compare, format_comparison
from stem_jax.knowledge.patch import edited_run, format_patch, make_patch, read_patch
from stem_jax.knowledge.swaps import STRATEGIES, recipes_of
from stem_jax.loading import load_run


def main(argv: list[str]) -> None:
    """Parses flags, makes the patch, and prints completions before and after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--swap", action="append", default=[], help="SOURCE=>TARGET; may be repeated")
    add("--inject", action="append", default=[], help="WORD=0.5*FIRST+0.5*SECOND, or WORD=@FILE")
    add("--strategy", default="average", choices=STRATEGIES, help="if the token counts differ")
    add("--layers", type=cli.integers, help="where rows are written, such as 0,1; without: all")
    add("--scale", type=float, default=1.0, help="times the rows that are written")
    add("--edits", type=cli.names, default=[], help="patches that apply first, in this order")
    add("--prompt", action="append", default=[], help="text to complete; may be repeated")
    add("--max-new-tokens", "--max_new_tokens", type=int, default=16, help="of each completion")
    add("--top", type=int, default=5, help="probabilities shown")
    add("--save", help="file for the patch")
    add("--list", action="store_true", help="show what --edits hold")
    add("--resident-rows", "--resident_rows", type=int, help="table rows kept on the device")
    args = parser.parse_args(argv)
    base = [read_patch(path) for path in args.edits]
    if args.list:
        print("\n".join(format_patch(patch) for patch in base) or "no patches")
        return
    if not args.swap + args.inject:
        raise InputError("there is nothing to edit; give --swap or --inject (or --list)")
    run = load_run(args.workdir, args.step, args.resident_rows)
    recipes = recipes_of(run.tokenizer, args.swap, args.inject, args.strategy)
    description = "; ".join([*args.swap, *args.inject])
    where = {"layers": args.layers, "scale": args.scale, "base": base}
    patch = make_patch(run, recipes, description=description, **where)
    print(format_patch(patch))
    old, new = edited_run(run, base), edited_run(run, [*base, patch])
    for found in compare(old, new, args.prompt, args.max_new_tokens, args.top):
        print(f"\n{format_comparison(found)}")
    if args.save:
        patch.save(args.save)
        print(f"\nsaved as {args.save}; use it with generate --edits={args.save}")


if __name__ == "__main__":
    cli.run(main)
