"""The token store: flat token ids on disk, memory-mapped, with document boundaries.

A store is a folder:

    tokens.bin     ids of all documents in turn, each as bos, text, eos; little-endian uint16 if
                   the vocabulary has at most 65536 ids, else uint32
    documents.bin  uint64 start offsets into tokens.bin, one more than documents; the last = total
    bytes.bin      uint64 UTF-8 bytes of each document's text, of what is scored of it
    scored.bin     uint8 for each token: 1 where it is scored as a target; in stores of
                   conversations, else all are
    meta.json      the fields of StoreMeta

Rows of any length are cut at load time. With L = 4 and two documents (B = bos, E = eos)

    tokens.bin   B  a  b  E  B  c  d  e  E
    row 0        B  a  b  E | targets a  b  E  B   mask 1 1 1 0   segments 1 1 1 1
    row 1        B  c  d  e | targets c  d  e  E   mask 1 1 1 1   segments 1 1 1 1

every (input, target) pair inside a document is scored in exactly one row. A conversation begins as
its chat template writes it, with or without a bos.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from stem_jax.data.coverage import coverage_note
from stem_jax.errors import InputError
from stem_jax.files import read_json

FORMAT_VERSION = 1
META_FILE = "meta.json"
SCORED_FILE = "scored.bin"
_CHECKED_FILES = ("tokens.bin", "documents.bin")
_HASH_BYTES = 1 << 22
_SUM_ITEMS = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What meta.json records.

    checksum: sha256 (hex) over tokens.bin, documents.bin and, where it is there, scored.bin.
    bytes_checksum: over bytes.bin; "" where an earlier version wrote none. bos_id, eos_id: that
    every document begins and ends with; None where an earlier version did not say. left_out,
    changed: shares of a sample, as `Coverage` has them, and left_out_example a character; in the
    file where there are any. has_scored: there is scored.bin; in the file where there is, so that
    programs that do not know of it refuse the store.
    """

    format_version: int
    name: str
    split: str
    dtype: str
    vocab_size: int
    fingerprint: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    checksum: str
    bytes_checksum: str = ""
    bos_id: int | None = None
    eos_id: int | None = None
    left_out: float = 0.0
    changed: float = 0.0
    left_out_example: str = ""
    has_scored: bool = False

    @property
    def checked_files(self) -> tuple[str, ...]:
        """Those that `checksum` is over, in their order."""
        return (*_CHECKED_FILES, *([SCORED_FILE] if self.has_scored else []))

    @property
    def coverage_note(self) -> str:
        """What to say of the text that no token stands for; "" where there is nothing to say."""
        return coverage_note(self.left_out, self.left_out_example, self.changed)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A store opened for reading; `open` builds it.

    tokens: memory map [num_tokens] uint16 or uint32.
    document_starts: memory map [num_documents + 1] int64, offsets into tokens.
    document_bytes: memory map [num_documents] int64, UTF-8 bytes of the text that is scored.
    scored: memory map [num_tokens] bool, which tokens are; None: all but the first of a document.
    """

    folder: Path
    meta: StoreMeta
    tokens: np.ndarray = dataclasses.field(repr=False, compare=False)
    document_starts: np.ndarray = dataclasses.field(repr=False, compare=False)
    document_bytes: np.ndarray = dataclasses.field(repr=False, compare=False)
    scored: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        fingerprint: str | None = None,
        ends: tuple[int, int] | None = None,
        vocab_size: int | None = None,
        verify: bool = False,
    ) -> Self:
        """Opens a store without reading its tokens.

        fingerprint: of the tokenizer in use; must be the store's.
        ends: ids that it begins and ends documents with; must be the store's.
        vocab_size: of the model; the store's may be smaller (a padded model), not larger.
        verify: recompute the checksums, which reads the whole store.
        Raises InputError if the folder holds no store, a newer or damaged one, or one that was
        prepared with another tokenizer.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        if fingerprint is not None and fingerprint != meta.fingerprint:
            raise InputError(
                f"token store {folder} was prepared with tokenizer {meta.fingerprint[:12]}, not"
                f" with the given one, {fingerprint[:12]}: prepare the text again"
            )
        if vocab_size is not None and vocab_size < meta.vocab_size:
            raise InputError(
                f"token store {folder} has a vocabulary of {meta.vocab_size} ids, the model only"
                f" {vocab_size}: set model.vocab_size to at least {meta.vocab_size}"
            )
        token_dtype = np.dtype(meta.dtype).newbyteorder("<")
        store = cls(
            folder,
            meta,
            _map(folder / "tokens.bin", token_dtype, meta.num_tokens),
            # Signed, because NumPy turns uint64 minus int64 into float64.
            _map(folder / "documents.bin", np.dtype("<i8"), meta.num_documents + 1),
            _map(folder / "bytes.bin", np.dtype("<i8"), meta.num_documents),
            _map(folder / SCORED_FILE, np.dtype(bool), meta.num_tokens)
            if meta.has_scored
            else None,
        )
        if ends is not None and ends != store.ends:
            raise InputError(
                f"token store {folder} has documents from token {store.ends[0]} to {store.ends[1]}"
                f" (bos and eos), the given tokenizer {ends[0]} and {ends[1]}: take the tokenizer"
                " beside the store, or prepare the text again"
            )
        if verify:
            store._verify()
        return store

    def _verify(self) -> None:
        checked: list[tuple[str, tuple[str, ...]]]
        checked = [(self.meta.checksum, self.meta.checked_files)]
        if self.meta.bytes_checksum:
            checked.append((self.meta.bytes_checksum, ("bytes.bin",)))
        for checksum, names in checked:
            if checksum_of(self.folder, names) != checksum:
                raise InputError(
                    f"token store {self.folder}: {' or '.join(names)} does not match its checksum"
                    f" {checksum[:12]}: it was damaged, prepare the text again"
                )
        # All that is known of bytes.bin in stores of earlier versions.
        starts = range(0, self.num_documents, _SUM_ITEMS)
        total = sum(int(self.document_bytes[i : i + _SUM_ITEMS].sum()) for i in starts)
        if total != self.num_bytes:
            raise InputError(
                f"token store {self.folder}: bytes.bin adds up to {total} bytes of text, not to"
                f" the {self.num_bytes} of its meta.json: it was damaged, prepare the text again"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens, the bos and eos of every document included."""
        return self.meta.num_tokens

    @property
    def ends(self) -> tuple[int, int]:
        """Ids that every document begins and ends with."""
        if self.meta.bos_id is None or self.meta.eos_id is None:
            return int(self.tokens[0]), int(self.tokens[-1])
        return self.meta.bos_id, self.meta.eos_id

    @property
    def num_scored(self) -> int:
        """Tokens that are scored; reads all of scored.bin, where there is one."""
        if self.scored is None:
            return self.num_tokens - self.num_documents
        return int(np.count_nonzero(self.scored))

    @property
    def num_documents(self) -> int:
        return self.meta.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return self.meta.num_bytes

    def document_ids(self, index: int) -> np.ndarray:
        """Ids [n] of a document, its bos and eos included (a tokenizer decodes them to nothing)."""
        start, end = self.document_starts[index : index + 2]
        return np.asarray(self.tokens[start:end])

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop): [n] int32.

        Raises InputError for ids outside the vocabulary, which only a damaged file has.
        """
        ids = self.tokens[start:stop].astype(np.int32)
        if ids.max() >= self.meta.vocab_size:
            raise InputError(
                f"token store {self.folder} holds id {ids.max()} at token {start + ids.argmax()},"
                f" outside its vocabulary of {self.meta.vocab_size}: it was damaged, prepare the"
                " text again"
            )
        return ids

    def packed_row(self, seq_len: int) -> int | None:
        """The first row of `seq_len` inputs with several documents; None if each has one."""
        rows, offsets = np.divmod(self.document_starts, seq_len)
        packed = rows[(offsets > 0) & (self.document_starts < self.num_tokens - 1)]
        return int(packed[0]) if len(packed) else None

    def num_rows(self, seq_len: int, drop_last: bool) -> int:
        """Rows of `seq_len` inputs. drop_last: leave out a last row that padding would fill.

        Raises InputError for a length below 1, or one that leaves no row.
        """
        if seq_len < 1:
            raise InputError(f"seq_len {seq_len} must be at least 1")
        full, rest = divmod(self.num_tokens - 1, seq_len)
        rows = full if drop_last or rest == 0 else full + 1
        if rows == 0:
            raise InputError(
                f"seq_len {seq_len} is longer than token store {self.folder}, which has"
                f" {self.num_tokens} tokens: use at most {self.num_tokens - 1}, or more text"
            )
        return rows

    def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
        """Row `index`: tokens [index * L, index * L + L] as inputs and targets.

        Returns arrays of shape [L]:
            tokens: int32 inputs; 0 where padded.
            targets: int32, the token after each input; 0 where padded.
            segment_ids: int32, counts the documents in this row from 1; 0 where padded.
            positions: int32, from 0 at each document start and at the row start, so always < L.
            loss_mask: float32, 1 where the target is in the input's document and scored, else 0.

        Raises InputError for ids outside the vocabulary, which only a damaged file has.
        """
        if not 0 <= index < self.num_rows(seq_len, drop_last=False):
            raise IndexError(f"row {index} of token store {self.folder} with seq_len {seq_len}")
        start = index * seq_len
        length = min(seq_len, self.num_tokens - 1 - start)
        ids = self.ids(start, start + length + 1)
        # Boundaries in (start, start + length], as offsets into the row.
        low, high = np.searchsorted(self.document_starts, [start, start + length], side="right")
        starts = np.asarray(self.document_starts[low:high]) - start

        is_start = np.zeros(length + 1, bool)
        is_start[starts] = True
        segment_ids = 1 + np.cumsum(is_start[:length], dtype=np.int32)
        first = np.concatenate([[0], starts])[segment_ids - 1]
        scored = ~is_start[1:]
        if self.scored is not None:
            scored = scored & self.scored[start + 1 : start + length + 1]
        padding = (0, seq_len - length)
        return {
            "tokens": np.pad(ids[:-1], padding),
            "targets": np.pad(ids[1:], padding),
            "segment_ids": np.pad(segment_ids, padding),
            "positions": np.pad((np.arange(length) - first).astype(np.int32), padding),
            "loss_mask": np.pad(scored.astype(np.float32), padding),
        }


def _read_meta(folder: Path) -> StoreMeta:
    path = folder / META_FILE
    if not path.is_file():
        raise InputError(f"folder {folder} holds no token store (no {path.name}): run prepare")
    record = read_json(path, remedy="prepare the text again")
    if not isinstance(record, dict) or "format_version" not in record:
        raise InputError(f"{path} is not a token store's: prepare the text again")
    version = record["format_version"]
    if version != FORMAT_VERSION:
        raise InputError(
            f"token store {folder} has format version {version}, this program reads"
            f" {FORMAT_VERSION}: use the program that wrote it, or prepare the text again"
        )
    fields = {field.name: field for field in dataclasses.fields(StoreMeta)}
    unknown = [name for name in record if name not in fields]
    if unknown:
        raise InputError(
            f"{path} has fields that this program does not know ({', '.join(unknown)}): a newer"
            " one wrote it; use that, or prepare the text again"
        )
    lacking = [
        name
        for name, field in fields.items()
        if name not in record and field.default is dataclasses.MISSING
    ]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}: prepare the text again")
    return StoreMeta(**record)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize:
        raise InputError(
            f"{path} has {size} bytes where its meta.json needs {count * dtype.itemsize}: it was"
            " cut or mixed up, prepare the text again"
        )
    # A plain view: slicing the memmap class itself costs several times as much.
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))


def checksum_of(folder: Path, names: Sequence[str]) -> str:
    """sha256 (hex) over some files of a folder, one after the other."""
    digest = hashlib.sha256()
    for name in names:
        with open(folder / name, "rb") as file:
            while chunk := file.read(_HASH_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
