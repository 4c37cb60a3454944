"""Tokenizers: text to ids and back, and a fingerprint that ties token stores to the vocabulary."""

import abc
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from stem_jax.errors import InputError

KINDS = ("sentencepiece", "hf", "bytes")
META_FILE = "tokenizer_meta.json"
_REPLACEMENT = "\ufffd"
_HF_BOS = ("<|begin_of_text|>", "<s>", "<bos>")
_HF_EOS = ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>")

# The trainer loads its input whole; 20 MB are plenty for a vocabulary.
TRAINING_BYTES = 20_000_000
# The trainer silently drops sentences over 4192 bytes; a character has at most 4.
_TRAINING_PIECE_CHARS = 1000


@dataclasses.dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """Text to ids and back.

    vocab_size: ids lie in [0, vocab_size).
    bos_id, eos_id: ids that begin and end a document; `encode` never adds them.
    fingerprint: sha256 (hex) of the model's bytes; token stores and checkpoints record it.
    source: the model's bytes, written by `save`.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    source: bytes = dataclasses.field(repr=False, compare=False)
    processor: Any = dataclasses.field(repr=False, compare=False)

    @property
    @abc.abstractmethod
    def file_name(self) -> str | None:
        """Name of the model file inside a tokenizer folder; None if the kind needs no file."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos.

        Raises InputError for text with a lone surrogate, which has no UTF-8 form.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in order; parallel where the library can."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def _decode_known(self, ids: list[int]) -> str:
        """Text of ids that are all inside the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. bos and eos give no text.

        Incomplete UTF-8 and ids outside the vocabulary (a model's may be padded to a larger one)
        give U+FFFD.
        """
        parts: list[str] = []
        known: list[int] = []
        for token in map(int, ids):
            if 0 <= token < self.vocab_size:
                known.append(token)
                continue
            parts += [self._decode_known(known), _REPLACEMENT]
            known = []
        return "".join([*parts, self._decode_known(known)])

    def save(self, folder: str | Path) -> None:
        """Writes the model file and `tokenizer_meta.json` into the folder (created if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file_name is not None:
            (folder / self.file_name).write_bytes(self.source)
        meta = {
            "kind": self.kind,
            "file": self.file_name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    For models of `train_sentencepiece`, decode(encode(text)) == text for every text without
    U+2581 (SentencePiece's mark for a space, which decodes to one).
    """

    file_name = "tokenizer.model"

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(_checked(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode([_checked(text) for text in texts])

    def _decode_known(self, ids: list[int]) -> str:
        return self.processor.decode(ids) if ids else ""


class HfTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library. Special tokens in a text are plain text."""

    file_name = "tokenizer.json"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library forgets it on its way to another process.
        self.processor.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [_checked(text) for text in texts]
        encodings = self.processor.encode_batch(checked, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode_known(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, bos 256, eos 257: no model file, any text round-trips."""

    file_name = None

    def encode(self, text: str) -> list[int]:
        return list(_checked(text).encode())

    def _decode_known(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def load_tokenizer(kind: str, path: str | Path | None = None) -> Tokenizer:
    """Loads a tokenizer.

    kind: "sentencepiece" (path: a .model file), "hf" (path: a tokenizer.json) or "bytes" (no path).
    Raises InputError for an unknown kind, a missing or unreadable file, a model without bos or eos,
    or a missing `tokenizers` package.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if kind == "bytes":
        source = b"bytes: 256 values, bos 256, eos 257"
        return BytesTokenizer(kind, 258, 256, 257, _sha256(source), source, None)
    if path is None:
        raise InputError(f"tokenizer kind {kind!r} needs a model file: give its path")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"tokenizer file {path} cannot be read ({error.strerror}): check the path"
        ) from error
    return _load_sentencepiece(source, path) if kind == "sentencepiece" else _load_hf(source, path)


def load_tokenizer_folder(folder: str | Path) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote.

    Raises InputError if the folder holds none, or a model that its meta data does not describe.
    """
    meta_path = Path(folder) / META_FILE
    try:
        meta = json.loads(meta_path.read_text())
        kind, file, fingerprint = meta["kind"], meta["file"], meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"tokenizer folder {folder} has no readable {META_FILE}: give a folder that `prepare`"
            " or a training run wrote"
        ) from error
    tokenizer = load_tokenizer(kind, None if file is None else Path(folder) / file)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"tokenizer {Path(folder) / str(file)} has fingerprint {tokenizer.fingerprint[:12]},"
            f" but {META_FILE} records {str(fingerprint)[:12]}: restore the original file"
        )
    return tokenizer


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains a byte-fallback BPE model and writes it to `path`; equal texts give equal bytes.

    texts: any amount; lines are sampled evenly down to 20 MB.
    vocab_size: pieces, the 256 byte pieces and unk (0), bos (1), eos (2) included.
    Raises InputError if the text is empty, or too small or too varied for the vocabulary; the
    message names one that works.
    """
    model = io.BytesIO()
    pieces = _sample_pieces(texts)
    if not pieces:
        raise InputError("tokenizer training got no text: give documents that are not empty")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            # The next four make ids equal to those of transformers' LlamaTokenizer, and text exact.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # stored in the model, so part of its fingerprint
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_training_remedy(str(error), vocab_size)) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())


def _sample_pieces(texts: Iterable[str]) -> list[str]:
    """Lines of at most 1000 characters, thinned evenly whenever they exceed TRAINING_BYTES."""
    pieces: list[str] = []
    size, stride, index = 0, 1, 0
    for text in texts:
        # The trainer skips sentences with a tab; a newline would never be part of a piece anyway.
        for line in re.split(r"[\n\t]", text):
            for start in range(0, len(line), _TRAINING_PIECE_CHARS):
                index += 1
                if index % stride:
                    continue
                pieces.append(_checked(line[start : start + _TRAINING_PIECE_CHARS]))
                size += len(pieces[-1].encode())
                while size > TRAINING_BYTES and len(pieces) > 1:
                    pieces = pieces[1::2]
                    size = sum(len(piece.encode()) for piece in pieces)
                    stride *= 2
    return pieces


def _training_remedy(message: str, vocab_size: int) -> str:
    too_high = re.search(r"Please set it to a value <= (\d+)", message)
    if too_high:
        return (
            f"vocab_size {vocab_size} is too large for this text: use at most {too_high[1]}, or"
            " give more text"
        )
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_low:
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text: use at least"
            f" {too_low[1]}"
        )
    reason = " ".join(message.split())
    return f"tokenizer training with vocab_size {vocab_size} failed: {reason}; use other text"


def _load_sentencepiece(source: bytes, path: str | Path) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.load_from_serialized_proto(source)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise InputError(f"tokenizer file {path} is not a SentencePiece model: give a .model file")
    bos, eos = processor.bos_id(), processor.eos_id()
    if bos < 0 or eos < 0:
        raise InputError(
            f"tokenizer file {path} has bos id {bos} and eos id {eos}: train the model with both"
        )
    size = processor.get_piece_size()
    return SentencePieceTokenizer(
        "sentencepiece", size, bos, eos, _sha256(source), source, processor
    )


def _load_hf(source: bytes, path: str | Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "tokenizer kind 'hf' needs the tokenizers package: pip install tokenizers"
        ) from error
    try:
        processor = tokenizers.Tokenizer.from_buffer(source)
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"tokenizer file {path} is not a tokenizer.json: {error}") from error
    processor.no_padding()
    processor.no_truncation()
    processor.encode_special_tokens = True
    vocabulary = processor.get_vocab(with_added_tokens=True)
    eos = next((vocabulary[token] for token in _HF_EOS if token in vocabulary), None)
    bos = next((vocabulary[token] for token in _HF_BOS if token in vocabulary), eos)
    if eos is None:
        raise InputError(
            f"tokenizer file {path} has no end-of-text token: it needs one of {', '.join(_HF_EOS)}"
        )
    size = max(vocabulary.values()) + 1
    return HfTokenizer("hf", size, bos, eos, _sha256(source), source, processor)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}:"
            " replace it before tokenizing"
        ) from error
    return text


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()
