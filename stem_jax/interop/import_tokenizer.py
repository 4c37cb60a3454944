"""The tokenizer of a model that is imported, with all that its folder says of special tokens."""

import argparse
import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from stem_jax.data.shipped_files import CONFIG, ShippedFiles
from stem_jax.data.special_tokens import NONE, SpecialFlags, SpecialTokens
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_folder
from stem_jax.data.tokenizer_source import tokenizer_file
from stem_jax.errors import InputError
from stem_jax.interop.official_format import official_tokenizer, read_params
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER, probe_texts

# The tokenizer of a folder of transformers; the first comes first.
_FILES = {"tokenizer.json": "hf", "tokenizer.model": "sentencepiece"}


@dataclasses.dataclass(frozen=True)
class TokenizerChoice:
    """What flags say.

    kind, path: None to look in the model's folder. special: tokens that they name.
    """

    kind: str | None = None
    path: Path | None = None
    special: SpecialFlags = dataclasses.field(default_factory=SpecialFlags)

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Self:
        path = args.tokenizer_path
        if path is not None:
            path = tokenizer_file(path, args.tokenizer, "--tokenizer-path")
        return cls(args.tokenizer, path, SpecialFlags.from_flags(args))


def find_tokenizer(
    kind: str,
    path: Path,
    choice: TokenizerChoice,
) -> Tokenizer:
    """The tokenizer of a model, whose prompts begin as its files say.

    Args:
        kind: format of the model.
        path: its folder.
        choice: of flags, which come first.

    Raises:
        InputError: there is none, it cannot be read, another one was exported with the model, or
            nothing says what ends its texts.
    """
    if choice.kind is not None:
        return _given(kind, path, choice.kind, choice)
    native, file = path / NATIVE_FOLDER, path / "tokenizer.json"
    if kind == "official":
        found = official_tokenizer(read_params(path), path)
        if found is not None:
            return load_tokenizer(*found, choice.special, as_shipped=True)
    elif native.is_dir():
        own = load_tokenizer_folder(native)
        # Without its package tokenizer.json cannot be read, and ours stands alone.
        readable = file.is_file() and importlib.util.find_spec("tokenizers") is not None
        return _as_written_beside(own, file, choice.special) if readable else own
    else:
        for name, file_kind in _FILES.items():
            if (path / name).is_file():
                own = load_tokenizer(file_kind, path / name, choice.special, as_shipped=True)
                return _with_stops_told(own, path, choice.special)
    raise InputError(
        f"--path={path} has no tokenizer; give the one that the model was trained with by "
        "--tokenizer-path=FILE (and --tokenizer=sentencepiece or hf), or --tokenizer=bytes"
    )


def _given(kind: str, path: Path, given: str, choice: TokenizerChoice) -> Tokenizer:
    """A tokenizer of the kind `given` from elsewhere, with what the model's folder says."""
    tokenizer = load_tokenizer(given, choice.path, choice.special, as_shipped=True)
    if not (path / NATIVE_FOLDER).is_dir():
        tokenizer = _compared(tokenizer, list(_own_files(kind, path)), choice)
    if kind == "official":
        return tokenizer
    native = path / NATIVE_FOLDER
    if native.is_dir():
        own = load_tokenizer_folder(native)
        if tokenizer.fingerprint != own.fingerprint:
            raise InputError(
                f"--tokenizer={tokenizer.kind} has fingerprint {tokenizer.fingerprint[:12]}, "
                f"the model was exported with {own.fingerprint[:12]}, which is in {native}; "
                "leave the flag out"
            )
    shipped = ShippedFiles.beside(path)
    special, flags = tokenizer.special, choice.special
    for name, found, flag in (
        ("bos", special.first_id, flags.bos),
        ("eos", special.eos_id, flags.eos),
    ):
        expected = shipped.ids(f"{name}_token_id", (CONFIG,))
        if expected and found not in expected and flag is None:
            raise InputError(
                f"the tokenizer's {name} is token {found}, config.json of the model has "
                f"{name}_token_id={' or '.join(map(str, expected))}: it is not the one that the "
                "model was trained with; give that with --tokenizer and --tokenizer-path, name "
                f"the token by --{name}, or correct config.json"
            )
    if not flags.stop:
        stops = (*special.stop_ids, *shipped.ids("eos_token_id"))
        special = dataclasses.replace(special, stop_ids=stops)
    return dataclasses.replace(
        tokenizer,
        special=special,
        chat_template=tokenizer.chat_template or shipped.chat_template(),
        generation_config=tokenizer.generation_config or shipped.generation_config(),
    )


