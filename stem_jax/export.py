"""Exports a trained model to PyTorch.

python -m stem_jax.export --workdir=runs/tiny --format=hf --out=exported
"""

import argparse
import dataclasses
import time

from stem_jax import cli
from stem_jax.interop.hf_export import DTYPES, export_hf
from stem_jax.interop.official_format import export_official
from stem_jax.interop.saved_model import open_saved_model
from stem_jax.knowledge.patch import read_patch


def main(argv: list[str]) -> None:
    """Parses flags, writes the folder and says what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--format", required=True, choices=["hf", "official"], help="transformers, or STEM's code")
    add("--out", required=True, help="folder to create")
    add("--dtype", default="float32", choices=list(DTYPES), help="of the weights")
    add("--file-gib", "--file_gib", type=float, default=4.0, help="hf: largest weights file")
    add("--no-tokenizer", "--no_tokenizer", action="store_true", help="leave the tokenizer out")
    add("--edits", type=cli.names, default=[], help="patches of stem_jax.edit to bake in")
    args = parser.parse_args(argv)
    if args.file_gib <= 0:
        parser.error(f"--file-gib={args.file_gib} must be more than 0")
    start = time.perf_counter()
    saved = open_saved_model(args.workdir, args.step)
    patches = tuple(read_patch(path) for path in args.edits)
    saved = dataclasses.replace(saved, patches=patches)
    options = {"dtype": args.dtype, "with_tokenizer": not args.no_tokenizer}
    if args.format == "hf":
        export_hf(saved, args.out, file_bytes=int(args.file_gib * 2**30), **options)
    else:
        export_official(saved, args.out, **options)
    seconds = time.perf_counter() - start
    print(f"step {saved.info.step} of {args.workdir} is in {args.out} ({seconds:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
