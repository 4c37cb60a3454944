"""Writes a token store (`token_store`), document by document or many at once."""

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from stem_jax.data.coverage import UNSEEN, Coverage
from stem_jax.data.token_store import (
    FORMAT_VERSION,
    META_FILE,
    SCORED_FILE,
    StoreMeta,
    checksum_of,
)
from stem_jax.errors import InputError
from stem_jax.files import write_whole

_MAX_UINT16_VOCAB = 65536
_TOKENS, _DOCUMENTS, _BYTES = "tokens.bin", "documents.bin", "bytes.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two types of token files that holds a vocabulary."""
    return np.dtype("<u2" if vocab_size <= _MAX_UINT16_VOCAB else "<u4")


@dataclasses.dataclass(frozen=True)
class StoreSize:
    """How much of a store is written. bytes: UTF-8 bytes of the texts."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class TokenStoreWriter:
    """Writes a store into a folder of its own; it is one when `close` has written meta.json.

    Use it as a context manager: leaving it by an exception closes the files without that. What
    shall appear whole is written beside its place and renamed by the caller.
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
        written: StoreSize = StoreSize(),
        has_scored: bool = False,
    ):
        """written: of an unfinished store in the folder, what is kept. has_scored: it says of each
        token whether it is scored.

        Raises InputError if the folder holds a store, cannot be made, or holds less than that.
        """
        self._folder = Path(folder)
        self._vocab_size, self._bos_id, self._eos_id = vocab_size, bos_id, eos_id
        self.dtype = token_dtype(vocab_size)
        if (self._folder / META_FILE).exists():
            raise InputError(f"folder {self._folder} holds a token store: write elsewhere")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"folder {self._folder} cannot be written ({error.strerror}): choose another one"
            ) from error
        self._meta: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "split": split,
            "dtype": self.dtype.name,
            "vocab_size": vocab_size,
            "fingerprint": fingerprint,
            "bos_id": bos_id,
            "eos_id": eos_id,
            "has_scored": has_scored,
        }
        self._size = written
        self._stack = ExitStack()
        with ExitStack() as stack:
            sizes = {
                _TOKENS: written.tokens * self.dtype.itemsize,
                _DOCUMENTS: 8 * (written.documents + 1),
                _BYTES: 8 * written.documents,
            }
            if has_scored:
                sizes[SCORED_FILE] = written.tokens
            self._files = {
                file: stack.enter_context(_open(self._folder / file, size))
                for file, size in sizes.items()
            }
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def size(self) -> StoreSize:
        """What was written so far, buffers included."""
        return self._size

    @property
    def num_documents(self) -> int:
        return self._size.documents

    def add(self, ids: Sequence[int], num_bytes: int) -> None:
        """Appends a document.

        ids: of its text, without bos and eos. num_bytes: UTF-8 bytes of its text.
        Raises InputError for an id outside the vocabulary.
        """
        whole_T = np.concatenate([[self._bos_id], np.asarray(ids, np.int64), [self._eos_id]])
        check_ids(whole_T, self._vocab_size, f"document {self.num_documents}")
        self.extend(whole_T.astype(self.dtype), np.array([len(whole_T)]), np.array([num_bytes]))

    def extend(
        self,
        tokens_T: np.ndarray,
        lengths_n: np.ndarray,
        bytes_n: np.ndarray,
        scored_T: np.ndarray | None = None,
    ) -> None:
        """Appends documents.

        tokens_T: their ids, checked, of `dtype`, with bos and eos. lengths_n: tokens of each.
        bytes_n: UTF-8 bytes of each text. scored_T: bool, which tokens are scored, for a store that
        says so.
        """
        assert (scored_T is not None) == self._meta["has_scored"]
        size = self._size
        starts_n = size.tokens + np.cumsum(lengths_n)
        self._files[_TOKENS].write(tokens_T.tobytes())
        self._files[_DOCUMENTS].write(starts_n.astype("<u8").tobytes())
        self._files[_BYTES].write(bytes_n.astype("<u8").tobytes())
        if scored_T is not None:
            self._files[SCORED_FILE].write(scored_T.astype(bool).tobytes())
        self._size = StoreSize(
            size.documents + len(lengths_n),
            size.tokens + len(tokens_T),
            size.bytes + int(bytes_n.sum()),
        )

    def sync(self) -> None:
        """What was written is on the disk when it returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self, coverage: Coverage = UNSEEN) -> None:
        """Completes the store. Raises InputError if it has no documents.

        coverage: of a sample of the text that it was made of, whatever the split.
        """
        if self.num_documents == 0:
            self.abort()
            raise InputError(f"token store {self._folder} would be empty: give text to prepare")
        self.sync()
        self._stack.close()
        meta = StoreMeta(
            **self._meta,
            **coverage.record(),
            num_tokens=self._size.tokens,
            num_documents=self._size.documents,
            num_bytes=self._size.bytes,
            checksum="",
            bytes_checksum=checksum_of(self._folder, (_BYTES,)),
        )
        meta = dataclasses.replace(meta, checksum=checksum_of(self._folder, meta.checked_files))
        # Where all is there, the file is one that earlier versions read.
        said = dataclasses.asdict(meta)
        for key in ("left_out", "changed", "left_out_example", "has_scored"):
            if not said[key]:
                del said[key]
        text = json.dumps(said, indent=2) + "\n"
        write_whole(self._folder / META_FILE, text)

    def abort(self) -> None:
        """Closes the files; the folder holds no store."""
        self._stack.close()


def check_ids(ids_T: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises InputError for an id outside the vocabulary. where: it stands, for the message."""
    if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= vocab_size):
        wrong = ids_T[(ids_T < 0) | (ids_T >= vocab_size)][0]
        raise InputError(
            f"token id {wrong} in {where} is outside the vocabulary of {vocab_size} ids: prepare"
            " with the tokenizer that the ids come from"
        )


def _open(path: Path, size: int) -> io.BufferedWriter:
    """A file cut to a size, for appending. documents.bin begins with a zero."""
    there = path.stat().st_size if path.exists() else 0
    zero = path.name == _DOCUMENTS and size == 8
    if there < size and not zero:
        raise InputError(f"{path} has {there} bytes, not the {size} that were written: begin anew")
    file = path.open("ab")
    file.truncate(0 if zero else size)
    if zero:
        file.write(bytes(8))
    return file
