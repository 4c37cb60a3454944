"""A prepared text in a folder: what it is, and whether it is whole.

store/           train/, validation/ (dev) and tokenizer/, as `prepare` writes them
test/            train/ with the test documents, as `evaluate --perplexity=TEXT/test` reads it
documents.json   of each split, in store order: package, path, bytes and, of dev and test,
                 overlap: the share of its runs of 13 words that training documents hold
text.json        recipe, packages, counts, and the checksums of all that
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.files import read_json

FORMAT = 1
STORE, TEST, DOCUMENTS, RECORD = "store", "test", "documents.json", "text.json"
# Of each split, the store that holds it.
STORES = {"train": "store/train", "dev": "store/validation", "test": "test/train"}
_REMEDY = "remove the folder to prepare the text again"


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """A text that is ready to be trained on.

    store: source of a training, with its tokenizer. test: source of test documents; None where a
    text has none (facts). documents: the file with what each document is. checksum: sha256 (hex)
    of text.json, which holds the checksums of all else.
    """

    name: str
    store: Path
    test: Path | None
    documents: Path
    checksum: str

    @property
    def record(self) -> dict[str, Any]:
        """What text.json says."""
        return read_json(self.documents.with_name(RECORD), remedy=_REMEDY)


def open_text(folder: Path) -> PreparedText:
    """Opens a prepared text, of which every byte is read and compared with its checksum.

    Raises:
        InputError: the folder is none, of another version, or damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(
            f"folder {folder} has no {RECORD}, so it is no prepared text: give one that"
            " stem_jax.study.prepare_texts wrote, or a new folder"
        )
    record = read_json(path, remedy=_REMEDY)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}: {_REMEDY}")
    try:
        name, checksums = record["name"], record["checksums"]
        if checksums_of(folder, list(checksums["stores"])) != checksums:
            raise InputError(f"text {folder} differs from its checksums in {RECORD}: {_REMEDY}")
        test = folder / TEST if "test" in checksums["stores"] else None
    except (KeyError, TypeError, OSError) as error:
        raise InputError(f"text {folder} is not whole ({error}): {_REMEDY}") from error
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return PreparedText(name, folder / STORE, test, folder / DOCUMENTS, checksum)


def checksums_of(folder: Path, splits: list[str]) -> dict[str, Any]:
    """sha256 (hex) of what lies in a folder: stores by split, tokenizer, list of documents.

    Raises:
        InputError: a store or the tokenizer is missing or damaged.
        OSError: the list of documents cannot be read.
    """
    tokenizer = load_tokenizer_folder(folder / STORE / "tokenizer")
    stores = {}
    for split in splits:
        place = folder / STORES[split]
        meta = TokenStore.open(place, fingerprint=tokenizer.fingerprint, verify=True).meta
        whole = meta.checksum + meta.bytes_checksum
        stores[split] = hashlib.sha256(whole.encode()).hexdigest()
    documents = hashlib.sha256((folder / DOCUMENTS).read_bytes()).hexdigest()
    return {"stores": stores, "tokenizer": tokenizer.fingerprint, "documents": documents}
