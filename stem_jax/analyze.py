"""Looks into a trained model: geometry of its rows, capacity, cost, and how its training went.

python -m stem_jax.analyze --workdir=runs/tiny
python -m stem_jax.analyze --workdir=runs/tiny --dense-workdir=runs/tiny_dense --text=pydoc
"""

import argparse
import json

from stem_jax import cli
from stem_jax.analysis.flags import parse
from stem_jax.analysis.options import AnalysisOptions
from stem_jax.jax_start import start_jax
from stem_jax.processes.together import together


def main(argv: list[str]) -> None:
    """Parses flags, measures, and writes a page with its pictures and figures."""
    args, options = parse(argv, __doc__)
    start_jax(args.compilation_cache)
    with together(args) as first:
        if first:
            _analyze(args, options)


def _analyze(args: argparse.Namespace, options: AnalysisOptions) -> None:
    from stem_jax.analysis.analysis import analyze
    from stem_jax.analysis.files import write_analysis
    from stem_jax.analysis.sections import sections_of
    from stem_jax.checkpoints.loading import open_checkpoint
    from stem_jax.result_folder import check_folder

    # Before a folder is made: a run that is not there gets none.
    with open_checkpoint(args.workdir, args.step):
        out = check_folder(args.out)
    found = analyze(args.workdir, args.dense_workdir, options)
    sections = sections_of(found)
    written = write_analysis(out, found, sections)
    if args.json:
        print(json.dumps(found.record(), allow_nan=False))
        return
    for section in sections:
        print(f"{section.title}: {section.lead}\n")
    cli.say(f"step {found.own.run.step} of {args.workdir}: {written[0]}, {len(written) - 1} files")


if __name__ == "__main__":
    cli.run(main)
