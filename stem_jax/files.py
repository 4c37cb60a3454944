"""JSON that is read with one set of refusals; files and folders that appear whole or not at all."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stem_jax.byte_order_mark import MARK
from stem_jax.errors import InputError
from stem_jax.swapped_names import swap_names
from stem_jax.unfinished import moved_away, refused_writes, remove, unfinished

# Of lists and objects in each other; files that people write stay below 20. A fixed number: what
# the JSON reader of Python bears depends on its version and on who calls it.
DEEPEST = 200
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_REMEDY = "correct it, or restore it"


def parse_json(
    source: str | bytes, where: str, remedy: str = _REMEDY, *, constants: bool = False
) -> Any:
    """The value of a JSON text, UTF-8 if it is bytes; a byte order mark before it is left out.

    Args:
        where: the text came from, and remedy: what to do about a bad one, for messages.
        constants: take NaN and Infinity, which JSON has not but some writers write; whoever reads
            such a number then has to look at it.

    Raises:
        InputError: it is not JSON, not UTF-8, nested deeper than `DEEPEST`, or gives a key of one
            object two different values.
    """

    def refuse(reason: str) -> InputError:
        return InputError(f"{where} {reason}; {remedy}")

    if isinstance(source, bytes):
        if source.startswith(_UTF16):
            raise refuse("is UTF-16, expected UTF-8")
        try:
            source = source.decode("utf-8")
        except UnicodeDecodeError as error:
            raise refuse(f"is not UTF-8 (byte {error.start})") from error
    source = source.lstrip(MARK)
    if not source.strip():
        raise refuse("is empty, expected JSON")
    hooks: dict[str, Any] = {"object_pairs_hook": _object}
    if not constants:
        hooks["parse_constant"] = _refuse_constant
    try:
        value = json.loads(source, **hooks)
    except RecursionError as error:
        raise refuse(f"is nested deeper than {DEEPEST} levels") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise refuse(f"is not JSON ({error.msg}: {place})") from error
    except ValueError as error:
        raise refuse(f"is not JSON ({error})") from error
    # No text with fewer brackets can be so deep, and counting them costs nothing.
    if source.count("[") + source.count("{") > DEEPEST and _too_deep(value):
        raise refuse(f"is nested deeper than {DEEPEST} levels")
    return value


def read_json(
    path: str | Path, what: str = "", remedy: str = _REMEDY, *, constants: bool = False
) -> Any:
    """The value of a JSON file.

    Args:
        what: the file is, before its path in messages: "the index", or a flag with its "=".

    Raises:
        InputError: it cannot be read, and as `parse_json` does.
    """
    where = f"{what}{'' if what.endswith('=') or not what else ' '}{path}"
    try:
        # An address of a bucket is none of pathlib's.
        source = (Path(path) if isinstance(path, str) else path).read_bytes()
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror or error}); {remedy}") from error
    return parse_json(source, where, remedy, constants=constants)


def check_absent(folder: Path, flag: str) -> None:
    """Raises InputError if the folder, or file, exists."""
    # Unlike a Path's, it does not raise for a name that no file can have.
    if os.path.lexists(folder):
        raise InputError(f"{flag}={folder} exists; choose another name, or remove it first")


@contextlib.contextmanager
def new_folder(folder: Path, flag: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end; removed on an error or SIGTERM.

    Args:
        flag: where the name came from, for messages.

    Raises:
        InputError: the folder exists, cannot be created, or the disk is full.
    """
    check_absent(folder, flag)
    where = f"{flag}={folder}"
    with unfinished(folder, where, _make_folder) as made:
        yield made
        with refused_writes(where):
            sync_all(made)
            check_absent(folder, flag)
            made.rename(folder)
            _sync(folder.parent)


@contextlib.contextmanager
def replace_folder(folder: Path, flag: str) -> Iterator[Path]:
    """Like `new_folder`, but takes the place of a folder that exists, which is removed then."""
    where = f"{flag}={folder}"
    with refused_writes(where):
        # Behind a link the folder itself is replaced; the link stays.
        folder = folder.resolve() if folder.is_symlink() else folder
    with unfinished(folder, where, _make_folder) as made:
        yield made
        with refused_writes(where):
            sync_all(made)
            if folder.exists() and swap_names(made, folder):
                remove(made)
            elif folder.exists():
                # Two renames: a folder cannot be renamed over one that has files in it.
                folder.rename(moved_away(made))
                try:
                    made.rename(folder)
                except BaseException:
                    moved_away(made).rename(folder)
                    raise
                remove(moved_away(made))
            else:
                made.rename(folder)
            _sync(folder.parent)


def write_whole(path: str | Path, content: str | bytes, flag: str = "") -> None:
    """Writes a file, in place of one that is there; its folder is made.

    Args:
        content: text is written as UTF-8.
        flag: where the name came from, for messages.

    Raises:
        InputError: it cannot be written, or something else than a file has the name.
    """
    path = Path(path)
    where = f"{flag}={path}" if flag else str(path)
    path = _file_to_write(path, where)
    with unfinished(path, where, _make_file) as made, refused_writes(where):
        with made.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
        _sync(path.parent)


@contextlib.contextmanager
def new_file(path: Path, flag: str) -> Iterator[BinaryIO]:
    """A file to write in any order, which gets its name at the end; none is left on an error.

    Args:
        flag: where the name came from, for messages.

    Raises:
        InputError: something has the name, it cannot be created, or the disk is full.
    """
    check_absent(path, flag)
    where = f"{flag}={path}"
    with unfinished(path, where, _make_file) as made:
        with made.open("r+b") as file:
            yield file
            with refused_writes(where):
                file.flush()
                os.fsync(file.fileno())
        with refused_writes(where):
            check_absent(path, flag)
            made.rename(path)
            _sync(path.parent)


def check_writable(path: str | Path, flag: str) -> None:
    """Asks before the work whether `write_whole` can write a file, and leaves nothing there.

    Raises:
        InputError: as `write_whole` does.
    """
    path = Path(path)
    where = f"{flag}={path}"
    path = _file_to_write(path, where)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        # Permissions do not tell: root, read-only disks and access lists have their own rules.
        with unfinished(path, where, _make_file):
            pass
    finally:
        for folder in missing:
            # Somebody else's file in it keeps it.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _file_to_write(path: Path, where: str) -> Path:
    with refused_writes(where):
        # Behind a link the file itself is replaced; the link stays.
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise InputError(f"{where} is {kind}; give the name of a file")
    return path


def _make_folder(path: Path) -> None:
    path.mkdir()


def _make_file(path: Path) -> None:
    path.touch(exist_ok=False)


def sync_all(folder: Path) -> None:
    """Everything in a folder is on the disk before the folder has its name."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk, and those that were removed are gone from it."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do it for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key!r} stands twice in an object, with other values")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than `DEEPEST` times."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True
