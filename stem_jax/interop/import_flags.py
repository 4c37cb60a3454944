"""The flags of `python -m stem_jax.import_torch`."""

import argparse
from pathlib import Path

from stem_jax import cli
from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import KINDS
from stem_jax.data.tokenizer_source import tokenizer_source
from stem_jax.interop.calibration import Calibration, check_overrides
from stem_jax.interop.model_source import model_source
from stem_jax.processes.cluster import add_flags

FORMATS = ("official", "hf", "llama")
# Where an import finds what its model does not decide.
BASE_CONFIG = Path("base")


def parse(
    argv: list[str], description: str | None
) -> tuple[argparse.Namespace, dict[str, str], Calibration]:
    """The flags, {"section.key": text} of the configuration, and how a Llama is converted.

    Exits with 2 for wrong flags, 0 for --help.

    Raises:
        InputError: a value out of range, or a key that a conversion does not follow.
    """
    keys = "Keys that the model does not decide can be given as --config.section.key=value."
    parser = cli.Parser("stem_jax.import_torch", f"{description}\n{keys}")
    add = parser.add_argument
    add("--from", required=True, choices=FORMATS, dest="kind", help="format of the model")
    add("--path", required=True, help="its folder, also in a bucket, or hf://ORG/NAME")
    parser.add_place("--workdir", required=True, help="folder to create, also in a bucket")
    parser.add_path("--config", help="config file, for all but the model; without it, base.py")
    add("--tokenizer", choices=KINDS, help="kind of the tokenizer, if not in --path")
    add("--tokenizer-path", help="its file, or hf://ORG/NAME")
    SpecialFlags.add_flags(parser)
    Calibration.add_flags(parser)
    add_flags(parser)
    parser.add_cache_flag()
    rest, overrides = cli.split_overrides(argv)
    args = parser.parse_args(rest)
    args.path = model_source(args.path, "--path")
    args.config = args.config or BASE_CONFIG
    if args.tokenizer_path is not None:
        args.tokenizer_path = tokenizer_source(args.tokenizer_path, "--tokenizer-path")
    if args.stem_layers and args.kind != "llama":
        parser.error(f"--stem-layers turns a Llama into a STEM model, not --from={args.kind}")
    calibration = Calibration.from_flags(args)
    if calibration != Calibration() and not args.stem_layers:
        parser.error("--calibration-... and --table-... need --stem-layers, which are not given")
    if args.tokenizer_path and not args.tokenizer:
        parser.error("--tokenizer-path needs --tokenizer, the kind")
    check_overrides(overrides if args.stem_layers else {})
    return args, overrides, calibration
