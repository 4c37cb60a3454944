"""Exports a trained model to PyTorch.

python -m stem_jax.export --workdir=runs/tiny --format=hf --out=exported
"""

import time

from stem_jax import cli
from stem_jax.jax_start import start_jax


def main(argv: list[str]) -> None:
    """Parses flags, writes the folder and says what it holds."""
    parser = cli.Parser("stem_jax.export", __doc__)
    add = parser.add_argument
    parser.add_path("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add(
        "--format",
        required=True,
        choices=("hf", "official", "patch"),
        help="transformers, STEM's code, or the rows that optimizer.train=tables trained, to lay "
        "over the run that it began with",
    )
    parser.add_path("--out", required=True, help="folder to create; patch: file")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    add("--file-gib", type=float, default=4.0, help="hf: largest weights file")
    add("--license", help="hf: its identifier for the model card, such as apache-2.0")
    add("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    parser.add_paths("--edits", default=[], help="patches of stem_jax.edit to bake in")
    parser.add_path("--base", help="patch: the run that it is for; without it, train.init_from")
    add("--memory", default="stem", help="patch: whose rows")
    args = parser.parse_args(argv)
    if not 0 < args.file_gib < 2**30:
        parser.error(f"--file-gib={args.file_gib} must be more than 0, and a size that a disk has")
    if args.format != "hf" and args.file_gib != parser.get_default("file_gib"):
        parser.error(f"--file-gib={args.file_gib} is for --format=hf; one file is written")
    if args.format != "hf" and args.license is not None:
        parser.error(f"--license={args.license} is for --format=hf, which writes a model card")
    for flag in ("base", "memory") if args.format != "patch" else ():
        if (given := getattr(args, flag)) != parser.get_default(flag):
            parser.error(f"--{flag}={given} is for --format=patch")
    if args.format == "patch" and (args.edits or args.no_tokenizer or args.dtype != "float32"):
        parser.error("--format=patch takes no --edits, no --no-tokenizer and no other --dtype")
    start_jax()
    from stem_jax.checkpoints.saved_model import open_saved_model
    from stem_jax.editing.patch import edited_model
    from stem_jax.editing.patch_file import format_patch, read_patch
    from stem_jax.editing.tuned_patch import export_patch
    from stem_jax.interop.hf_export import export_hf
    from stem_jax.interop.official_format import export_official

    start = time.perf_counter()
    saved = open_saved_model(args.workdir, args.step)
    if args.format == "patch":
        patch = export_patch(saved, args.out, base=args.base, memory=args.memory)
        print(format_patch(patch, saved.tokenizer))
        return print(f"{len(patch.ids)} rows in {args.out}; generate and edit with --edits")
    saved = edited_model(saved, [read_patch(path) for path in args.edits])
    options = {"dtype": args.dtype, "with_tokenizer": not args.no_tokenizer}
    if args.format == "hf":
        size = int(args.file_gib * 2**30)
        export_hf(saved, args.out, file_bytes=size, licence=args.license, **options)
    else:
        export_official(saved, args.out, **options)
    seconds = time.perf_counter() - start
    print(f"step {saved.info.step} of {args.workdir} is in {args.out} ({seconds:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
