"""The flags of `python -m stem_jax.analyze`."""

import argparse

from stem_jax import cli
from stem_jax.analysis.options import AnalysisOptions
from stem_jax.data.formats import FORMATS
from stem_jax.processes.cluster import add_flags


def parse(argv: list[str], description: str | None) -> tuple[argparse.Namespace, AnalysisOptions]:
    """The flags, with `out` filled in, and the options among them.

    Exits with 2 for wrong ones, 0 for --help.
    """
    parser = cli.Parser("stem_jax.analyze", description)
    add = parser.add_argument

    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    parser.add_run_folder(
        "--dense-workdir", help="folder of its dense twin with the same tokenizer"
    )
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--dense-step", type=int, help="checkpoint of the twin; without it, the newest")
    add("--text", help="as data.sources; without it, what the run was trained on")
    add("--text-field", help="of files in --text, as data.text_field; without it, the run's")
    add("--format", choices=FORMATS, help="of files in --text, as data.format; without: the run's")
    add("--tokens", type=int, help="of the text, for frequencies and means; without: up to 262144")
    add("--rows", type=int, default=AnalysisOptions.rows, help="tokens whose vectors are sampled")
    add("--seed", type=int, default=AnalysisOptions.seed, help="of that sample")
    add("--resident-rows", type=int, help="table rows kept on the device")
    parser.add_result("--out", help="folder of the results; without it, WORKDIR/analysis")
    add("--json", action="store_true", help="print every figure as JSON instead of a summary")
    add("--no-progress", action="store_true", help="draw no bars")
    add_flags(parser)
    parser.add_cache_flag()
    args = parser.parse_args(argv)
    if args.dense_step is not None and args.dense_workdir is None:
        parser.error(
            f"--dense-step={args.dense_step} needs --dense-workdir, the folder of the twin"
        )
    args.out = args.out or args.workdir / "analysis"
    options = AnalysisOptions(
        step=args.step,
        dense_step=args.dense_step,
        resident_rows=args.resident_rows,
        text=args.text,
        text_field=args.text_field,
        format=args.format,
        tokens=args.tokens,
        rows=args.rows,
        seed=args.seed,
        progress=not args.no_progress,
    )
    return args, options
