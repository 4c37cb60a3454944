"""The token store: flat token ids on disk, memory-mapped, with document boundaries.

A store is a folder:

    tokens.bin     ids of all documents in turn, each as bos, text, eos; little-endian uint16 if
                   the vocabulary has at most 65536 ids, else uint32
    documents.bin  uint64 start offsets into tokens.bin, one more than documents; the last = total
    bytes.bin      uint64 UTF-8 bytes of each document's text
    meta.json      the fields of StoreMeta

Rows of any length are cut at load time. With L = 4 and two documents (B = bos, E = eos)

    tokens.bin   B  a  b  E  B  c  d  e  E
    row 0        B  a  b  E | targets a  b  E  B   mask 1 1 1 0   segments 1 1 1 1
    row 1        B  c  d  e | targets c  d  e  E   mask 1 1 1 1   segments 1 1 1 1

every (input, target) pair inside a document is scored in exactly one row.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from stem_jax.errors import InputError

FORMAT_VERSION = 1
_MAX_UINT16_VOCAB = 65536
_HASH_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What meta.json records. `checksum` is the sha256 (hex) over tokens.bin and documents.bin."""

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


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A store opened for reading; `open` builds it.

    tokens: memory map [num_tokens] uint16 or uint32.
    document_starts: memory map [num_documents + 1] int64, offsets into tokens.
    document_bytes: memory map [num_documents] int64, UTF-8 bytes of the text.
    """

    folder: Path
    meta: StoreMeta
    tokens: np.ndarray = dataclasses.field(repr=False, compare=False)
    document_starts: np.ndarray = dataclasses.field(repr=False, compare=False)
    document_bytes: np.ndarray = dataclasses.field(repr=False, compare=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        fingerprint: str | None = None,
        vocab_size: int | None = None,
        verify: bool = False,
    ) -> Self:
        """Opens a store without reading its tokens.

        fingerprint: of the tokenizer in use; must be the store's.
        vocab_size: of the model; the store's may be smaller (a padded model), not larger.
        verify: recompute the checksum, which reads the whole store.
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
        )
        if verify and _checksum(folder) != meta.checksum:
            raise InputError(
                f"token store {folder} does not match its checksum {meta.checksum[:12]}: it was"
                " damaged, prepare the text again"
            )
        return store

    @property
    def num_tokens(self) -> int:
        """Tokens, the bos and eos of every document included."""
        return self.meta.num_tokens

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
            loss_mask: float32, 1 where the target is in the input's document, else 0.

        Raises InputError for ids outside the vocabulary, which only a damaged file has.
        """
        if not 0 <= index < self.num_rows(seq_len, drop_last=False):
            raise IndexError(f"row {index} of token store {self.folder} with seq_len {seq_len}")
        start = index * seq_len
        length = min(seq_len, self.num_tokens - 1 - start)
        ids = self.tokens[start : start + length + 1].astype(np.int32)
        if ids.max() >= self.meta.vocab_size:
            raise InputError(
                f"token store {self.folder} holds id {ids.max()} at token {start + ids.argmax()},"
                f" outside its vocabulary of {self.meta.vocab_size}: it was damaged, prepare the"
                " text again"
            )
        # Boundaries in (start, start + length], as offsets into the row.
        low, high = np.searchsorted(self.document_starts, [start, start + length], side="right")
        starts = np.asarray(self.document_starts[low:high]) - start

        is_start = np.zeros(length + 1, bool)
        is_start[starts] = True
        segment_ids = 1 + np.cumsum(is_start[:length], dtype=np.int32)
        first = np.concatenate([[0], starts])[segment_ids - 1]
        padding = (0, seq_len - length)
        return {
            "tokens": np.pad(ids[:-1], padding),
            "targets": np.pad(ids[1:], padding),
            "segment_ids": np.pad(segment_ids, padding),
            "positions": np.pad((np.arange(length) - first).astype(np.int32), padding),
            "loss_mask": np.pad((~is_start[1:]).astype(np.float32), padding),
        }


class TokenStoreWriter:
    """Writes a store document by document; the folder appears, whole, when the writer closes.

    Use it as a context manager: leaving it by an exception removes everything it wrote. A store
    that is already in the folder is replaced, anything else there is refused.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        fingerprint: str,
        bos_id: int,
        eos_id: int,
        name: str,
        split: str,
    ):
        self._folder = Path(folder)
        if self._folder.exists() and not (self._folder / "meta.json").is_file():
            raise InputError(
                f"folder {self._folder} exists and is no token store: remove it or write elsewhere"
            )
        self._temp = self._folder.with_name(f".{self._folder.name}.tmp-{os.getpid()}")
        shutil.rmtree(self._temp, ignore_errors=True)
        try:
            self._temp.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"folder {self._folder} cannot be written ({error.strerror}): choose another one"
            ) from error
        self._dtype = np.dtype("<u2" if vocab_size <= _MAX_UINT16_VOCAB else "<u4")
        self._bos_id, self._eos_id = bos_id, eos_id
        self._meta = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "split": split,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "vocab_size": vocab_size,
            "fingerprint": fingerprint,
        }
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._files = ExitStack()
        self._tokens = self._files.enter_context(_create(self._temp / "tokens.bin"))
        self._documents = self._files.enter_context(_create(self._temp / "documents.bin"))
        self._bytes = self._files.enter_context(_create(self._temp / "bytes.bin"))
        self._documents.write(np.uint64(0).astype("<u8").tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, ids: Sequence[int], num_bytes: int) -> None:
        """Appends a document.

        ids: of its text, without bos and eos. num_bytes: UTF-8 bytes of its text.
        Raises InputError for an id outside the vocabulary.
        """
        ids = np.concatenate([[self._bos_id], np.asarray(ids, np.int64), [self._eos_id]])
        vocab_size = self._meta["vocab_size"]
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise InputError(
                f"token id {wrong} in document {self.num_documents} is outside the vocabulary of"
                f" {vocab_size} ids: prepare with the tokenizer that the ids come from"
            )
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self._documents.write(np.array(self.num_tokens, "<u8").tobytes())
        self._bytes.write(np.array(num_bytes, "<u8").tobytes())

    def close(self) -> None:
        """Makes the store appear in its folder. Raises InputError if it has no documents."""
        if self.num_documents == 0:
            self.abort()
            raise InputError(f"token store {self._folder} would be empty: give text to prepare")
        self._files.close()
        meta = StoreMeta(
            **self._meta,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            checksum=_checksum(self._temp),
        )
        text = json.dumps(dataclasses.asdict(meta), indent=2) + "\n"
        (self._temp / "meta.json").write_text(text)
        if self._folder.exists():
            # Two renames: a folder cannot be renamed over one that has files in it.
            old = self._temp.with_name(self._temp.name + "-old")
            os.rename(self._folder, old)
            os.rename(self._temp, self._folder)
            shutil.rmtree(old)
        else:
            os.rename(self._temp, self._folder)

    def abort(self) -> None:
        """Removes everything written so far."""
        self._files.close()
        shutil.rmtree(self._temp, ignore_errors=True)


def _create(path: Path) -> io.BufferedWriter:
    return io.BufferedWriter(io.FileIO(path, "wb"))


def _read_meta(folder: Path) -> StoreMeta:
    path = folder / "meta.json"
    try:
        record: Any = json.loads(path.read_text())
        version = record["format_version"]
    except OSError as error:
        raise InputError(
            f"folder {folder} holds no token store ({path.name} cannot be read): run prepare"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a token store's: prepare the text again") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"token store {folder} has format version {version}, this program reads"
            f" {FORMAT_VERSION}: use the program that wrote it, or prepare the text again"
        )
    try:
        return StoreMeta(**record)
    except TypeError as error:
        raise InputError(f"{path} lacks fields or has unknown ones: prepare again") from error


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize:
        raise InputError(
            f"{path} has {size} bytes where its meta.json needs {count * dtype.itemsize}: it was"
            " cut or mixed up, prepare the text again"
        )
    # A plain view: slicing the memmap class itself costs several times as much.
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokens.bin", "documents.bin"):
        with open(folder / name, "rb") as file:
            while chunk := file.read(_HASH_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
