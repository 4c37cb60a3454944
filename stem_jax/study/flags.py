"""The flags of `python -m stem_jax.study`."""

import argparse
from pathlib import Path

from stem_jax import cli
from stem_jax.study.code_state import ROOT


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags; `records`, `texts` are filled in. Exits with 2 for wrong ones, 0 for --help."""
    parser = cli.Parser("stem_jax.study", description)
    add = parser.add_argument
    parser.add_path("--config", required=True, help="study file, e.g. configs/study/core.py")
    parser.add_path("--workdir", required=True, help="folder for runs, texts and results")
    parser.add_path("--records", help="folder of finished runs' records; see docs/study.md")
    parser.add_path("--texts", help="folder of prepared texts; without it, WORKDIR/texts")
    parser.add_paths("--variant", default=[], help="files of your own variants (comma-separated)")
    add("--phases", help="purposes (comma-separated); without it, all of the study")
    add("--workers", type=int, default=1, help="runs that are trained side by side")
    add("--threads", type=int, default=1, help="cores of each; 0: not bound to cores")
    add("--minutes", type=float, help="after which it stops; the same command continues")
    add("--dry-run", action="store_true", help="print runs, FLOPs and time, and train nothing")
    add("--no-training", action="store_true", help="write results of the records that there are")
    add("--no-cost", action="store_true", help="measure no times and memory")
    add("--mixed-code", action="store_true", help="take records of several commits")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.threads < 0:
        parser.error("--workers must be at least 1, and --threads at least 0")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes={args.minutes:g} must be more than 0; leave it out for no limit")
    args.texts = args.texts or args.workdir / "texts"
    args.phases = [part.strip() for part in (args.phases or "").split(",") if part.strip()]
    return args


def records_folder(given: Path | None, workdir: Path, study: str) -> Path:
    """Where the records of a study lie: those of a checkout are in its benchmarks."""
    shipped = ROOT / "benchmarks" / "study"
    return (given or (shipped if shipped.is_dir() else workdir / "records")) / study
