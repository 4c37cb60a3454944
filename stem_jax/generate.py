"""Completes prompts: python -m stem_jax.generate --workdir=runs/tiny --prompt="The module" """

import argparse
import dataclasses
import json
import sys

from stem_jax import cli
from stem_jax.completion import read_prompts
from stem_jax.generation import Generator
from stem_jax.knowledge.patch import edited_run, read_patch
from stem_jax.loading import load_run
from stem_jax.sampling import Sampling


def main(argv: list[str]) -> None:
    """Parses flags, loads the run and prints completions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--prompt", action="append", default=[], help="text to complete; may be repeated")
    add("--prompt-file", "--prompt_file", action="append", default=[], help="one prompt per line")
    add("--max-new-tokens", "--max_new_tokens", type=int, default=64, help="of each completion")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy")
    add("--top-k", "--top_k", type=int, default=40, help="only the k likeliest tokens; 0: all")
    add("--top-p", "--top_p", type=float, default=0.95, help="fewest tokens that reach p; 1: all")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--seed", type=int, default=0, help="of the samples")
    add("--no-stream", "--no_stream", action="store_true", help="print when all is done")
    add("--resident-rows", "--resident_rows", type=int, help="table rows kept on the device")
    add("--edits", type=cli.names, default=[], help="patches of stem_jax.edit, in their order")
    add("--json", action="store_true", help="print a JSON list instead")
    args = parser.parse_args(argv)
    if not args.prompt + args.prompt_file:
        parser.error("give --prompt or --prompt-file")
    prompts = args.prompt + [line for path in args.prompt_file for line in read_prompts(path)]
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    run = load_run(args.workdir, args.step, args.resident_rows)
    run = edited_run(run, [read_patch(path) for path in args.edits])
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    # The prompt goes out with the first piece, when no error can follow any more.
    left = iter(prompts)
    stream = len(prompts) == 1 and not (args.json or args.no_stream)
    on_text = (lambda _, text: print(next(left, "") + text, end="", flush=True)) if stream else None
    found = generator.complete(prompts, args.max_new_tokens, sampling, args.seed, on_text=on_text)
    if args.json:
        print(json.dumps([dataclasses.asdict(completion) for completion in found]))
        return
    for number, completion in enumerate(found, start=1):
        label = f"[{number}] " if len(found) > 1 else ""
        print(next(left, "") if stream else label + completion.prompt + completion.text)
        if completion.stop == "context":
            note = f"{label}stopped at the context of {generator.context} tokens, prompt included"
            print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
