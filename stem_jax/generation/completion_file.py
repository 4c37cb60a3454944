"""Completions of many prompts as JSON lines, written batch by batch; a killed job goes on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from stem_jax.checkpoints.files import check_outside
from stem_jax.errors import InputError
from stem_jax.files import parse_json, read_json, write_whole
from stem_jax.generation.completion import Completion
from stem_jax.lock import Lock
from stem_jax.unfinished import refused_writes

_FLAG = "--out"
# What a job knows by its digest alone, and the flags that give it.
_DIGESTS = {
    "prompts": "other prompts than --prompt, --prompt-file or --chat give now",
    "checkpoint": "another checkpoint than --workdir and --step give now",
    "edits": "other files than --edits gives now",
}
# Of a job whose prompts a template writes, which may write the date.
DATE = "date"
_REMEDY = "choose another file, or remove this one and what lies beside it"


class CompletionFile:
    """A line for each prompt, in their order; made by `open`.

    Beside it, `NAME.job.json` says what the lines are of. done: lines that are there.
    """

    def __init__(self, path: Path, file: Any, done: int):
        self.done = done
        self._path = path
        self._file = file

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, job: Mapping[str, Any]) -> "Iterator[CompletionFile]":
        """Begins a file, or goes on behind the last whole line of one.

        Args:
            job: all that the lines depend on, as JSON.

        Raises:
            InputError: a file of another job, or of none; one that another process writes, or that
                cannot be written.
        """
        check_outside(path, _FLAG)
        where, record = f"{_FLAG}={path}", _record_of(path)
        with refused_writes(where):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(path.with_name(f"{path.name}.lock"))
        if lock is None:
            raise InputError(f"{where} is being written by another process; choose another file")
        with lock:
            if record.exists():
                _check_same(read_json(record), job, where)
            elif path.exists():
                raise InputError(f"{where} exists, and {record.name} is not beside it; {_REMEDY}")
            else:
                write_whole(record, json.dumps(job, indent=2) + "\n", _FLAG)
            with refused_writes(where), path.open("ab+") as file:
                yield cls(path, file, _whole_lines(file, where))

    def add(self, completions: Sequence[Completion]) -> None:
        """Writes the next ones, which are on the disk then."""
        lines = ""
        for index, completion in enumerate(completions, start=self.done):
            record = {
                "index": index,
                "prompt": completion.prompt,
                "text": completion.text,
                "tokens": completion.tokens,
                "stop": completion.stop,
            }
            lines += json.dumps(record, ensure_ascii=False) + "\n"
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(completions)


def begun_at(path: Path) -> datetime | None:
    """When the job of a file was begun: now, if it was not. None: one of an earlier version.

    Raises InputError for a record that cannot be read.
    """
    record = _record_of(path)
    if not record.exists():
        return datetime.now().replace(microsecond=0)
    found = read_json(record)
    text = found.get(DATE) if isinstance(found, dict) else None
    try:
        return None if text is None else datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"{record}: {DATE} is {text!r}, which is no date; {_REMEDY}") from error


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.job.json")


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 (hex) of prompts, in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 (hex) of what is in files."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _check_same(found: Any, job: Mapping[str, Any], where: str) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{where} has a record that is no object; {_REMEDY}")
    for name in {**job, **found}:
        if found.get(name) != job.get(name):
            if name in _DIGESTS:
                raise InputError(f"{where} was begun with {_DIGESTS[name]}; {_REMEDY}")
            raise InputError(
                f"{where} was begun with {name} {found.get(name)}, not {job.get(name)}; {_REMEDY}"
            )


def _whole_lines(file: Any, where: str) -> int:
    """How many whole lines there are; what follows them is cut off."""
    file.seek(0)
    number = end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        place = f"{where}, line {number + 1}"
        record = parse_json(line, place, _REMEDY)
        if not isinstance(record, dict) or record.get("index") != number:
            raise InputError(f"{place} is not of prompt {number}; {_REMEDY}")
        number, end = number + 1, end + len(line)
    file.truncate(end)
    return number
