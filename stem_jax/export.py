"""Exports a trained model to PyTorch.

python -m stem_jax.export --workdir=runs/tiny --format=hf --out=exported
"""

import argparse
import sys
import time

from stem_jax import cli
from stem_jax.interop.export_flags import WHOLE, parse
from stem_jax.jax_start import start_jax
from stem_jax.outgoing import outgoing, outgoing_file
from stem_jax.processes.together import together


def main(argv: list[str]) -> None:
    """Parses flags, writes the folder and says what it holds."""
    args = parse(argv, __doc__)
    start_jax()
    with together(args) as first:
        if first:
            _export(args)


def _export(args: argparse.Namespace) -> None:
    from stem_jax.checkpoints.saved_model import open_saved_model
    from stem_jax.editing.patch import edited_model
    from stem_jax.editing.patch_file import format_patch, read_patch
    from stem_jax.editing.tuned_patch import export_patch
    from stem_jax.interop.hf_export import export_hf
    from stem_jax.interop.official_format import export_official
    from stem_jax.interop.peft_export import export_peft
    from stem_jax.memory.catalogue import table_specs

    start = time.perf_counter()
    saved = open_saved_model(args.workdir, args.step)
    if args.format == "patch":
        with outgoing_file(args.out, "--out") as out:
            patch = export_patch(saved, out, base=args.base, memory=args.memory)
        print(format_patch(patch, saved.tokenizer))
        for name in sorted(table_specs(saved.config).keys() - {args.memory}):
            print(f"note: rows of {name} trained, too, and are not in it", file=sys.stderr)
        return print(f"{len(patch.ids)} rows in {args.out}; generate and edit with --edits")
    saved = edited_model(saved, [read_patch(path) for path in args.edits])
    options = {"dtype": args.dtype, "with_tokenizer": not args.no_tokenizer}
    with outgoing(args.out, "--out", WHOLE[args.format]) as out:
        if args.format == "peft":
            export_peft(saved, out, base=args.base)
        elif args.format == "hf":
            size = int(args.file_gib * 2**30)
            export_hf(saved, out, file_bytes=size, licence=args.license, **options)
        else:
            export_official(saved, out, home=args.out, **options)
    seconds = time.perf_counter() - start
    cli.say(f"step {saved.info.step} of {args.workdir} is in {args.out} ({seconds:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
