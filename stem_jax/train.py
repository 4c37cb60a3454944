"""Trains a model: python -m stem_jax.train --config=configs/tiny.py [--config.section.key=value]"""

import argparse
import sys
from pathlib import Path

from stem_jax import cli
from stem_jax.config_file import load_config
from stem_jax.errors import ToldToStop
from stem_jax.jax_start import start_jax
from stem_jax.kept_memory import keep_freed_memory
from stem_jax.processes.cluster import Gang, add_flags, add_stop_flag, membership
from stem_jax.processes.start_stop import stoppable_start
from stem_jax.storage import local_path


def main(argv: list[str]) -> None:
    """Parses flags and trains, or resumes, the run in the work folder."""
    parser = cli.Parser(
        "stem_jax.train",
        "Trains the model of a config file. The same command resumes.\n"
        "Any key of configs/base.py can be given as --config.section.key=value.",
    )
    parser.add_path("--config", required=True, help="config file, e.g. configs/tiny.py")
    parser.add_place("--workdir", help="run folder; without it, runs/NAME of the config")
    add_flags(parser)
    add_stop_flag(parser)
    parser.add_cache_flag()
    flags, overrides = cli.split_overrides(argv)
    args = parser.parse_args(flags)
    gang = Gang.from_flags(args)
    try:
        with stoppable_start(alone=gang is None):
            stopped = _train(args, overrides, gang)
    except ToldToStop:
        stopped = True
    if stopped:
        sys.exit(args.stopped_status)


def _train(args: argparse.Namespace, overrides: dict[str, str], gang: Gang | None) -> bool:
    """Whether it was told to stop."""
    config = load_config(args.config, overrides)
    workdir = args.workdir or Path("runs") / args.config.stem
    folder = config.train.compilation_cache
    kept = None if folder is None else local_path(folder, "train.compilation_cache")
    if not config.offloads:
        # Whoever has tables in host memory has none to spare.
        keep_freed_memory()
    start_jax(args.compilation_cache, kept)
    from stem_jax.generation.final_sample import show_sample
    from stem_jax.run import Ending, train

    with membership(gang):
        ending = train(config, workdir, show_sample if config.train.sample_prompt else None)
    return ending is Ending.STOPPED


if __name__ == "__main__":
    cli.run(main)
