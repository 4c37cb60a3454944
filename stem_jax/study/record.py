"""Records: what a finished run leaves, in a file that needs no checkpoint to be read."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stem_jax.config import Config
from stem_jax.config_file import with_later_keys
from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.study.code_state import short

FORMAT = 1
# Bytes.
LARGEST = 200_000
_FIELDS = {
    *("format", "name", "run", "commit", "machine", "config", "checksums", "diverged"),
    *("curve", "measures", "documents", "size", "checksum"),
}
# Where a run lies on the machine that trained it.
_PLACES = (("data", "sources"), ("data", "folder"), ("train", "compilation_cache"))


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `NAME.json` whole, with a checksum of what it says.

    Raises:
        InputError: it is larger than `LARGEST`, or cannot be written.
    """
    body = {"format": FORMAT, **record}
    text = json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True, indent=1) + "\n"
    if len(text) > LARGEST:
        text = json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True) + "\n"
    path = folder / f"{record['name']}.json"
    if len(text) > LARGEST:
        raise InputError(f"record {path} takes {len(text):,} bytes of at most {LARGEST:,}")
    write_whole(path, text)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        InputError: it cannot be read, is of another format, or was changed since it was written.
    """
    record = read_json(path, "record", "restore it, or remove it to train that run again")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"record {path} is not of format {FORMAT}; remove it to train it again")
    if missing := sorted(_FIELDS - set(record)):
        raise InputError(f"record {path} lacks {missing[0]!r}; remove it to train it again")
    body = {key: value for key, value in record.items() if key != "checksum"}
    if _checksum(body) != record["checksum"] or path.stem != record["name"]:
        raise InputError(
            f"record {path} was changed since it was written; restore it, or remove it to train "
            "that run again"
        )
    return record


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records of a folder, by name; none where there is no folder."""
    paths = sorted(path for path in folder.glob("*.json") if ".s" in path.stem)
    return {path.stem: read_record(path) for path in paths}


def config_of_record(config: Config, text: str) -> dict[str, Any]:
    """The configuration as records hold it: the same wherever the run lay."""
    raw = json.loads(config.to_json())
    for section, key in _PLACES:
        raw[section][key] = None
    raw["data"]["sources"] = text
    return raw


def check_config(record: dict[str, Any], config: Config) -> None:
    """Refuses a record of a run of the same name with another configuration."""
    asked = config_of_record(config, record["run"]["text"])
    # It may be of code that had fewer keys.
    found = with_later_keys(record["config"])
    for section, values in asked.items():
        for key, value in values.items():
            there = found.get(section, {}).get(key)
            if there == "none" and value == []:
                continue  # Layers, as they are written and as they are built.
            if there != value:
                raise InputError(
                    f"record {record['name']} was trained with {section}.{key}={there!r}, the "
                    f"study asks for {value!r}; give another --records, or the study as it was"
                )


def for_code_of(record: dict[str, Any], raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A configuration without the keys that the code of a record, an earlier one, has not.

    Raises:
        InputError: one of those keys says more than that all is as it was before.
    """
    known = record["config"]
    kept = {
        section: {key: value for key, value in values.items() if key in known.get(section, {})}
        for section, values in raw.items()
        if section in known
    }
    filled = with_later_keys(kept)
    for section, values in raw.items():
        for key, value in values.items():
            before = filled.get(section, {}).get(key)
            if before != value and not (before == "none" and value == []):
                raise InputError(
                    f"{section}.{key}={value!r} is unknown to the records' code "
                    f"({short(record['commit'])}); leave it out, or give --mixed-code"
                )
    return kept


def one_commit(records: Iterable[dict[str, Any]], mixed: bool) -> str | None:
    """The commit that all records are of; None without any, or where they may be mixed.

    Raises:
        InputError: they are of several, and `mixed` is not allowed.
    """
    commits: dict[str, str] = {}
    for record in records:
        commits.setdefault(record["commit"], record["name"])
    if len(commits) > 1 and not mixed:
        (first, a), (second, b) = list(commits.items())[:2]
        raise InputError(
            f"record {a} is of commit {short(first)}, {b} of {short(second)}: figures of different "
            "code are not compared; give --mixed-code, which the page then says"
        )
    return next(iter(commits)) if len(commits) == 1 else None


def digest_of(arrays: Sequence[tuple[str, Any]]) -> str:
    """SHA-256 over named arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
