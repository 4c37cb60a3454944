"""What every entry point shares: its flags, exit codes, and what it does when it is interrupted."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import absl.logging

from stem_jax import background
from stem_jax.bucket_files import as_given, fetched, opened, result, seen, upload_written
from stem_jax.errors import InputError, TrainingError
from stem_jax.storage import local_path, place


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a description as written; appends the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A switch takes no value, so its default is none that could be given.
        silent = action.nargs == 0 or action.default in (None, "", [])
        if not silent and isinstance(action.default, list):
            # As the flag is written.
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The flags of one program. `--two_words` is taken for `--two-words`."""

    def __init__(self, program: str, description: str | None):
        """program: its module, such as "stem_jax.train"."""
        super().__init__(
            prog=_as_started(program), description=description, formatter_class=_HelpFormatter
        )
        self._converted: dict[str, tuple[str, Callable[[str, str], Any]]] = {}

    def add_path(self, flag: str, **options) -> None:
        """Adds a flag that names a file or folder of this machine: see `storage.local_path`."""
        self._add(flag, local_path, **options)

    def add_place(self, flag: str, **options) -> None:
        """Adds a flag that names a path or an address of a bucket: see `storage.place`."""
        self._add(flag, place, **options)

    def add_run_folder(self, flag: str, **options) -> None:
        """Adds a flag that names the folder of a run to read: see `bucket_files.opened`."""
        self._add(flag, opened, **options)

    def add_seen_folder(self, flag: str, **options) -> None:
        """Adds a flag that names the folder of a run, whatever it has: see `bucket_files.seen`."""
        self._add(flag, seen, **options)

    def add_file(self, flag: str, **options) -> None:
        """Adds a flag that names a file to read, also in a bucket: see `bucket_files.fetched`."""
        self._add(flag, fetched, **options)

    def add_result(self, flag: str, **options) -> None:
        """Adds a flag that names a file or folder to write, see `bucket_files.result`."""
        self._add(flag, result, **options)

    def add_paths(self, flag: str, **options) -> None:
        """Adds a flag whose value names several of this machine, with commas between them."""
        self._add(flag, _paths, **options)

    def add_files(self, flag: str, **options) -> None:
        """Adds a flag whose value names several to read, also in buckets."""
        self._add(flag, _files, **options)

    def add_names(self, flag: str, parser=None, **options) -> None:
        """Adds a flag whose values name corpora or tasks, or are paths.

        parser: a group of this one that the flag belongs to.
        """
        self._add(flag, _name_or_path, parser, **options)

    def _add(self, flag: str, convert: Callable[[str, str], Any], parser=None, **options) -> None:
        # Not the `type` of the flag: argparse takes a refusal for a wrong flag.
        self._converted[(parser or self).add_argument(flag, **options).dest] = (flag, convert)

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
        dashed = [self._dashed(text) for text in given]
        found, unknown = super().parse_known_args(dashed, namespace)
        for dest, (flag, convert) in self._converted.items():
            value = getattr(found, dest)
            if isinstance(value, str):
                setattr(found, dest, convert(value, flag))
            elif isinstance(value, list):
                setattr(found, dest, [convert(text, flag) for text in value])
        return found, unknown

    def _dashed(self, text: str) -> str:
        flag, equals, value = text.partition("=")
        dashed = flag.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else text


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`; exits 0 on success, 1 on refused input, 2 on wrong flags (argparse).

    Ctrl-C ends the process by that signal, after one line, as a shell expects of a program that it
    interrupts; a second one does not wait for what is being put away. What is under way in the
    background is waited for in no case.
    """
    try:
        _run(main)
    except BaseException as error:
        if background.under_way():
            background.leave(error)
        raise
    if background.under_way():
        background.leave(None)


def say(text: str) -> None:
    """Prints what names files of this machine by their addresses where they stand for some."""
    print(as_given(text))


def _run(main: Callable[[list[str]], None]) -> None:
    # Orbax and grain report their routine as warnings, and what they raise once more as errors.
    absl.logging.set_verbosity(absl.logging.FATAL)
    with _Interrupt() as interrupt:
        try:
            main(sys.argv[1:])
            upload_written()
        except BrokenPipeError:
            # The reader of our output went away (`| head`): not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except BaseException as error:
            # A library may have made another exception of it.
            if interrupt.came or isinstance(error, KeyboardInterrupt):
                said = error.args if isinstance(error, KeyboardInterrupt) else ()
                interrupt.end(*map(str, said[:1]))
            if not isinstance(error, InputError | TrainingError):
                raise
            print(f"error: {as_given(str(error))}", file=sys.stderr)
            sys.exit(1)


class _Interrupt:
    """Ctrl-C, which raises KeyboardInterrupt and is remembered."""

    def __init__(self):
        self.came = False
        self._before = signal.getsignal(signal.SIGINT)
        self._hook = sys.unraisablehook

    def __enter__(self) -> Self:
        # A program that was started in the background ignores it.
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        sys.unraisablehook = self._hook

    def _unraisable(self, what: Any) -> None:
        """Raised in a callback of the garbage collector or a finalizer it is lost: again, later."""
        if not isinstance(what.exc_value, KeyboardInterrupt):
            return self._hook(what)
        self.came = False
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    def _handle(self, number: int, frame: object) -> None:
        if self.came:
            self.end()
        self.came = True
        raise KeyboardInterrupt

    def end(self, consequence: str = "") -> None:
        """Ends this process as interrupted. Threads and exit handlers would have more to say."""
        line = f"interrupted; {consequence}" if consequence else "interrupted"
        with contextlib.suppress(OSError, RuntimeError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, RuntimeError):
            print(line, file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _as_started(program: str) -> str:
    script = program.replace("_jax.", "-").replace("_", "-")
    return script if Path(sys.argv[0]).stem == script else f"python -m {program}"


def _paths(value: str, flag: str) -> list[Path]:
    return _several(value, flag, local_path)


def _files(value: str, flag: str) -> list[Path]:
    return _several(value, flag, fetched)


def _several(value: str, flag: str, one: Callable[[str, str], Path]) -> list[Path]:
    paths = [one(part.strip(), flag) for part in value.split(",") if part.strip()]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{flag}={value} names {path} twice; name it once")
    return paths


def _name_or_path(value: str, flag: str) -> str:
    path = local_path(value, flag)
    # `./facts` is a file, `facts` the corpus.
    return str(path) if value.startswith("~") else value


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
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                seen = "" if following is None else f", and {following} is a flag"
                raise InputError(f"--config.{key} needs a value{seen}: --config.{key}=VALUE")
            value = following
        overrides[key] = value
    return rest, overrides
