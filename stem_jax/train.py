"""Trains a model: python -m stem_jax.train --config=configs/tiny.py [--config.section.key=value]"""

import argparse
from pathlib import Path

from stem_jax import cli
from stem_jax.config import load_config
from stem_jax.run import train


def main(argv: list[str]) -> None:
    """Parses flags and trains, or resumes, the run in the work folder."""
    parser = argparse.ArgumentParser(
        prog="python -m stem_jax.train",
        description="Trains the model of a config file. The same command resumes.\n"
        "Any key of configs/base.py can be given as --config.section.key=value.",
        formatter_class=cli.HelpFormatter,
    )
    parser.add_argument("--config", required=True, help="config file, e.g. configs/tiny.py")
    parser.add_argument("--workdir", help="run folder; without it, runs/NAME of the config")
    flags, overrides = cli.split_overrides(argv)
    args = parser.parse_args(flags)
    config = load_config(args.config, overrides)
    train(config, args.workdir or Path("runs") / Path(args.config).stem)


if __name__ == "__main__":
    cli.run(main)
