"""What the stores of a source are a function of, and where they lie."""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from stem_jax.data import corpora
from stem_jax.data.documents import find_files
from stem_jax.data.formats import Reading, was_read_as_text
from stem_jax.data.preparation import RECORD
from stem_jax.data.token_store import META_FILE, TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.files import read_json

# Of the text as it is now. What was prepared before is a source's without them.
_TEXT_KEYS = ("files", "python", "by_content")
# Absent from records of earlier versions, whose stores show them.
_SPECIAL_KEYS = ("bos_id", "eos_id")
# Of files, where a record does not say it.
_DEFAULTS = {"text_field": "text", "format": "auto"}


def text_record(sources: Sequence[str], reading: Reading) -> dict[str, Any]:
    """Everything that the documents of some sources are a function of.

    Raises InputError for a pattern that matches no file.
    """
    record: dict[str, Any] = {}
    patterns = [source for source in sources if source not in corpora.BUILTIN]
    if len(patterns) < len(sources):
        # The text of the running Python changes with it.
        record["python"] = sys.version.split()[0]
    if not patterns:
        return record
    files = find_files(patterns)
    stats = [(path, path.stat()) for path in files]
    record["files"] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    record["text_field"] = reading.text_field
    # Absent where they would say what held before they were written.
    if reading.format != "auto":
        record["format"] = reading.format
    elif any(map(was_read_as_text, files)):
        record["by_content"] = True
    return record


def settings_record(tokenizer: Tokenizer, validation_fraction: float, seed: int) -> dict[str, Any]:
    """What stores are a function of beside their text."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }


def folder_of(folder: Path, record: dict[str, Any]) -> Path:
    """Where the stores of a source are prepared. record: with its "source"."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return folder / f"{_readable(record['source'])}-{digest[:12]}"


def earlier_folder_of(folder: Path, source: str) -> Path:
    """Where earlier versions prepared a source, whatever its record."""
    if source in corpora.BUILTIN:
        return folder / source
    return folder / f"{_readable(source)}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def is_current(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a folder has the stores that a record describes."""
    found = _read(folder)
    if found is None or found == record:
        return found is not None
    earlier = {key: value for key, value in record.items() if key not in _SPECIAL_KEYS}
    return found == earlier and _special_ids(folder) == [record[key] for key in _SPECIAL_KEYS]


def find_prepared(
    folder: Path, source: str, settings: dict[str, Any], reading: Reading, checksums: Collection
) -> Path | None:
    """The stores of a source that were prepared before, also if its text has changed or gone since.

    checksums: of training stores; one that has one of them goes before the newest.
    """
    wanted = {**settings, "source": source}
    wanted_of_files = {**wanted, "text_field": reading.text_field, "format": reading.format}
    found = []
    places = [earlier_folder_of(folder, source), *sorted(folder.glob(f"{_readable(source)}-*"))]
    for place in dict.fromkeys(places):
        record = _read(place)
        if record is None:
            continue
        is_files = "files" in record
        expected = wanted_of_files if is_files else wanted
        # What a record does not say was not known to matter, or is what always held.
        said = {**expected, **(_DEFAULTS if is_files else {}), **_without_text(record)}
        if said == expected:
            known = TokenStore.open(place / "train").meta.checksum in checksums
            found.append((known, (place / RECORD).stat().st_mtime_ns, place))
    return max(found)[-1] if found else None


def same_but_for_text(one: Any, other: dict[str, Any]) -> bool:
    """Whether two records are of one source and differ at most in what its text is now."""
    return isinstance(one, dict) and _without_text(one) == _without_text(other)


def _without_text(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _TEXT_KEYS}


def _read(folder: Path) -> dict[str, Any] | None:
    """The record of whole stores; None where there are none."""
    try:
        record = read_json(folder / RECORD)
    except InputError:
        return None
    whole = (folder / "train" / META_FILE).is_file()
    return record if whole and isinstance(record, dict) else None


def _special_ids(folder: Path) -> list[int]:
    """The ids that begin and end the documents of a store."""
    return list(TokenStore.open(folder / "train").ends)


def _readable(source: str) -> str:
    if source in corpora.BUILTIN:
        return source
    return re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:]
