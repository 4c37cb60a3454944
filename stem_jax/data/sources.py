"""The sources of a training run: corpora, files or token stores, each with a weight."""

import dataclasses
import glob
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from stem_jax.data import corpora
from stem_jax.data.bad_records import BadRecords
from stem_jax.data.documents import Document, find_files, read_documents
from stem_jax.data.formats import AS_FOUND, Reading
from stem_jax.data.preparation import RECORD, Preparation, is_unfinished, remove_unfinished
from stem_jax.data.prepare import open_stores, write_stores
from stem_jax.data.remote_sources import check_is_text, source_path
from stem_jax.data.source_record import (
    earlier_folder_of,
    find_prepared,
    folder_of,
    is_current,
    same_but_for_text,
    settings_record,
    text_record,
)
from stem_jax.data.token_store import META_FILE, TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.files import write_whole
from stem_jax.storage import is_remote, place


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


def parse_sources(text: str, key: str = "data.sources") -> tuple[SourceSpec, ...]:
    """Parses "pydoc" or "pydoc=0.7,data/*.jsonl=0.3"; a weight left out is 1.

    What follows the last `=` is a weight if it is a number; else it belongs to the source, as in
    "data/lang=en/*.txt". The disk is not asked: a run goes on when its text is gone.

    key: that the text is the value of, or a flag, for messages.

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
                f"item {item!r} of {key} {text!r} has no name: write NAME or NAME=WEIGHT"
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(
                f"item {item!r} of {key} {text!r} has weight {number!r}: use a positive number"
            )
        if any(spec.source == name.strip() for spec in specs):
            raise InputError(f"item {item!r} of {key} {text!r} is given twice: add up its weights")
        place(name.strip(), key)
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
    if whole in ("", spec.source) or is_remote(place(whole, "data.sources")):
        return
    path = place(whole, "data.sources")
    if path.exists() or glob.glob(str(path)):
        raise InputError(
            f"item {whole!r} of data.sources names something that exists, but what follows the "
            f"last = is taken for a weight: write {whole}=1"
        )


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


def is_store_folder(source: str | Path) -> bool:
    """Whether a source names a folder that `prepare_stores` wrote, also one in a bucket."""
    folder = source_path(source)
    return folder is not None and (folder / "train" / META_FILE).is_file()


def stores_folder(source: str | Path) -> Path:
    """Where the stores of a source are on this machine, of which `is_store_folder` is true."""
    folder = source_path(source)
    assert folder is not None, source
    return folder


def check_folder(source: str | Path, name: str = "") -> None:
    """Raises InputError for a folder without whole stores, saying what it is.

    name: of the folder in messages, which must be one of stores; without it, a source may be files.
    """
    folder = source_path(source)
    if folder is None:
        return check_is_text(str(source), name)
    if not folder.is_dir() or is_store_folder(source):
        return
    what = f"{name or f'source {source!r}'} is a folder without train/meta.json"
    if is_unfinished(folder):
        raise InputError(
            f"{what}, in which a prepare was stopped: the same prepare command goes on where it was"
        )
    if (folder / META_FILE).is_file():
        raise InputError(
            f"{what}, but itself a store of one split: give the folder that has train in it"
        )
    pattern = "" if name else f", or give a file pattern, such as {source}/*.txt"
    raise InputError(f"{what}: run prepare{pattern}")


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
    checksums: Collection[str] = (),
) -> tuple[OpenedSource, ...]:
    """Opens every source, preparing text that was not prepared before.

    A source is a folder of token stores, a built-in corpus or a file pattern. The last two are
    prepared below `folder` and reused while tokenizer, split, seed and text stay the same; runs
    that share the folder and differ in one of them have each their own below it.
    vocab_size: of the model, if it is known; a store's may not be larger.
    keep: read what was prepared before as it is, also if its text has changed or gone since, best
        that with one of the `checksums`.
    On several processes that share `folder`, let one call it before the others do.
    Raises InputError for a source that cannot be read, or one of another tokenizer.
    """
    opened = []
    for spec in sources:
        if not keep:
            _check_meant(spec)
        check_folder(spec.source)
        if is_store_folder(spec.source):
            target = stores_folder(spec.source)
        else:
            found = None
            settings = settings_record(tokenizer, validation_fraction, seed)
            if keep:
                found = find_prepared(Path(folder), spec.source, settings, reading, checksums)
            if found is None:
                record = {"source": spec.source, **settings}
                record |= text_record([spec.source], reading)
                found = _prepared(record, tokenizer, Path(folder), reading, progress)
            target = found
        stores = open_stores(target, tokenizer, vocab_size)
        opened.append(
            OpenedSource(spec.source, spec.weight, stores["train"], stores.get("validation"))
        )
    return tuple(opened)


def _prepared(
    record: dict[str, Any], tokenizer: Tokenizer, folder: Path, reading: Reading, progress: bool
) -> Path:
    """The folder of a source's stores, which are made if they are not there."""
    source = record["source"]
    target, earlier = folder_of(folder, record), earlier_folder_of(folder, source)
    if is_current(target, record):
        return target
    if is_current(earlier, record):
        return earlier
    remove_unfinished(
        (place for place in folder.glob("*") if place != target),
        lambda job: same_but_for_text(job, record),
    )
    with Preparation(target, record, wait=True) as place:
        # Another process may have made them while this one waited.
        if not is_current(target, record):
            write_whole(place.new / RECORD, json.dumps(record, indent=2) + "\n")
            write_stores(
                place,
                read_sources([source], reading),
                tokenizer,
                name=source,
                validation_fraction=record["validation_fraction"],
                seed=record["seed"],
                progress=progress,
            )
    return target
