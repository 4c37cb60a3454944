"""Tokenizes a piece of the input, in this process or in a worker that is fed over pipes."""

import dataclasses
import os
import pickle
import struct
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from stem_jax.data.chat_template import Chat
from stem_jax.data.conversations import encode_conversation, texts_of
from stem_jax.data.coverage import UNSEEN, Coverage, coverage_of
from stem_jax.data.documents import Document
from stem_jax.data.encoded_piece import EncodedPiece
from stem_jax.data.splitter import fraction_of
from stem_jax.data.token_store_writer import check_ids, token_dtype
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import BadRecord, InputError

# A piece is what is done again, at most, by each worker after a kill. Large enough that its file
# and its journey cost nothing, small enough that many fit into memory.
PIECE_CHARS = 2_000_000
_PIECE_DOCUMENTS = 8192
# Of a piece: to see what the tokens of a text stand for costs up to as much as to tokenize it.
_SAMPLED_BYTES = 100_000
_LENGTH = struct.Struct("<Q")


def cut_pieces(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cuts the documents that have text into pieces: a function of the documents alone."""
    piece: list[Document] = []
    chars = 0
    for document in documents:
        if not document.text:
            continue
        piece.append(document)
        chars += len(document.text)
        if len(piece) == _PIECE_DOCUMENTS or chars >= PIECE_CHARS:
            yield piece
            piece, chars = [], 0
    if piece:
        yield piece


@dataclasses.dataclass(frozen=True)
class PieceEncoder:
    """What a worker needs to know. seed: of the split. chat: for documents that are conversations;
    None: they are texts."""

    tokenizer: Tokenizer
    seed: int
    chat: Chat | None = None

    def encode(self, piece: list[Document]) -> EncodedPiece:
        """The ids of the documents, on one thread.

        Raises InputError for ids outside the vocabulary, or a text that cannot be tokenized.
        """
        tokenizer = self.tokenizer
        dtype = token_dtype(tokenizer.vocab_size)
        tokens: list[np.ndarray] = [np.empty(0, dtype)]
        scored: list[np.ndarray] = [np.empty(0, bool)]
        lengths, num_bytes, fractions, bad = [], [], [], []
        coverage = UNSEEN
        for document in piece:
            try:
                ids, scored_T, size = self._encode_one(document)
            except BadRecord as error:
                bad.append((document.origin, f"{document.origin}: {error}"))
                continue
            check_ids(ids, tokenizer.vocab_size, document.origin)
            if coverage.text < _SAMPLED_BYTES:
                coverage += self._coverage_of(document, ids)
            tokens.append(ids.astype(dtype))
            scored.append(scored_T)
            lengths.append(len(ids))
            num_bytes.append(size)
            fractions.append(fraction_of(self.seed, document.text.encode()))
        return EncodedPiece(
            np.concatenate(tokens),
            np.array(lengths, np.int64),
            np.array(num_bytes, np.int64),
            np.array(fractions, np.float64),
            tuple(bad),
            coverage,
            None if self.chat is None else np.concatenate(scored),
        )

    def _encode_one(self, document: Document) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids, which of them are scored (none said of a text), bytes of what is."""
        tokenizer, text = self.tokenizer, document.text
        if self.chat is None:
            ids = [tokenizer.bos_id, *tokenizer.encode_document(text), tokenizer.eos_id]
            return np.asarray(ids, np.int64), np.empty(0, bool), len(text.encode())
        try:
            made = encode_conversation(self.chat, text)
        except BadRecord:
            raise
        except InputError as error:
            raise InputError(f"{document.origin}: {error}") from error
        return made.ids, made.scored, made.num_bytes

    def _coverage_of(self, document: Document, ids: np.ndarray) -> Coverage:
        if self.chat is None:
            return coverage_of(self.tokenizer, document.text, ids[1:-1].tolist())
        found = UNSEEN
        for text in texts_of(document.text):
            found += coverage_of(self.tokenizer, text, self.tokenizer.encode(text))
        return found


def send(file: IO[bytes], message: Any) -> None:
    """Writes a message that `receive` reads."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    file.write(_LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """The next message; raises EOFError where the other side has gone."""
    header = file.read(_LENGTH.size)
    length = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else 0
    content = file.read(length)
    if not content or len(content) < length:
        raise EOFError
    return pickle.loads(content)


def work() -> None:
    """A worker: reads a PieceEncoder and then pieces, writes for each how it went and what came.

    It ends with its parent, whatever ends that: then there is nothing more to read.
    """
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints is no message.
    os.dup2(2, 1)
    try:
        encoder = receive(source)
        while True:
            index, piece = receive(source)
            send(out, (index, *_outcome(encoder, piece)))
    except (EOFError, BrokenPipeError):
        # Nothing is lost: what is not received is tokenized again.
        os._exit(0)


def _outcome(encoder: PieceEncoder, piece: list[Document]) -> tuple[str, Any]:
    try:
        return "done", encoder.encode(piece).to_bytes()
    except InputError as error:
        return "refused", str(error)
    # The parent tells whatever it is, or a worker would end without a word.
    except Exception:
        return "failed", traceback.format_exc()
