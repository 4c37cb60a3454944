"""Trains a model: python -m stem_jax.train --config=configs/tiny.py [--config.section.key=value]"""

import argparse
import sys
from pathlib import Path

import jax

from stem_jax import cli
from stem_jax.agreement import is_first
from stem_jax.cluster import Gang, add_flags, add_stop_flag, membership
from stem_jax.config import Config, load_config
from stem_jax.generation import Generator
from stem_jax.loading import load_run
from stem_jax.run import Ending, train
from stem_jax.sampling import Sampling


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
    add_flags(parser)
    add_stop_flag(parser)
    flags, overrides = cli.split_overrides(argv)
    args = parser.parse_args(flags)
    config = load_config(args.config, overrides)
    workdir = args.workdir or Path("runs") / Path(args.config).stem
    if config.train.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", config.train.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with membership(Gang.from_flags(args)):
        ending = train(config, workdir)
        if ending is Ending.COMPLETED and config.train.sample_prompt and is_first():
            show_sample(config, workdir)
    if ending is Ending.STOPPED:
        sys.exit(args.stopped_status)


def show_sample(config: Config, workdir: str | Path) -> None:
    """Completes `train.sample_prompt` with the newest checkpoint, or says how to."""
    prompt = config.train.sample_prompt
    if jax.device_count() > 1:
        print(f'sample: python -m stem_jax.generate --workdir={workdir} --prompt="{prompt}"')
        return
    run = load_run(workdir)
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95)
    [sample] = generator.complete([prompt], config.train.sample_tokens, sampling, config.train.seed)
    print(f"sample:\n{sample.prompt}{sample.text}")


if __name__ == "__main__":
    cli.run(main)
