"""The files that people ship beside a tokenizer: what they name, and the chat template."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from stem_jax.errors import InputError
from stem_jax.files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
OTHER_TEMPLATES = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"

# One template, or several by name.
ChatTemplate = str | dict[str, str]


@dataclasses.dataclass(frozen=True)
class ShippedFiles:
    """What is beside a tokenizer; {} and None for what is not there.

    meta: of `tokenizer_meta.json`, if it describes the same model. files: content by name of the
    JSON files above.
    """

    folder: Path
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] | None = None

    @classmethod
    def beside(cls, folder: Path, meta: dict[str, Any] | None = None) -> Self:
        """Reads them.

        Raises InputError for one that is not JSON, or another value than an object.
        """
        found = {}
        for name in (TOKENIZER_CONFIG, SPECIAL_MAP, GENERATION_CONFIG, CONFIG, _OLD_TEMPLATE):
            path = folder / name
            if path.is_file():
                # Of config.json special ids alone are read; NaN may stand in other values.
                found[name] = read_json(path, constants=name == CONFIG)
                if not isinstance(found[name], dict):
                    raise InputError(f"{path} holds no JSON object; correct it, or remove it")
        return cls(folder, found, meta)

    @property
    def names_tokens(self) -> bool:
        """Whether a file says which texts are special."""
        return self.token("eos_token") is not None

    def token(self, name: str) -> str | None:
        """The text of a special token such as "eos_token"; None if no file names it."""
        for file in (TOKENIZER_CONFIG, SPECIAL_MAP):
            value = self.files.get(file, {}).get(name)
            # Some files describe the token instead: {"content": "</s>", "lstrip": false, ...}.
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if not isinstance(text, str):
                raise InputError(
                    f"{self.folder / file} has {name}={value!r}, expected the text of a token; "
                    "correct it"
                )
            return text
        return None

    def naming(self, name: str) -> Path:
        """The file that `token` takes a name from."""
        described = self.files.get(TOKENIZER_CONFIG, {}).get(name) is not None
        return self.folder / (TOKENIZER_CONFIG if described else SPECIAL_MAP)

    def ids(
        self, name: str, files: tuple[str, ...] = (CONFIG, GENERATION_CONFIG)
    ) -> tuple[int, ...]:
        """All ids of "eos_token_id" or "bos_token_id" in config.json, then generation_config.json.

        Raises InputError for values that are none.
        """
        found: list[int] = []
        for file in files:
            value = self.files.get(file, {}).get(name)
            found += token_ids(value, file, name)
        return tuple(dict.fromkeys(found))

    def adds_bos(self) -> bool | None:
        """Whether texts begin with bos; None if tokenizer_config.json does not say."""
        value = self.files.get(TOKENIZER_CONFIG, {}).get("add_bos_token")
        return value if isinstance(value, bool) else None

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        if self.meta is not None:
            return self.meta.get("generation_config") or {}
        return self.files.get(GENERATION_CONFIG, {})

    def chat_template(self) -> ChatTemplate | None:
        """The chat template, or several by name.

        Files of their own come before what tokenizer_config.json holds, as in transformers.
        Raises InputError for one that is no text.
        """
        if self.meta is not None:
            return self.meta.get("chat_template")
        apart = self.folder / OTHER_TEMPLATES
        named = {path.stem: path for path in sorted(apart.glob("*.jinja"))}
        if (self.folder / CHAT_TEMPLATE).is_file():
            named = {DEFAULT_TEMPLATE: self.folder / CHAT_TEMPLATE, **named}
        if named:
            texts = {name: _read_text(path) for name, path in named.items()}
            return texts[DEFAULT_TEMPLATE] if set(texts) == {DEFAULT_TEMPLATE} else texts
        for file in (_OLD_TEMPLATE, TOKENIZER_CONFIG):
            value = self.files.get(file, {}).get("chat_template")
            if value is not None:
                return _template(value, self.folder / file)
        return None


def token_ids(value: Any, where: str, name: str) -> tuple[int, ...]:
    """Token ids that a file gives, one or a list of them; none for null.

    Raises InputError for anything else.
    """
    found = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(one) is int and 0 <= one < 2**31 for one in found):
        raise InputError(f"{where} has {name}={value!r}, expected token ids; correct it")
    return tuple(found)


def _template(value: Any, where: Path) -> ChatTemplate:
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        # Several, as [{"name": ..., "template": ...}].
        value = {one.get("name"): one.get("template") for one in value}
    texts = [*value, *value.values()] if isinstance(value, dict) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} has a chat_template that is no text; correct it")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); correct it, or remove it") from error
