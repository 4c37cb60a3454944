"""Loading of tokenizers, with a fingerprint that ties token stores to the vocabulary."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import sentencepiece

from stem_jax.data.shipped_files import ShippedFiles
from stem_jax.data.special_tokens import (
    SpecialFlags,
    Vocabulary,
    find_special_tokens,
)
from stem_jax.data.tokenizer_kinds import (
    META_FILE,
    BytesTokenizer,
    HfTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    hf_processor,
    marked_special,
)
from stem_jax.errors import InputError
from stem_jax.files import read_json

__all__ = [
    "KINDS",
    "META_FILE",
    "BytesTokenizer",
    "HfTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "load_tokenizer_folder",
]
KINDS = ("sentencepiece", "hf", "bytes")
_BYTES_SOURCE = b"bytes: 256 values, bos 256, eos 257"
_NO_FLAGS = SpecialFlags()
# Lines of a token in base64 and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_CONVERT = (
    'python -c "from transformers.convert_slow_tokenizer import TikTokenConverter as C; '
    "C('{}', extra_special_tokens=['<|begin_of_text|>', '<|end_of_text|>']).converted()"
    ".save('tokenizer.json')\""
)


def load_tokenizer(
    kind: str,
    path: str | Path | None = None,
    flags: SpecialFlags = _NO_FLAGS,
    *,
    as_shipped: bool = False,
) -> Tokenizer:
    """Loads a tokenizer, and what the files beside it say of its special tokens.

    kind: "sentencepiece" (path: a .model file), "hf" (path: a tokenizer.json) or "bytes" (no path).
    flags: name special tokens, and come before all files.
    as_shipped: prompts begin as the files say, not as documents do.
    Raises InputError for an unknown kind, a missing or unreadable file, special tokens that nothing
    names (see `find_special_tokens`), or a missing `tokenizers` package.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if kind == "bytes":
        return _bytes_tokenizer(flags, ShippedFiles(Path()))
    if path is None:
        raise InputError(f"tokenizer kind {kind!r} needs a model file: give its path")
    path = Path(path)
    source = _read(path)
    shipped = ShippedFiles.beside(path.parent, _meta_of(path, _sha256(source)))
    tokenizer = _load(kind, source, path, flags, shipped)
    if not as_shipped:
        return tokenizer.for_documents()
    if shipped.meta is not None and flags == _NO_FLAGS:
        return tokenizer
    prompt = _shipped_prompt(tokenizer, shipped)
    special = dataclasses.replace(tokenizer.special, prompt_ids=prompt)
    return dataclasses.replace(tokenizer, special=special)


