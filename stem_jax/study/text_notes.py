"""What records say of a text: enough to read them without it."""

import json
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.study.prepared_text import PreparedText


def note_text(text: PreparedText, records: Path) -> None:
    """Writes `text_NAME.json` beside the records, or compares with the one that is there.

    Raises:
        InputError: the records there were measured on another text of that name.
    """
    path, asked = _path(records, text.name), _note(text)
    if path.exists():
        there = read_json(path)
        if there != asked:
            raise InputError(
                f"text {text.name!r} is not the one of the records in {records} (checksum "
                f"{asked['checksum'][:12]}, theirs {there.get('checksum', '')[:12]}); prepare it "
                "with their code, or give another --records"
            )
        return
    write_whole(path, json.dumps(asked, indent=1, sort_keys=True) + "\n")


def noted_overlaps(records: Path, name: str) -> list[float] | None:
    """Of each test document the share of its 13-grams that training holds, in store order."""
    path = _path(records, name)
    if not path.exists():
        return None
    return [document["overlap"] for document in read_json(path)["test"]] or None


def _path(records: Path, name: str) -> Path:
    return records / f"text_{name}.json"


def _note(text: PreparedText) -> dict[str, Any]:
    documents = read_json(text.documents) if text.documents.exists() else {}
    kept = ("package", "path", "bytes", "overlap")
    test = [{key: each[key] for key in kept} for each in documents.get("test", [])]
    return {"name": text.name, "checksum": text.checksum, "test": test}
