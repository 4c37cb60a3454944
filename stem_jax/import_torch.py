"""Makes a work folder from a model of PyTorch, with a checkpoint of step 0.

python -m stem_jax.import_torch --from=hf --path=exported --workdir=runs/imported
python -m stem_jax.import_torch --from=llama --path=llama --stem-layers=third --workdir=runs/stem
"""

import argparse
import sys
import time

from stem_jax import cli
from stem_jax.interop.calibration import Calibration
from stem_jax.interop.import_flags import parse
from stem_jax.jax_start import start_jax
from stem_jax.outgoing import outgoing
from stem_jax.processes.together import together


def main(argv: list[str]) -> None:
    """Parses flags, reads the model and writes the folder."""
    args, overrides, calibration = parse(argv, __doc__)
    start_jax(args.compilation_cache)
    with together(args) as first:
        if first:
            _import(args, overrides, calibration)


def _import(args: argparse.Namespace, overrides: dict[str, str], calibration: Calibration) -> None:
    from stem_jax.checkpoints.files import COMMITTED, FOLDER
    from stem_jax.interop.conversion import convert
    from stem_jax.interop.import_model import import_config, write_checkpoint
    from stem_jax.interop.import_tokenizer import TokenizerChoice, find_tokenizer
    from stem_jax.interop.imports import read_model
    from stem_jax.interop.model_source import model_folder
    from stem_jax.work_folder import LOCK, held, making

    whole = f"{FOLDER}/0/{COMMITTED}"
    start = time.perf_counter()
    with (
        held(args.workdir),
        outgoing(args.workdir, "--workdir", whole, own=LOCK) as workdir,
        making(workdir),
    ):
        folder = model_folder(args.path, "--path")
        imported = read_model(args.kind, folder)
        choice = TokenizerChoice.from_flags(args)
        tokenizer = find_tokenizer(args.kind, folder, choice)
        for note in tokenizer.notes:
            print(f"note: {note}", file=sys.stderr)
        config = import_config(imported, tokenizer, args.config, overrides)
        if args.stem_layers:
            imported, report = convert(imported, config, tokenizer, args.stem_layers, calibration)
            print(report)
            config = import_config(imported, tokenizer, args.config, overrides)
        write_checkpoint(imported, config, tokenizer, workdir)
    print(f"{args.path} is in {args.workdir}, at step 0 ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
