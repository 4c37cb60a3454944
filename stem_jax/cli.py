"""What every entry point shares: its flags, exit codes, and what it does when it is interrupted."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import absl.logging

from stem_jax.errors import InputError, TrainingError
from stem_jax.storage import local_path


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a description as written; appends the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not `in`, which takes 0 for False.
        silent = action.default is None or action.default is False or action.default in ("", [])
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The flags of one program. `--two_words` is taken for `--two-words`."""

    def __init__(self, program: str, description: str | None):
        """program: its module, such as "stem_jax.train"."""
        super().__init__(
            prog=f"python -m {program}", description=description, formatter_class=_HelpFormatter
        )

    def add_path(self, flag: str, **options) -> None:
        """Adds a flag that names a file or folder of this machine: see `storage.local_path`."""
        self.add_argument(flag, type=lambda text: local_path(text, flag), **options)

    def add_paths(self, flag: str, **options) -> None:
        """Adds a flag whose value names several, with commas between them."""

        def paths(text: str) -> list[Path]:
            return [local_path(part.strip(), flag) for part in text.split(",") if part.strip()]

        self.add_argument(flag, type=paths, **options)

    def add_cache_flag(self) -> None:
        """Adds what `compilation_cache.keep_programs` is to be told."""
        self.add_argument(
            "--no-compilation-cache",
            dest="compilation_cache",
            action="store_false",
            help="compile anew, and keep no compiled programs for the next start",
        )

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(text) for text in given], namespace)

    def _dashed(self, text: str) -> str:
        flag, equals, value = text.partition("=")
        dashed = flag.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else text


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`; exits 0 on success, 1 on refused input, 2 on wrong flags (argparse).

    Ctrl-C ends the process by that signal, after one line, as a shell expects of a program that it
    interrupts; a second one does not wait for what is being put away.
    """
    # Orbax and grain report their routine as warnings, and what they raise once more as errors.
    absl.logging.set_verbosity(absl.logging.FATAL)
    with _Interrupt() as interrupt:
        try:
            main(sys.argv[1:])
        except BrokenPipeError:
            # The reader of our output went away (`| head`): not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except BaseException as error:
            # A library may have made another exception of it.
            if interrupt.came or isinstance(error, KeyboardInterrupt):
                interrupt.end()
            if not isinstance(error, InputError | TrainingError):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


class _Interrupt:
    """Ctrl-C, which raises KeyboardInterrupt and is remembered."""

    def __init__(self):
        self.came = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Self:
        # A program that was started in the background ignores it.
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        if self.came:
            self.end()
        self.came = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """Ends this process as interrupted. Threads and exit handlers would have more to say."""
        with contextlib.suppress(OSError, RuntimeError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, RuntimeError):
            print("interrupted", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def name_or_path(flag: str) -> Callable[[str], str]:
    """The `type` of a flag that takes names, of corpora or tasks, as well as paths."""

    def text(value: str) -> str:
        path = local_path(value, flag)
        # `./facts` is a file, `facts` the corpus.
        return str(path) if value.startswith("~") else value

    text.__name__ = "str"
    return text


def integers(text: str) -> tuple[int, ...]:
    """The value of a flag such as --layers=0,1."""
    return tuple(int(part) for part in text.split(",") if part.strip())


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.section.key=value` from the other flags.

    `--config.section.key value` is accepted too, but for a value that looks like a flag. Returns
    (other flags, {"section.key": "value"}).

    Raises:
        InputError: a key without a value.
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
            if value is None or value.startswith("--"):
                seen = "" if value is None else f", and {value} is a flag"
                raise InputError(f"--config.{key} needs a value{seen}: --config.{key}=VALUE")
        overrides[key] = value
    return rest, overrides
