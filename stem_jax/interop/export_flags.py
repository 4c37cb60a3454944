"""The flags of `python -m stem_jax.export`."""

import argparse

from stem_jax import cli
from stem_jax.processes.cluster import add_flags

FORMATS = ("hf", "official", "patch", "peft")
# The file without which the folder is no model, and which comes last into a bucket.
WHOLE = {
    "hf": "config.json",
    "official": "consolidated/params.json",
    "peft": "adapter_config.json",
}


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags; exits with 2 for wrong ones, 0 for --help."""
    parser = cli.Parser("stem_jax.export", description)
    add = parser.add_argument
    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    add(
        "--format",
        required=True,
        choices=FORMATS,
        help="transformers, STEM's code, or the rows that optimizer.train=tables trained, to lay "
        "over the run that it began with, or LoRA's adapters as PEFT has them",
    )
    out = "folder to create, also in a bucket; patch: file"
    parser.add_place("--out", required=True, help=out)
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    add("--file-gib", type=float, default=4.0, help="hf: largest weights file")
    add("--license", help="hf: its identifier for the model card, such as apache-2.0")
    add("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    parser.add_files("--edits", default=[], help="patches of stem_jax.edit to bake in")
    add(
        "--base",
        help="patch: the run that it is for; without it, train.init_from. peft: what "
        "adapter_config.json calls the base model",
    )
    add("--memory", default="stem", help="patch: whose rows")
    add_flags(parser)
    args = parser.parse_args(argv)
    if not 0 < args.file_gib < 2**30:
        parser.error(f"--file-gib={args.file_gib} must be more than 0, and a size that a disk has")
    if args.format != "hf" and args.file_gib != parser.get_default("file_gib"):
        parser.error(f"--file-gib={args.file_gib} is for --format=hf; one file is written")
    if args.format != "hf" and args.license is not None:
        parser.error(f"--license={args.license} is for --format=hf, which writes a model card")
    for flag, formats in (("base", ("patch", "peft")), ("memory", ("patch",))):
        given = getattr(args, flag)
        if given != parser.get_default(flag) and args.format not in formats:
            parser.error(f"--{flag}={given} is for --format={' or '.join(formats)}")
    of_part = args.format in ("patch", "peft")
    if of_part and (args.edits or args.no_tokenizer or args.dtype != "float32"):
        parser.error(
            f"--format={args.format} takes no --edits, no --no-tokenizer and no other --dtype"
        )
    return args
