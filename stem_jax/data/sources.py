"""The sources of a training run: corpora, files or token stores, each with a weight."""

import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stem_jax.data import corpora
from stem_jax.data.bad_records import BadRecords
from stem_jax.data.documents import Document, find_files, read_documents
from stem_jax.data.formats import AS_FOUND, Reading, was_read_as_text
from stem_jax.data.prepare import open_stores, prepare_stores
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.storage import local_path

# What the stores beside it were made from; written last.
_RECORD_FILE = "source.json"


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of text as the user names it, and its weight in the mixture (positive).

    item: what it was parsed from.
    """

    source: str
    weight: float = 1.0
    item: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class OpenedSource:
    """A source ready to be read. `validation` is None if it was prepared without one."""

    source: str
    weight: float
    train: TokenStore
    validation: TokenStore | None


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """Parses "pydoc" or "pydoc=0.7,data/*.jsonl=0.3"; a weight left out is 1.

    What follows the last `=` is a weight if it is a number; else it belongs to the source, as in
    "data/lang=en/*.txt". The disk is not asked: a run goes on when its text is gone.

    Raises InputError naming the item for an empty name, a weight that is not a positive number, or
    a source given twice.
    """
    specs: list[SourceSpec] = []
    for item in text.split(","):
        name, equals, number = item.strip().rpartition("=")
        if not equals or not _is_number(number):
            name, number = item, "1"
        weight = float(number)
        if not name.strip():
            raise InputError(
                f"item {item!r} of data.sources {text!r} has no name: write NAME or NAME=WEIGHT"
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(
                f"item {item!r} of data.sources {text!r} has weight {number!r}: use a positive"
                " number"
            )
        if any(spec.source == name.strip() for spec in specs):
            raise InputError(
                f"item {item!r} of data.sources {text!r} is given twice: add up its weights"
            )
        local_path(name.strip(), "data.sources")
        specs.append(SourceSpec(name.strip(), weight, item.strip()))
    return tuple(specs)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_meant(spec: SourceSpec) -> None:
    """Refuses an item whose last part was taken for a weight where the whole is there."""
    whole = spec.item
    if whole not in ("", spec.source) and (_path(whole).exists() or glob.glob(str(_path(whole)))):
        raise InputError(
            f"item {whole!r} of data.sources names something that exists, but what follows the "
            f"last = is taken for a weight: write {whole}=1"
        )


def _path(source: str) -> Path:
    return local_path(source, "data.sources")


def read_sources(
    sources: Sequence[str], reading: Reading = AS_FOUND, bad: BadRecords | None = None
) -> Iterator[Document]:
    """The documents of built-in corpora and of the files that match patterns, in their order.

    Each corpus and each file once, however many of the sources name it.
    bad: see `read_documents`. Raises InputError as `find_files` and `read_documents` do.
    """
    given: set[str] = set()
    for source in dict.fromkeys(sources):
        if source in corpora.BUILTIN:
            for index, text in enumerate(corpora.read_corpus(source)):
                yield Document(text, f"{source}#{index}")
            continue
        files = [path for path in find_files([source]) if os.path.realpath(path) not in given]
        given.update(map(os.path.realpath, files))
        yield from read_documents(files, reading, bad)


def is_store_folder(source: str) -> bool:
    """Whether a source names a folder that `prepare_stores` wrote."""
    return (_path(source) / "train" / "meta.json").is_file()


def open_sources(
    sources: Sequence[SourceSpec],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    validation_fraction: float = 0.02,
    seed: int = 0,
    reading: Reading = AS_FOUND,
    vocab_size: int | None = None,
    progress: bool = True,
    keep: bool = False,
) -> tuple[OpenedSource, ...]:
    """Opens every source, preparing text that was not prepared before.

    A source is a folder of token stores, a built-in corpus or a file pattern. The last two are
    prepared below `folder` and reused while tokenizer, split, seed and text stay the same.
    vocab_size: of the model, if it is known; a store's may not be larger.
    keep: read what was prepared before as it is, also if its text has changed or gone since.
    On several processes that share `folder`, let one call it before the others do.
    Raises InputError for a source that cannot be read, or one of another tokenizer.
    """
    opened = []
    for spec in sources:
        if not keep:
            _check_meant(spec)
        if is_store_folder(spec.source):
            target = _path(spec.source)
        elif _path(spec.source).is_dir():
            raise InputError(
                f"source {spec.source!r} is a folder without train/meta.json: run prepare, or give"
                " a file pattern"
            )
        else:
            target = Path(folder) / _folder_name(spec.source)
            kept = keep and (target / _RECORD_FILE).is_file()
            record = (
                None
                if kept
                else _source_record(spec.source, tokenizer, validation_fraction, seed, reading)
            )
            if not kept and not _is_current(target, record):
                (target / _RECORD_FILE).unlink(missing_ok=True)
                prepare_stores(
                    read_sources([spec.source], reading),
                    tokenizer,
                    target,
                    name=spec.source,
                    validation_fraction=validation_fraction,
                    seed=seed,
                    progress=progress,
                )
                (target / _RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        stores = open_stores(target, tokenizer, vocab_size)
        opened.append(
            OpenedSource(spec.source, spec.weight, stores["train"], stores.get("validation"))
        )
    return tuple(opened)


def _folder_name(source: str) -> str:
    if source in corpora.BUILTIN:
        return source
    readable = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:]
    return f"{readable}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _source_record(
    source: str, tokenizer: Tokenizer, validation_fraction: float, seed: int, reading: Reading
) -> dict[str, Any]:
    """Everything that the stores of a source are a function of."""
    record: dict[str, Any] = {
        "source": source,
        "fingerprint": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    if source in corpora.BUILTIN:
        # The text of the running Python changes with it.
        return {**record, "python": sys.version.split()[0]}
    files = find_files([source])
    stats = [(path, path.stat()) for path in files]
    record["files"] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    record["text_field"] = reading.text_field
    # Absent where they would say what held before they were written.
    if reading.format != "auto":
        record["format"] = reading.format
    elif any(map(was_read_as_text, files)):
        record["by_content"] = True
    return record


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / _RECORD_FILE).read_text()) == record
    except (OSError, ValueError):
        return False
