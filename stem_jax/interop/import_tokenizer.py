"""The tokenizer of a model that is imported, with all that its folder says of special tokens."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Self

from stem_jax.data.shipped_files import CONFIG, ShippedFiles
from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.interop.official_format import official_tokenizer, read_params
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER, probe_texts


@dataclasses.dataclass(frozen=True)
class TokenizerChoice:
    """What flags say.

    kind, path: None to look in the model's folder. special: tokens that they name.
    """

    kind: str | None = None
    path: str | None = None
    special: SpecialFlags = dataclasses.field(default_factory=SpecialFlags)

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Self:
        return cls(args.tokenizer, args.tokenizer_path, SpecialFlags.from_flags(args))


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
        return _given(kind, path, choice)
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
    elif file.is_file():
        return load_tokenizer("hf", file, choice.special, as_shipped=True)
    elif (path / "tokenizer.model").is_file():
        model = path / "tokenizer.model"
        return load_tokenizer("sentencepiece", model, choice.special, as_shipped=True)
    raise InputError(
        f"--path={path} has no tokenizer; give the one that the model was trained with by "
        "--tokenizer-path=FILE (and --tokenizer=sentencepiece or hf), or --tokenizer=bytes"
    )


def _given(kind: str, path: Path, choice: TokenizerChoice) -> Tokenizer:
    """A tokenizer from elsewhere, with what the model's folder says."""
    tokenizer = load_tokenizer(choice.kind, choice.path, choice.special, as_shipped=True)
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
    differs = written.vocab_size != own.vocab_size or any(
        written.encode(text) != own.encode(text) for text in probe_texts()
    )
    if differs:
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
