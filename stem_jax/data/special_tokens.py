"""The one place that knows special tokens: which ids begin and end documents, and end completions.

They come, in this order, from flags; from `tokenizer_meta.json`, if it describes the model beside
it; from the files that people ship beside a tokenizer (tokenizer_config.json,
special_tokens_map.json); from a SentencePiece model; from the ids in config.json and
generation_config.json; and, where nothing else speaks, from the tokens of the tokenizer that are
marked special, if one alone is a candidate. All ids that end a completion in generation_config.json
and config.json count: chat models name several.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from stem_jax.data.shipped_files import ShippedFiles, token_ids
from stem_jax.errors import InputError

NONE = "none"
_BOS_NAMES = frozenset(
    """
    <s> <bos> <|begin_of_text|> <|startoftext|> <|beginoftext|> <|bos|> [BOS]
    <｜begin▁of▁sentence｜>
    """.split()
)
_EOS_NAMES = frozenset(
    """
    </s> <eos> <|end_of_text|> <|endoftext|> <|eos|> [EOS] <｜end▁of▁sentence｜>
    """.split()
)
# They end what one says in a conversation; a document only where nothing else can.
_TURN_NAMES = frozenset(
    """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|eot|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|>
    <|return|>
    """.split()
)
# Special tokens that begin and end nothing.
_OTHER_NAMES = frozenset(
    "<unk> <pad> [UNK] [PAD] [CLS] [SEP] [MASK] <mask> <|pad|> <|unk|>".split()
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own.

    bos_id: begins a document; None: there is none, and documents begin with eos. eos_id: ends a
    document. pad_id: of the vocabulary's padding, never eos; None: there is none. stop_ids: end a
    completion, ascending, eos among them. prompt_ids: what a prompt begins with; None as an
    argument: what a document begins with.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("stop_ids", tuple(sorted({self.eos_id, *self.stop_ids})))
        if self.pad_id == self.eos_id:
            put("pad_id", None)
        put("prompt_ids", (self.first_id,) if self.prompt_ids is None else tuple(self.prompt_ids))

    @property
    def first_id(self) -> int:
        """Begins every document: bos, or eos where there is none."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def ids(self) -> frozenset[int]:
        """All of them."""
        one = (self.bos_id, self.eos_id, self.pad_id)
        return frozenset({*(id for id in one if id is not None), *self.stop_ids})

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What a prompt begins with: `prompt_ids`, which are none but as an argument."""
        assert self.prompt_ids is not None
        return self.prompt_ids

    def for_documents(self) -> Self:
        """The same, with prompts that begin as documents do."""
        return dataclasses.replace(self, prompt_ids=None)

    def record(self) -> dict[str, Any]:
        """As JSON; `from_record` reads it."""
        lists = {"stop_ids": list(self.stop_ids), "prompt_ids": list(self.begin_ids)}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Self:
        """Reads what `record` gave, or an older one, of bos_id and eos_id alone.

        where: the record is from, for messages. Raises InputError for values that are no ids.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = record.get(field.name)
            many = field.name in ("stop_ids", "prompt_ids")
            if value is None and field.name != "eos_id":
                values[field.name] = () if field.name == "stop_ids" else None
            elif many:
                values[field.name] = token_ids(value, where, field.name)
            else:
                [values[field.name]] = token_ids(value, where, field.name) or (None,)
        if values["eos_id"] is None:
            raise InputError(f"{where} has no eos_id; restore the original file")
        return cls(**values)

    def difference(self, other: Self) -> str | None:
        """The first field that differs, as "eos_id 2, not 1"; None if all are the same."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {_named(mine)}, not {_named(theirs)}"
        return None


@dataclasses.dataclass(frozen=True)
class SpecialFlags:
    """What `--bos`, `--eos` and `--stop` say: texts or ids of tokens; None and (): nothing."""

    bos: str | None = None
    eos: str | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """The flags that `from_flags` reads."""
        group = parser.add_argument_group("special tokens, by text or id, if no file names them")
        group.add_argument("--bos", help="that documents begin with; none: with eos")
        group.add_argument("--eos", help="that documents end with")
        group.add_argument("--stop", action="append", default=[], help="ends completions as well")

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Self:
        return cls(args.bos, args.eos, tuple(args.stop))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What is asked of a tokenizer to find its special tokens.

    where: its file, for messages. find: id of a token's text, None if it has none. size: ids lie
    below. marked: id by text of the tokens that are marked special. bos_id, eos_id: that the model
    itself names.
    """

    where: str
    find: Callable[[str], int | None]
    size: int
    marked: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None


