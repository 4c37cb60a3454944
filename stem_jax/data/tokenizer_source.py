"""Where the file of a tokenizer is: on this machine, or among a model's on the Hugging Face Hub."""

from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.hub import hub_folder, is_of_hub
from stem_jax.storage import local_path

# The tokenizer's own and what says what its special tokens are; of the weights nothing.
_FILES = {"hf": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_BESIDE = ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
_BESIDE += ["config.json", "added_tokens.json", "*.jinja"]


def tokenizer_source(text: str | Path, flag: str) -> str | Path:
    """What a flag or key names, for `tokenizer_file`: a name of the hub stays a text.

    Raises:
        InputError: see `local_path` and `is_of_hub`.
    """
    if isinstance(text, str) and is_of_hub(text, flag):
        return text
    return local_path(text, flag)


def tokenizer_file(source: str | Path, kind: str, flag: str) -> Path:
    """The file on this machine, which is copied with those beside it if it is on the hub.

    Args:
        source: a path, or `hf://ORG/NAME`.
        kind: of the tokenizer, which decides the file of a model on the hub.
        flag: that it was given by, for messages.

    Raises:
        InputError: see `local_path` and `hub_folder`; the model has no such file.
    """
    if not isinstance(source, str) or not is_of_hub(source, flag):
        return local_path(source, flag)
    wanted = [_FILES[kind]] if kind in _FILES else []
    folder = hub_folder(source, flag, [*_FILES.values(), *_BESIDE])
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    there = {k: name for k, name in _FILES.items() if (folder / name).is_file()}
    have = " and ".join(f"{name}, which is kind {k}" for k, name in there.items())
    raise InputError(
        f"{flag}={source} has no tokenizer of kind {kind}; it has {have or 'none at all'}"
    )
