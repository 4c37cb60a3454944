"""Kinds of tokenizers: text to ids and back."""

import abc
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from stem_jax.data.shipped_files import ChatTemplate
from stem_jax.data.special_tokens import SpecialTokens
from stem_jax.data.spelling import (
    REPLACEMENT,
    Spelling,
    byte_spelling,
    hf_spelling,
    sentencepiece_spelling,
)
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import write_whole

META_FILE = "tokenizer_meta.json"
_UNKNOWN_NAMES = ("<unk>", "[UNK]", "<|unk|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """Text to ids and back.

    vocab_size: ids lie in [0, vocab_size).
    special: ids that begin and end documents, prompts and completions; `encode` never adds them.
    fingerprint: sha256 (hex) of the model's bytes; token stores and checkpoints record it.
    source: the model's bytes, written by `save`.
    chat_template, generation_config: what the tokenizer came with, carried along.
    notes: how the special tokens were found, to be said where the tokenizer is chosen.
    """

    kind: str
    vocab_size: int
    special: SpecialTokens
    fingerprint: str
    source: bytes = dataclasses.field(repr=False, compare=False)
    processor: Any = dataclasses.field(repr=False, compare=False)
    chat_template: ChatTemplate | None = dataclasses.field(default=None, repr=False, hash=False)
    generation_config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, repr=False, hash=False
    )
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # What was made of the processor since is made anew where it comes to.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    @abc.abstractmethod
    def file_name(self) -> str | None:
        """Name of the model file inside a tokenizer folder; None if the kind needs no file."""

    @property
    def bos_id(self) -> int:
        """Begins every document: bos, or eos where there is none."""
        return self.special.first_id

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self.special.eos_id

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. The text of a special token is text like any other.

        Raises InputError for text with a lone surrogate, which has no UTF-8 form.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in order; parallel where the library can."""
        return [self.encode(text) for text in texts]

    def encode_document(self, text: str) -> list[int]:
        """`encode`, for a text of which no token may be a special one.

        Raises BadRecord if there is one: some models (Unigram) cannot spell the text of a special
        token in another way.
        """
        ids = self.encode(text)
        found = self.hidden_id(ids)
        if found is not None:
            name = next((name for name, n in self.special_texts.items() if n == found), found)
            raise BadRecord(
                f"the text holds {name!r}, which this tokenizer reads as the special token {found}"
                " and cannot spell in another way: take it out"
            )
        return ids

    def encode_special(self, text: str) -> list[int]:
        """`encode`, but the texts of special tokens give these tokens."""
        ids: list[int] = []
        rest = text
        while rest:
            found = [(rest.find(name), -len(name), name) for name in self.special_texts]
            place, _, name = min((f for f in found if f[0] >= 0), default=(len(rest), 0, ""))
            if place:
                # Behind a special token text goes on: it gets no space of its own.
                ids += self.encode_behind(rest[:place]) if ids else self.encode(rest[:place])
            ids += [self.special_texts[name]] if name else []
            rest = rest[place + len(name) :]
        return ids

    def encode_prompt(self, text: str, special: bool = False) -> list[int]:
        """Ids of a prompt, which begins as documents did in training, or as an import says.

        special: the texts of special tokens in it are these tokens; one that begins as every prompt
        does (chat templates write bos) gets nothing more before it.
        """
        first = list(self.special.begin_ids)
        if not special:
            return first + self.encode(text)
        ids = self.encode_special(text)
        return ids if first and ids[: len(first)] == first else first + ids

    def encode_behind(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text that stands behind other text, such as " word" inside a sentence.

        special: the texts of special tokens give these tokens.
        Raises InputError if they are not to be told from those of what stands before.
        """
        encode = self.encode_special if special else self.encode
        for before in ("a", ".", "\n"):
            start, whole = encode(before), encode(before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        raise InputError(
            f"the tokens of {text!r} inside a sentence are joined with those before them by this "
            "tokenizer; choose another text, or a tokenizer that does not join across words"
        )

    @property
    @abc.abstractmethod
    def special_texts(self) -> Mapping[str, int]:
        """Id by text of every token that is special, not only of those in `special`."""

    @property
    @abc.abstractmethod
    def _hidden(self) -> frozenset[int]:
        """Ids that no text of a document may give."""

    def hidden_id(self, ids: Sequence[int]) -> int | None:
        """The first special id among those of a text; None if there is none, as should be."""
        if self._hidden.isdisjoint(ids):
            return None
        return next(number for number in ids if number in self._hidden)

    def absent_ids(self, size: int) -> list[int]:
        """Ids below `size` that stand for nothing: a model's vocabulary may be the larger one.

        An id that ends completions stands for that, though the tokenizer may not know it.
        """
        return [number for number in self._without_token(size) if number not in self.special.ids]

    @abc.abstractmethod
    def _without_token(self, size: int) -> Iterable[int]:
        """Ids below `size` that no token has."""

    @property
    @abc.abstractmethod
    def spelling(self) -> Spelling | None:
        """The bytes of each token; None if text is more than these joined."""

    @property
    @abc.abstractmethod
    def unknown_id(self) -> int | None:
        """Stands for what the tokenizer cannot spell; None if no token does."""

    def kept(self, text: str, ids: Sequence[int]) -> str:
        """What the tokens of a text stand for, in the form that they give it.

        ids: of it, without bos and eos.
        """
        unknown = self.unknown_id
        return self.decode([n for n in ids if n != unknown] if unknown in ids else ids)

    def _decode_known(self, ids: list[int]) -> str:
        """Text of ids that are all inside the vocabulary, where there is no spelling."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens give no text.

        Incomplete UTF-8 and ids outside the vocabulary (a model's may be padded to a larger one)
        give U+FFFD.
        """
        if self.spelling is not None:
            return self.spelling.decode(map(int, ids))
        parts: list[str] = []
        known: list[int] = []
        for token in map(int, ids):
            if 0 <= token < self.vocab_size:
                known.append(token)
                continue
            parts += [self._decode_known(known), REPLACEMENT]
            known = []
        return "".join([*parts, self._decode_known(known)])

    def for_documents(self) -> Self:
        """The same, with prompts that begin as documents do."""
        return dataclasses.replace(self, special=self.special.for_documents())

    def save(self, folder: str | Path) -> None:
        """Writes the model file and `tokenizer_meta.json` into the folder (created if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file_name is not None:
            write_whole(folder / self.file_name, self.source)
        meta = {
            "kind": self.kind,
            "file": self.file_name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            **self.special.record(),
            "chat_template": self.chat_template,
            "generation_config": dict(self.generation_config),
        }
        write_whole(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    For models of `train_sentencepiece`, decode(encode(text)) == text for every text without
    U+2581 (SentencePiece's mark for a space, which decodes to one).
    """

    file_name = "tokenizer.model"

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(checked_text(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode([checked_text(text) for text in texts])

    @functools.cached_property
    def special_texts(self) -> Mapping[str, int]:
        numbers = range(self.vocab_size)
        special = [n for n in numbers if self.processor.is_control(n) or n in self.special.ids]
        return {self.processor.id_to_piece(number): number for number in special}

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(self.special_texts.values()) - {self.processor.unk_id()}

    def _without_token(self, size: int) -> Iterable[int]:
        unused = [n for n in range(self.vocab_size) if self.processor.is_unused(n)]
        return [*unused, *range(self.vocab_size, size)]

    @functools.cached_property
    def spelling(self) -> Spelling:
        return sentencepiece_spelling(self.processor, self._hidden)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        return self.processor.unk_id()


class HfTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library."""

    file_name = "tokenizer.json"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library forgets it on its way to another process.
        self.processor.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(checked_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [checked_text(text) for text in texts]
        encodings = self.processor.encode_batch(checked, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_special(self, text: str) -> list[int]:
        return self._special_processor.encode(checked_text(text), add_special_tokens=False).ids

    @functools.cached_property
    def _special_processor(self) -> Any:
        """Made once: a large vocabulary takes a second."""
        processor = hf_processor(self.source, self.special)
        processor.encode_special_tokens = False
        return processor

    @functools.cached_property
    def special_texts(self) -> Mapping[str, int]:
        return marked_special(self.processor)

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        unknown = {getattr(self.processor.model, "unk_token", None), *_UNKNOWN_NAMES}
        marked = {n for text, n in self.special_texts.items() if text not in unknown}
        return frozenset(marked | self.special.ids)

    def _without_token(self, size: int) -> Iterable[int]:
        known = set(self.processor.get_vocab(with_added_tokens=True).values())
        return [number for number in range(size) if number not in known]

    @functools.cached_property
    def spelling(self) -> Spelling | None:
        decoder = json.loads(self.source).get("decoder")
        hidden = frozenset(self.special_texts.values())
        return hf_spelling(decoder, self.processor.id_to_token, hidden)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        # Unigram names it by its id, all others by its text.
        number = json.loads(self.source)["model"].get("unk_id")
        if number is not None:
            return number
        text = getattr(self.processor.model, "unk_token", None)
        return None if text is None else self.processor.token_to_id(text)

    def kept(self, text: str, ids: Sequence[int]) -> str:
        if self.spelling is not None:
            return super().kept(text, ids)
        # A decoder that does more, or none, says little of what is there; places in the text do.
        encoding = self.processor.encode(checked_text(text), add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        covered = bytearray(len(text))
        for start, end in (span for number, span in spans if number != self.unknown_id):
            covered[start:end] = b"\1" * (end - start)
        return "".join(c for c, there in zip(text, covered, strict=True) if there)

    def _decode_known(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, bos 256, eos 257: no model file, any text round-trips."""

    file_name = None
    special_texts: Mapping[str, int] = {}
    _hidden = frozenset({256, 257})

    def encode(self, text: str) -> list[int]:
        return list(checked_text(text).encode())

    def _without_token(self, size: int) -> Iterable[int]:
        return range(self.vocab_size, size)

    @functools.cached_property
    def spelling(self) -> Spelling:
        return byte_spelling()

    unknown_id = None

    def kept(self, text: str, ids: Sequence[int]) -> str:
        # All of it, which would cost more to see than to tokenize.
        return text


def hf_processor(source: bytes, special: SpecialTokens | None = None) -> Any:
    """The library's object of a tokenizer.json, to which special tokens in a text are plain text.

    special: are marked special, whatever the file says of them.
    """
    import tokenizers

    processor = tokenizers.Tokenizer.from_buffer(source)
    processor.no_padding()
    processor.no_truncation()
    processor.encode_special_tokens = True
    texts = map(processor.id_to_token, sorted(special.ids) if special else ())
    processor.add_special_tokens([text for text in texts if text is not None])
    return processor


def marked_special(processor: Any) -> dict[str, int]:
    """Id by text of the tokens that a tokenizer.json marks special."""
    added = processor.get_added_tokens_decoder().items()
    return {token.content: number for number, token in added if token.special}


def checked_text(text: str) -> str:
    """The text; raises BadRecord for a lone surrogate, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}:"
            " replace it before tokenizing"
        ) from error
    return text