def find_special_tokens(
    vocabulary: Vocabulary, flags: SpecialFlags, shipped: ShippedFiles
) -> tuple[SpecialTokens, list[str]]:
    """The special tokens of a tokenizer, and what should be said about how they were found.

    Prompts begin as documents do, or as the record says.

    Raises:
        InputError: nothing names an eos, several tokens may be it, or a name is not in the
            vocabulary.
    """
    notes: list[str] = []
    recorded = None
    if shipped.meta is not None:
        recorded = SpecialTokens.from_record(shipped.meta, f"{vocabulary.where}'s record")
    eos = _find_eos(vocabulary, flags, shipped, recorded, notes)
    bos = _find_bos(vocabulary, flags, shipped, recorded, eos, notes)
    pad = None if recorded is None else recorded.pad_id
    if recorded is None:
        text = shipped.token("pad_token")
        pad = vocabulary.find(text) if text else None
    if flags.stop:
        stops = tuple(_of_flag(vocabulary, "--stop", text) for text in flags.stop)
    else:
        stops = tuple(shipped.ids("eos_token_id") if recorded is None else recorded.stop_ids)
    prompt = None if recorded is None or flags != SpecialFlags() else recorded.prompt_ids
    return SpecialTokens(bos, eos, pad, stops, prompt), notes


def _find_eos(
    vocabulary: Vocabulary,
    flags: SpecialFlags,
    shipped: ShippedFiles,
    recorded: SpecialTokens | None,
    notes: list[str],
) -> int:
    if flags.eos is not None:
        return _of_flag(vocabulary, "--eos", flags.eos)
    if recorded is not None:
        return recorded.eos_id
    text = shipped.token("eos_token")
    if text is not None:
        return _of_file(vocabulary, shipped, "eos", text)
    if vocabulary.eos_id is not None:
        return vocabulary.eos_id
    named = [number for number in shipped.ids("eos_token_id") if number < vocabulary.size]
    if named:
        if len(named) > 1:
            notes.append(
                f"documents end with token {named[0]}, the first of eos_token_id in the files "
                f"beside {vocabulary.where}; --eos chooses another"
            )
        return named[0]
    marked = vocabulary.marked
    candidates = (
        [text for text in marked if text in _EOS_NAMES]
        or [text for text in marked if text in _TURN_NAMES]
        or [text for text in marked if text not in _BOS_NAMES | _OTHER_NAMES]
    )
    if len(candidates) == 1:
        notes.append(
            f"documents end with {candidates[0]!r} (token {marked[candidates[0]]}), the only "
            f"candidate of {vocabulary.where}; --eos chooses another"
        )
        return marked[candidates[0]]
    if candidates:
        raise InputError(
            f"{vocabulary.where} has several tokens that may end a document, {_listed(candidates)}:"
            " name it by --eos=TOKEN (and --bos, --stop), or put its tokenizer_config.json beside"
        )
    raise InputError(
        f"{vocabulary.where} has no end-of-text token that is marked special, and no file beside "
        "it names one: name it by --eos=TOKEN where text is prepared"
    )


def _find_bos(
    vocabulary: Vocabulary,
    flags: SpecialFlags,
    shipped: ShippedFiles,
    recorded: SpecialTokens | None,
    eos: int,
    notes: list[str],
) -> int | None:
    if flags.bos is not None:
        return None if flags.bos == NONE else _of_flag(vocabulary, "--bos", flags.bos)
    if recorded is not None:
        return recorded.bos_id
    if shipped.names_tokens:
        text = shipped.token("bos_token")
        return None if text is None else _of_file(vocabulary, shipped, "bos", text)
    if vocabulary.eos_id is not None or vocabulary.bos_id is not None:
        return vocabulary.bos_id
    named = [number for number in shipped.ids("bos_token_id") if number < vocabulary.size]
    if named:
        return named[0]
    candidates = [text for text in vocabulary.marked if text in _BOS_NAMES]
    if len(candidates) > 1:
        raise InputError(
            f"{vocabulary.where} has several tokens that may begin a document, "
            f"{_listed(candidates)}: name it by --bos=TOKEN, or --bos={NONE}"
        )
    if candidates:
        found = vocabulary.marked[candidates[0]]
        notes.append(
            f"documents begin with {candidates[0]!r} (token {found}), the only candidate of "
            f"{vocabulary.where}; --bos chooses another"
        )
        return found
    return None


def _of_flag(vocabulary: Vocabulary, flag: str, text: str) -> int:
    """The id that a flag names: by number, or by the text of a token."""
    if text.isascii() and text.isdigit():
        number = int(text)
        if number >= vocabulary.size:
            raise InputError(
                f"{flag}={text} is not below the {vocabulary.size} ids of {vocabulary.where}; "
                "give another id, or the token's text"
            )
        return number
    found = vocabulary.find(text)
    if found is None:
        raise InputError(
            f"{flag}={text} is no token of {vocabulary.where}; give the text of one, or its id"
        )
    return found


def _of_file(vocabulary: Vocabulary, shipped: ShippedFiles, name: str, text: str) -> int:
    found = vocabulary.find(text)
    if found is None:
        raise InputError(
            f"{shipped.naming(f'{name}_token')} has {name}_token={text!r}, which is no token of "
            f"{vocabulary.where}; give the file that belongs to it, or name the token by --{name}"
        )
    return found


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(repr(text) for text in texts)


def _named(value: Any) -> str:
    if value is None:
        return NONE
    return ", ".join(map(str, value)) or NONE if isinstance(value, tuple) else str(value)
