"""Makes a work folder from a model of PyTorch, with a checkpoint of step 0.

python -m stem_jax.import_torch --from=hf --path=exported --workdir=runs/imported
python -m stem_jax.import_torch --from=llama --path=llama --stem_layers=third --workdir=runs/stem
"""

import argparse
import time
from pathlib import Path

from stem_jax import cli
from stem_jax.data.tokenizer import KINDS
from stem_jax.interop.conversion import Calibration, check_overrides, convert
from stem_jax.interop.import_model import BASE_CONFIG, import_config, write_checkpoint
from stem_jax.interop.imports import FORMATS, find_tokenizer, read_model
from stem_jax.work_folder import making


def main(argv: list[str]) -> None:
    """Parses flags, reads the model and writes the folder."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nKeys that the model does not decide can be given as "
        "--config.section.key=value.",
        formatter_class=cli.HelpFormatter,
    )
    add = parser.add_argument
    add("--from", required=True, choices=FORMATS, dest="kind", help="format of the model")
    add("--path", required=True, help="its folder")
    add("--workdir", required=True, help="folder to create")
    add("--config", default=str(BASE_CONFIG), help="config file, for all but the model")
    add("--tokenizer", choices=KINDS, help="kind of the tokenizer, if not in --path")
    add("--tokenizer-path", "--tokenizer_path", help="its file")
    Calibration.add_flags(parser)
    rest, overrides = cli.split_overrides(argv)
    args = parser.parse_args(rest)
    if args.stem_layers and args.kind != "llama":
        parser.error(f"--stem-layers turns a Llama into a STEM model, not --from={args.kind}")
    calibration = Calibration.from_flags(args)
    if calibration != Calibration() and not args.stem_layers:
        parser.error("--calibration-... and --table-... need --stem-layers, which are not given")
    if args.tokenizer_path and not args.tokenizer:
        parser.error("--tokenizer-path needs --tokenizer, the kind")
    check_overrides(overrides if args.stem_layers else {})
    with making(Path(args.workdir)):
        start = time.perf_counter()
        given = (args.tokenizer, args.tokenizer_path) if args.tokenizer else None
        imported = read_model(args.kind, args.path)
        tokenizer = find_tokenizer(args.kind, Path(args.path), given)
        config = import_config(imported, tokenizer, args.config, overrides)
        if args.stem_layers:
            imported, report = convert(imported, config, tokenizer, args.stem_layers, calibration)
            print(report)
            config = import_config(imported, tokenizer, args.config, overrides)
        write_checkpoint(imported, config, tokenizer, args.workdir)
        seconds = time.perf_counter() - start
        print(f"{args.path} is in {args.workdir}, at step 0 ({seconds:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
