"""Completes prompts: python -m stem_jax.generate --workdir=runs/tiny --prompt="The module" """

import sys

from stem_jax import cli
from stem_jax.generation.flags import parse
from stem_jax.jax_start import start_jax
from stem_jax.processes.together import together


def main(argv: list[str]) -> None:
    """Parses flags, loads the run and prints completions."""
    args = parse(argv, __doc__)
    start_jax(args.compilation_cache)
    from stem_jax.checkpoints.loading import load_run
    from stem_jax.editing.patch import edited_run
    from stem_jax.editing.patch_file import read_patch
    from stem_jax.generation.completion import read_prompts, special_notes
    from stem_jax.generation.conversations import with_conversations
    from stem_jax.generation.generator import Generator
    from stem_jax.generation.job import complete_into_file, job_date
    from stem_jax.generation.printed import print_completions
    from stem_jax.generation.sampling import Sampling

    with together(args):
        prompts = args.prompt + [line for path in args.prompt_file for line in read_prompts(path)]
        sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
        run = load_run(args.workdir, args.step, args.resident_rows, devices=args.devices)
        run = edited_run(run, [read_patch(path) for path in args.edits])
        date = job_date(args)
        if args.chat:
            run, prompts = with_conversations(run, prompts, args, date)
        # Of a conversation the answer alone.
        shown = [""] * len(prompts) if args.chat else prompts
        generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
        as_tokens = args.special_tokens == "special"
        for note in () if as_tokens else special_notes(run.tokenizer, prompts):
            print(f"note: {note}", file=sys.stderr)
        if args.out is not None:
            return complete_into_file(args, run, generator, prompts, sampling, date)
        print_completions(args, generator, prompts, shown, sampling)


if __name__ == "__main__":
    cli.run(main)
