"""The flags of `python -m stem_jax.edit`."""

import argparse

from stem_jax import cli
from stem_jax.editing.choices import FACTS, STRATEGIES, TOKEN_COUNTS, WRITTEN
from stem_jax.errors import InputError
from stem_jax.memory.memory import STEM
from stem_jax.processes.cluster import add_flags

# What makes or shows one edit.
_ONE_EDIT = {"swap", "inject", "scale", "edits", "prompt", "max_new_tokens", "top", "save"}


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags. Exits with 2 for wrong ones, 0 for --help; raises InputError without an edit."""
    parser = cli.Parser("stem_jax.edit", description)
    add = parser.add_argument
    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--swap", action="append", default=[], help="SOURCE=>TARGET; may be repeated")
    add("--inject", action="append", default=[], help="WORD=0.5*FIRST+0.5*SECOND, or WORD=@FILE")
    add("--memory", default=STEM, help="whose rows: stem, value or per_layer")
    add("--strategy", default="average", choices=STRATEGIES, help="if the token counts differ")
    add("--layers", type=cli.integers, help="where rows are written, such as 0,1; without: all")
    add("--scale", type=float, default=1.0, help="times the rows that are written")
    parser.add_files("--edits", default=[], help="patches that apply first, in this order")
    add("--prompt", action="append", default=[], help="text to complete; may be repeated")
    add("--max-new-tokens", type=int, default=16, help="of each completion")
    add("--top", type=int, default=5, help="probabilities shown")
    parser.add_result("--save", help="file for the patch")
    add("--list", action="store_true", help="show what --edits hold")
    add("--resident-rows", type=int, help="table rows kept on the device")
    parser.add_names(
        "--measure",
        help="facts, or a JSON file like CounterFact's or zsRE's: edits to try alone",
    )
    add("--pairs", type=int, default=200, help="facts: edits of each relation")
    add(
        "--tokens",
        default="one",
        choices=TOKEN_COUNTS,
        help="facts: of the edited name, beside the donor's",
    )
    add("--write", default="rows", choices=WRITTEN, help="measure: embedding is for contrast")
    add("--seed", type=int, default=0, help="facts: of the pairs and phrasings")
    parser.add_result("--out", help="measure: folder of CSV and JSON; without it, WORKDIR/editing")
    add("--json", action="store_true", help="measure: print the JSON instead of a table")
    add_flags(parser)
    parser.add_cache_flag()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.measure is None:
        wrong = given & {"pairs", "tokens", "write", "seed", "out", "json"}
        if args.list:
            wrong |= given & _ONE_EDIT - {"edits"}
    else:
        wrong = given & (_ONE_EDIT | {"list"})
        if args.measure != FACTS:
            wrong |= given & {"pairs", "tokens", "seed"}
    if wrong:
        mode = "--list" if args.list else "--swap and --inject"
        mode = mode if args.measure is None else f"--measure={args.measure}"
        parser.error(
            f"{', '.join(f'--{x}'.replace('_', '-') for x in sorted(wrong))}: not for {mode}"
        )
    if args.multihost and args.measure is None:
        parser.error("--multihost is for --measure, whose questions several processes divide")
    if args.top < 0:
        parser.error(f"--top={args.top} must be 0 or more")
    if args.measure is None and not (args.list or args.swap + args.inject):
        raise InputError("there is nothing to edit; give --swap, --inject, --measure or --list")
    return args