def load_tokenizer_folder(folder: str | Path) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote, special tokens and all.

    Raises InputError if the folder holds none, or a model that its meta data does not describe.
    """
    meta_path = Path(folder) / META_FILE
    remedy = "give a folder that `prepare` or a training run wrote"
    unreadable = InputError(f"tokenizer folder {folder} has no readable {META_FILE}: {remedy}")
    if not meta_path.is_file():
        raise unreadable
    meta = read_json(meta_path, remedy=remedy)
    try:
        kind, file, fingerprint = meta["kind"], meta["file"], meta["fingerprint"]
        path = None if file is None else Path(folder) / file
    except (KeyError, TypeError) as error:
        raise unreadable from error
    if kind not in KINDS or (path is None) != (kind == "bytes"):
        raise unreadable
    shipped = ShippedFiles(Path(folder), meta=meta)
    source = _BYTES_SOURCE if path is None else _read(path)
    if _sha256(source) != fingerprint:
        raise InputError(
            f"tokenizer {Path(folder) / str(file)} has fingerprint {_sha256(source)[:12]},"
            f" but {META_FILE} records {str(fingerprint)[:12]}: restore the original file"
        )
    if path is None:
        return _bytes_tokenizer(_NO_FLAGS, shipped)
    return _load(kind, source, path, _NO_FLAGS, shipped)


def _bytes_tokenizer(flags: SpecialFlags, shipped: ShippedFiles) -> Tokenizer:
    # What an earlier version took from flags is in the record, and is read.
    given = [("--bos", flags.bos), ("--eos", flags.eos), *(("--stop", n) for n in flags.stop)]
    for flag, value in given:
        if value is not None and value.isascii() and value.isdigit() and int(value) < 256:
            raise InputError(
                f"{flag}={value} is a byte of text to the bytes tokenizer, {bytes([int(value)])!r}:"
                " wherever it stands a document would end; give 256 or 257, or leave the flag out"
            )
    vocabulary = Vocabulary("the bytes tokenizer", lambda _: None, 258, {}, 256, 257)
    special, notes = find_special_tokens(vocabulary, flags, shipped)
    values = 258, special, _sha256(_BYTES_SOURCE), _BYTES_SOURCE, None
    return BytesTokenizer("bytes", *values, **_carried(shipped, notes))


def _load(
    kind: str, source: bytes, path: Path, flags: SpecialFlags, shipped: ShippedFiles
) -> Tokenizer:
    if kind == "sentencepiece":
        processor, vocabulary = _sentencepiece(source, path)
    else:
        processor, vocabulary = _hf(source, path)
    special, notes = find_special_tokens(vocabulary, flags, shipped)
    values = kind, vocabulary.size, special, _sha256(source), source
    if kind == "sentencepiece":
        return SentencePieceTokenizer(*values, processor, **_carried(shipped, notes))
    # Earlier versions left tokens as the file marks them, and trained on what that gave.
    marked = special if shipped.meta is None or "stop_ids" in shipped.meta else None
    return HfTokenizer(*values, hf_processor(source, marked), **_carried(shipped, notes))


def _carried(shipped: ShippedFiles, notes: list[str]) -> dict[str, Any]:
    return {
        "chat_template": shipped.chat_template(),
        "generation_config": shipped.generation_config(),
        "notes": tuple(notes),
    }


def _sentencepiece(source: bytes, path: Path) -> tuple[Any, Vocabulary]:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.load_from_serialized_proto(source)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise InputError(f"tokenizer file {path} is {_instead('sentencepiece', source, path)}")

    def find(text: str) -> int | None:
        number = processor.piece_to_id(text)
        return number if processor.id_to_piece(number) == text else None

    own = (None if number < 0 else number for number in (processor.bos_id(), processor.eos_id()))
    size = processor.get_piece_size()
    return processor, Vocabulary(f"tokenizer file {path}", find, size, {}, *own)


def _hf(source: bytes, path: Path) -> tuple[Any, Vocabulary]:
    try:
        processor = hf_processor(source)
    except ImportError as error:
        raise InputError(
            "tokenizer kind 'hf' needs the tokenizers package: pip install tokenizers"
        ) from error
    except Exception as error:  # the library raises a bare Exception
        what = _instead("hf", source, path)
        raise InputError(f"tokenizer file {path} is {what} ({error})") from error
    size = max(processor.get_vocab(with_added_tokens=True).values()) + 1
    marked = marked_special(processor)
    return processor, Vocabulary(f"tokenizer file {path}", processor.token_to_id, size, marked)


def _instead(kind: str, source: bytes, path: Path) -> str:
    """What a file is that is no model of a kind, and what to do with it."""
    wanted = {"hf": "a tokenizer.json", "sentencepiece": "a SentencePiece model"}[kind]
    if _TIKTOKEN.match(source):
        return (
            f"of tiktoken, as that of Llama 3, not {wanted}: "
            "pip install transformers tiktoken blobfile, make a tokenizer.json of it by "
            f"{_CONVERT.format(path)} with all special tokens in the order of their ids, and give "
            "that with --tokenizer=hf (and --bos and --eos)"
        )
    if kind == "hf" and _is_sentencepiece(source):
        return f"not {wanted} but a SentencePiece model: give it with --tokenizer=sentencepiece"
    if kind == "sentencepiece" and _is_tokenizer_json(source):
        return f"not {wanted} but a tokenizer.json: give it with --tokenizer=hf"
    file = {"hf": "the tokenizer.json of a model", "sentencepiece": "a .model file"}[kind]
    return f"not {wanted}: give {file}"


def _is_sentencepiece(source: bytes) -> bool:
    try:
        return bool(sentencepiece.SentencePieceProcessor().load_from_serialized_proto(source))
    except RuntimeError:
        return False


def _is_tokenizer_json(source: bytes) -> bool:
    try:
        record = json.loads(source)
    except ValueError:
        return False
    return isinstance(record, dict) and "model" in record


def _shipped_prompt(tokenizer: Tokenizer, shipped: ShippedFiles) -> tuple[int, ...]:
    """What texts begin with by the files: add_bos_token, else what a tokenizer.json puts first."""
    bos = () if tokenizer.special.bos_id is None else (tokenizer.special.bos_id,)
    adds = shipped.adds_bos()
    if adds is None and isinstance(tokenizer, HfTokenizer):
        plain = tokenizer.processor.encode("a", add_special_tokens=False).ids
        whole = tokenizer.processor.encode("a", add_special_tokens=True).ids
        starts = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])
    # Llama's tokenizer class adds bos where nobody says otherwise.
    return () if adds is False else bos


def _meta_of(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record beside a model file, if it describes this model."""
    beside = path.parent / META_FILE
    if not beside.is_file():
        return None
    meta = read_json(beside)
    same = isinstance(meta, dict) and meta.get("fingerprint") == fingerprint
    return meta if same else None


def _read(path: Path) -> bytes:
    if path.is_dir():
        inside = [*path.glob("tokenizer.json"), *sorted(path.glob("*.model"))]
        which = f", such as {inside[0]}" if inside else "; there is no tokenizer in it"
        raise InputError(f"tokenizer file {path} is a folder: give a file{which}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"tokenizer file {path} cannot be read ({error.strerror}): check the path"
        ) from error


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()
