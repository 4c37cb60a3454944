"""What every entry point shares: exit codes, override flags, and process-wide JAX settings."""

import argparse
import os
import sys
from collections.abc import Callable

import absl.logging

from stem_jax.errors import InputError, TrainingError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a description as written and appends defaults to the flags."""


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`; exits 0 on success, 1 on refused input, 2 on wrong flags (argparse)."""
    # Orbax and grain report their routine as warnings, and what they raise once more as errors.
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        main(sys.argv[1:])
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def integers(text: str) -> tuple[int, ...]:
    """The value of a flag such as --layers=0,1."""
    return tuple(int(part) for part in text.split(",") if part.strip())


def names(text: str) -> list[str]:
    """The value of a flag such as --edits=a,b."""
    return [part for part in text.split(",") if part]


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.section.key=value` from the other flags.

    `--config.section.key value` is accepted too. Returns (other flags, {"section.key": "value"}).
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    remaining = iter(argv)
    for argument in remaining:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(remaining, None)
            if value is None:
                raise InputError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides[key] = value
    return rest, overrides