def _as_written_beside(own: Tokenizer, file: Path, flags: SpecialFlags) -> Tokenizer:
    """Our tokenizer of an export, with the special tokens that the files of the export name now.

    Raises InputError if tokenizer.json gives other ids: the model was trained further with another
    tokenizer, and ours was left behind.
    """
    written = load_tokenizer("hf", file, flags, as_shipped=True)
    written = _with_stops_told(written, file.parent, flags)
    if written.vocab_size != own.vocab_size or _encode_differently(written, own):
        raise InputError(
            f"{file} gives other ids than {file.parent / NATIVE_FOLDER}, which is of an earlier "
            "export; remove the one that the model was not trained with"
        )
    return dataclasses.replace(
        own,
        special=written.special,
        chat_template=written.chat_template,
        generation_config=written.generation_config,
        notes=written.notes,
    )


def _own_files(kind: str, path: Path) -> Iterator[tuple[str, Path | None]]:
    """Kinds and files of the tokenizers that are a model's own; no file: bytes."""
    if kind != "official":
        files = ((file_kind, path / name) for name, file_kind in _FILES.items())
        yield from ((file_kind, file) for file_kind, file in files if file.is_file())
        return
    # What it says may be why a tokenizer is given.
    with contextlib.suppress(InputError):
        if (found := official_tokenizer(read_params(path), path)) is not None:
            yield found


def _compared(
    tokenizer: Tokenizer, files: list[tuple[str, Path | None]], choice: TokenizerChoice
) -> Tokenizer:
    """A tokenizer that is given, with a note of how it differs from a model's own.

    Raises InputError if none of the model's own gives the same ids.
    """
    given = f"--tokenizer={tokenizer.kind}"
    if choice.path is not None:
        given = f"--tokenizer-path={choice.path}"
        if any(file is not None and file.samefile(choice.path) for _, file in files):
            return tokenizer
    notes, others = [], []
    for kind, file in files:
        where = kind if file is None else file
        own = _read_alike(kind, file, tokenizer.special)
        if own is None:
            notes.append(f"{where} could not be read: {given} was not compared with it")
        elif _encode_differently(tokenizer, own):
            others.append(where)
        else:
            if own.vocab_size != tokenizer.vocab_size:
                notes.append(
                    f"{given} has {tokenizer.vocab_size} ids, {where} {own.vocab_size}; texts have "
                    "the same ids in both"
                )
            others.clear()
            break
    if others:
        raise InputError(
            f"{given} gives other ids than {others[0]}, which is with the model: it is not the one "
            "that the model was trained with; leave out --tokenizer, or remove that file if it is "
            "of another model"
        )
    return dataclasses.replace(tokenizer, notes=(*tokenizer.notes, *notes))


def _read_alike(kind: str, file: Path | None, special: SpecialTokens) -> Tokenizer | None:
    """A tokenizer with special tokens of another; with its own where it has not all of them.

    None if it cannot be read, which may be why another one is given.
    """
    bos = NONE if special.bos_id is None else str(special.bos_id)
    alike = SpecialFlags(bos, str(special.eos_id), tuple(map(str, special.stop_ids)))
    for flags in (alike, SpecialFlags()):
        with contextlib.suppress(InputError):
            return load_tokenizer(kind, file, flags)
    return None


def _encode_differently(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether a text, or a special token of both, has other ids."""
    if one.fingerprint == other.fingerprint:
        return False
    theirs = other.special_texts
    return any(
        theirs.get(text, number) != number for text, number in one.special_texts.items()
    ) or any(one.encode(text) != other.encode(text) for text in probe_texts())


def _with_stops_told(tokenizer: Tokenizer, path: Path, flags: SpecialFlags) -> Tokenizer:
    """The same, with a note if config.json of the model names another eos, which ends as well."""
    named = ShippedFiles.beside(path).ids("eos_token_id", (CONFIG,))
    special = tokenizer.special
    told = flags.eos is not None or special.eos_id in named or not named
    if told or not set(named) <= set(special.stop_ids):
        return tokenizer
    note = (
        f"the tokenizer's eos is token {special.eos_id}, config.json of the model has "
        f"eos_token_id={' or '.join(map(str, named))}: documents end with the former, completions "
        "at each; --eos and --stop choose others"
    )
    return dataclasses.replace(tokenizer, notes=(*tokenizer.notes, note))
